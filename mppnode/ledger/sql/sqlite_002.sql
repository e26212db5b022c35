-- Several processes on one file, settlement with persisted intents, sponsored gas. The JSON in "holds" and in the
-- journal is read in the form of schema 1 too (rows.py).
ALTER TABLE channel ADD COLUMN active_at INTEGER NOT NULL DEFAULT 0;                    -- when the last request began
ALTER TABLE channel ADD COLUMN live INTEGER NOT NULL DEFAULT 0 CHECK (live IN (0, 1));  -- has at least one hold
ALTER TABLE channel ADD COLUMN soft INTEGER NOT NULL DEFAULT 0 CHECK (soft IN (0, 1));  -- a power cut may take it back
UPDATE channel SET live = 1 WHERE holds <> '{}';
UPDATE channel SET active_at = coalesce(
  (SELECT max(json_extract(body, '$[4]')) FROM journal WHERE journal.channel = channel.id AND kind = 'Held'), 0);
CREATE INDEX channel_live ON channel (id) WHERE live = 1;
CREATE INDEX channel_unclosed ON channel (id) WHERE phase <> 'closed';

-- The lives of node processes. A life that was fenced is a row that is gone.
CREATE TABLE node (
  id         TEXT PRIMARY KEY,
  name       TEXT NOT NULL UNIQUE,   -- one process has a name at a time
  lease_until INTEGER NOT NULL       -- ms of this machine's clock
) WITHOUT ROWID;

-- Who does a job that one process should do. It avoids double work and proves nothing.
CREATE TABLE leader (
  job   TEXT PRIMARY KEY,
  node  TEXT NOT NULL,
  until INTEGER NOT NULL             -- ms of this machine's clock
) WITHOUT ROWID;

-- Transactions of ours (channels/intent.py), written before they are signed and again before they are sent.
CREATE TABLE intent (
  entry       INTEGER PRIMARY KEY,
  id          TEXT NOT NULL UNIQUE,
  channel     BLOB NOT NULL CHECK (length(channel) = 32),
  kind        TEXT NOT NULL,
  amount      TEXT NOT NULL,         -- base units, cumulative: the chain's total for the channel afterwards
  owner       TEXT NOT NULL,         -- node.id of who drives it
  state       TEXT NOT NULL CHECK (state IN ('planned', 'signed', 'sent', 'mined', 'final', 'dead', 'reverted')),
  version     INTEGER NOT NULL,
  created_at  INTEGER NOT NULL,      -- s
  updated_at  INTEGER NOT NULL,      -- s
  attempt     INTEGER NOT NULL,
  deadline    TEXT,                  -- s of chain time
  raw         BLOB NOT NULL,         -- the signed bytes, once there are any
  tx_hash     BLOB,
  valid_before INTEGER,              -- s of chain time
  block       TEXT
);
-- A second transaction for a channel could only revert.
CREATE UNIQUE INDEX intent_active ON intent (channel) WHERE state IN ('planned', 'signed', 'sent', 'mined');
CREATE INDEX intent_channel ON intent (channel);

-- Gas we promised to pay for payers' transactions.
CREATE TABLE sponsored (
  tx_hash      BLOB PRIMARY KEY CHECK (length(tx_hash) = 32),
  sender       BLOB NOT NULL,
  fee_max      TEXT NOT NULL,        -- base units of the fee token
  valid_before INTEGER NOT NULL,     -- s of chain time
  granted_at   INTEGER NOT NULL,     -- ms of this machine's clock
  fee          TEXT                  -- what was really paid; NULL while that is open
);
CREATE INDEX sponsored_granted ON sponsored (granted_at);
CREATE INDEX sponsored_open ON sponsored (granted_at) WHERE fee IS NULL;
