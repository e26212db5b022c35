-- The tables of SQLite's schema 2, for several nodes. Amounts are NUMERIC: 2**96 units and 2**116 pico fit, the laws are
-- checked as numbers, and an operator can add them up. No index stands on a column that every step changes, and pages
-- are kept a third empty, so that an update stays on its page (HOT).
CREATE TABLE channel (
  id         BYTEA PRIMARY KEY CHECK (octet_length(id) = 32),
  terms      TEXT NOT NULL,           -- JSON: escrow and descriptor; immutable
  phase      TEXT NOT NULL,           -- channels.model.Phase
  version    BIGINT NOT NULL,         -- number of journal entries folded into this row
  deposit    NUMERIC(29, 0) NOT NULL, -- base units, as the chain said at the block in "chain"
  settled    NUMERIC(29, 0) NOT NULL, -- base units paid out on chain
  accepted   NUMERIC(29, 0) NOT NULL, -- base units: the highest voucher we hold
  spent      NUMERIC(29, 0) NOT NULL, -- base units charged for delivered work; never falls
  owed_pico  NUMERIC(36, 0) NOT NULL, -- exact charge in pico-dollars
  held_pico  NUMERIC(36, 0) NOT NULL, -- reserved by live requests, in pico-dollars
  chain      TEXT NOT NULL,           -- JSON: deposit, settled, close request, block
  ladder     TEXT NOT NULL,           -- JSON: accepted vouchers with signatures, rising
  holds      TEXT NOT NULL,           -- JSON: hold -> granted, consumed (pico), owner, stream, ending
  tickets    TEXT NOT NULL,           -- JSON: challenge id that bought a response -> expiry
  top_ups    TEXT NOT NULL,           -- JSON: top-up credential -> transaction
  close      TEXT NOT NULL,           -- JSON: how the channel is being or was closed
  active_at  BIGINT NOT NULL,         -- when the last request began, s
  live       SMALLINT NOT NULL CHECK (live IN (0, 1)),  -- has at least one hold
  soft       SMALLINT NOT NULL CHECK (soft IN (0, 1)),  -- a crash of the server may take it back
  CHECK (spent <= accepted),
  CHECK (owed_pico + held_pico <= accepted * 1000000),
  CHECK (accepted <= deposit OR phase IN ('closed', 'suspect'))
) WITH (fillfactor = 70);
CREATE INDEX channel_live ON channel (id) WHERE live = 1;
CREATE INDEX channel_unclosed ON channel (id) WHERE phase <> 'closed';

-- Append only. Folding a channel's entries in order rebuilds its row.
CREATE TABLE journal (
  channel BYTEA NOT NULL,
  entry   BIGINT NOT NULL,            -- equals channel.version after this event
  at_ms   BIGINT NOT NULL,            -- the writing node's wall clock
  kind    TEXT NOT NULL,              -- name of the event in channels.model
  body    TEXT NOT NULL,              -- JSON
  PRIMARY KEY (channel, entry)
);

-- The last transaction of each connection that writes. When a connection breaks during COMMIT, the next one reads here
-- whether it happened.
CREATE TABLE lane (
  id    TEXT PRIMARY KEY,
  batch BIGINT NOT NULL,
  at    TIMESTAMPTZ NOT NULL
) WITH (fillfactor = 50);

-- The lives of node processes. A life that was fenced is a row that is gone. Leases are by this server's clock.
CREATE TABLE node (
  id          TEXT PRIMARY KEY,
  name        TEXT NOT NULL UNIQUE,   -- one process has a name at a time
  lease_until TIMESTAMPTZ NOT NULL
);

-- Who does a job that one process should do. It avoids double work and proves nothing.
CREATE TABLE leader (
  job   TEXT PRIMARY KEY,
  node  TEXT NOT NULL,
  until TIMESTAMPTZ NOT NULL
);

-- Transactions of ours (channels/intent.py), written before they are signed and again before they are sent.
CREATE TABLE intent (
  entry        BIGINT GENERATED ALWAYS AS IDENTITY PRIMARY KEY,
  id           TEXT NOT NULL UNIQUE,
  channel      BYTEA NOT NULL CHECK (octet_length(channel) = 32),
  kind         TEXT NOT NULL,
  amount       NUMERIC(29, 0) NOT NULL, -- base units, cumulative: the chain's total for the channel afterwards
  owner        TEXT NOT NULL,           -- node.id of who drives it
  state        TEXT NOT NULL CHECK (state IN ('planned', 'signed', 'sent', 'mined', 'final', 'dead', 'reverted')),
  version      BIGINT NOT NULL,
  created_at   BIGINT NOT NULL,         -- s
  updated_at   BIGINT NOT NULL,         -- s
  attempt      BIGINT NOT NULL,
  deadline     NUMERIC(78, 0),          -- s of chain time
  raw          BYTEA NOT NULL,          -- the signed bytes, once there are any
  tx_hash      BYTEA,
  valid_before BIGINT,                  -- s of chain time
  block        NUMERIC(78, 0)
);
-- A second transaction for a channel could only revert.
CREATE UNIQUE INDEX intent_active ON intent (channel) WHERE state IN ('planned', 'signed', 'sent', 'mined');
CREATE INDEX intent_channel ON intent (channel);

-- Gas we promised to pay for payers' transactions.
CREATE TABLE sponsored (
  tx_hash      BYTEA PRIMARY KEY CHECK (octet_length(tx_hash) = 32),
  sender       BYTEA NOT NULL,
  fee_max      NUMERIC(29, 0) NOT NULL, -- base units of the fee token
  valid_before BIGINT NOT NULL,         -- s of chain time
  granted_at   TIMESTAMPTZ NOT NULL,
  fee          NUMERIC(29, 0)           -- what was really paid; NULL while that is open
);
CREATE INDEX sponsored_granted ON sponsored (granted_at);
CREATE INDEX sponsored_open ON sponsored (granted_at) WHERE fee IS NULL;

INSERT INTO meta (name, value) VALUES
  ('generation', 1),   -- raised by one when a standby is promoted; a node refuses a lower one than it has seen
  ('sponsoring', 0);   -- locked by whoever adds to sponsored: the budget is one for all nodes
