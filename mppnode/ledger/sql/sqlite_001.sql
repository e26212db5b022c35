-- One row per channel. Amounts are zero-padded decimal text (see rows.py): 2**96 does not fit SQLite's 64-bit integers,
-- and padded text compares in numeric order, so the laws below are checked by the database too.
CREATE TABLE channel (
  id         BLOB PRIMARY KEY CHECK (length(id) = 32), -- raw bytes: hex has many spellings, a channel has one record
  terms      TEXT NOT NULL,     -- JSON: escrow and descriptor; immutable
  phase      TEXT NOT NULL,     -- channels.model.Phase
  version    INTEGER NOT NULL,  -- number of journal entries folded into this row
  deposit    TEXT NOT NULL,     -- base units, as the chain said at the block in "chain"
  settled    TEXT NOT NULL,     -- base units paid out on chain
  accepted   TEXT NOT NULL,     -- base units: the highest voucher we hold
  spent      TEXT NOT NULL,     -- base units charged for delivered work; never falls
  owed_pico  TEXT NOT NULL,     -- exact charge in pico-dollars
  held_pico  TEXT NOT NULL,     -- reserved by live requests, in pico-dollars
  chain      TEXT NOT NULL,     -- JSON: deposit, settled, close request, block
  ladder     TEXT NOT NULL,     -- JSON: accepted vouchers with signatures, rising
  holds      TEXT NOT NULL,     -- JSON: hold -> granted, consumed (pico)
  tickets    TEXT NOT NULL,     -- JSON: challenge id that bought a response -> expiry
  top_ups    TEXT NOT NULL,     -- JSON: top-up credential -> transaction
  close      TEXT NOT NULL,     -- JSON: how the channel is being or was closed
  CHECK (spent <= accepted),
  CHECK (accepted <= deposit OR phase IN ('closed', 'suspect'))
) WITHOUT ROWID;

-- Append only. Folding a channel's entries in order rebuilds its row.
CREATE TABLE journal (
  channel BLOB NOT NULL,
  entry   INTEGER NOT NULL,     -- equals channel.version after this event
  at_ms   INTEGER NOT NULL,     -- node's wall clock
  kind    TEXT NOT NULL,        -- name of the event in channels.model
  body    TEXT NOT NULL,        -- JSON
  PRIMARY KEY (channel, entry)
) WITHOUT ROWID;
