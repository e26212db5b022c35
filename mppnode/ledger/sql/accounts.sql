-- Accounts, API keys, credits, usage: SQLite's schema 3 and PostgreSQL's schema 2. Amounts are pico-dollars in 64 bits: the
-- machine keeps them below 4 million dollars (channels/credit.py). Every statement on these tables is written once (talk.py).
CREATE TABLE account (
  id         TEXT PRIMARY KEY,
  trust      TEXT NOT NULL UNIQUE,      -- the name X-Trust and tokens call it by
  customer   TEXT UNIQUE,               -- at the payment processor
  document   TEXT NOT NULL,             -- JSON: everything else (accounts/documents.py)
  created_ms BIGINT NOT NULL
);

CREATE TABLE api_key (
  id         TEXT PRIMARY KEY,
  account    TEXT NOT NULL,
  digest     TEXT NOT NULL UNIQUE,      -- SHA-256 of the key in hex; the key itself is nowhere
  ended      SMALLINT NOT NULL CHECK (ended IN (0, 1)),  -- revoked, so it counts no more
  document   TEXT NOT NULL,
  created_ms BIGINT NOT NULL
);
CREATE INDEX api_key_account ON api_key (account, id);
CREATE INDEX api_key_usable ON api_key (id) WHERE ended = 0;

-- One row per account, written by channels/credit.py alone.
CREATE TABLE credit (
  id             TEXT PRIMARY KEY,
  version        BIGINT NOT NULL,       -- number of journal entries folded into this row
  access         BIGINT NOT NULL,       -- changes of its keys and settings
  prepaid        BIGINT NOT NULL,       -- paid in and not taken back, without what invoices brought
  invoiced       BIGINT NOT NULL,
  overdraft      BIGINT NOT NULL,       -- how much may be owed
  owed           BIGINT NOT NULL,       -- charged for delivered work
  held           BIGINT NOT NULL,       -- reserved by live requests
  reported_micro BIGINT NOT NULL,       -- usage reported to be billed, in millionths of a dollar
  charged_at     BIGINT NOT NULL,       -- s
  holds          TEXT NOT NULL,         -- JSON: hold -> granted, consumed, key, owner
  spending       TEXT NOT NULL,         -- JSON: key -> day, month, spent in each and for good
  paces          TEXT NOT NULL,         -- JSON: key -> what the rate limiter keeps
  live           SMALLINT NOT NULL CHECK (live IN (0, 1)),  -- has at least one hold
  CHECK (owed >= 0 AND held >= 0)
);
CREATE INDEX credit_live ON credit (id) WHERE live = 1;
CREATE INDEX credit_postpaid ON credit (id) WHERE overdraft > 0;

-- Append only. Folding an account's entries in order rebuilds its row.
CREATE TABLE credit_journal (
  account TEXT NOT NULL,
  entry   BIGINT NOT NULL,              -- equals credit.version after this event
  at_ms   BIGINT NOT NULL,
  kind    TEXT NOT NULL,                -- name of the event in channels.credit
  body    TEXT NOT NULL,                -- JSON
  PRIMARY KEY (account, entry)
);

-- What a customer sees of it: money in, money out, and what each request cost.
CREATE TABLE entry (
  account   TEXT NOT NULL,
  seq       BIGINT NOT NULL,            -- credit.version after it
  at_ms     BIGINT NOT NULL,
  kind      TEXT NOT NULL,
  amount    BIGINT NOT NULL,            -- signed
  reference TEXT NOT NULL,
  balance   BIGINT NOT NULL,            -- after it
  PRIMARY KEY (account, seq)
);

-- What is known of each payment (channels/payment.py), and which announcements have been taken in.
CREATE TABLE payment (
  id       TEXT PRIMARY KEY,
  account  TEXT NOT NULL,
  document TEXT NOT NULL,
  at_ms    BIGINT NOT NULL
);
CREATE INDEX payment_account ON payment (account, id);
CREATE TABLE heard (
  id    TEXT PRIMARY KEY,
  at_ms BIGINT NOT NULL
);

-- One row per request an account has paid for, written with its bill.
CREATE TABLE request (
  id         TEXT PRIMARY KEY,
  account    TEXT NOT NULL,
  api_key    TEXT NOT NULL,             -- empty for a token
  at_ms      BIGINT NOT NULL,
  model      TEXT NOT NULL,
  provider   TEXT NOT NULL,
  cost       BIGINT NOT NULL,
  prompt     BIGINT NOT NULL,
  cached     BIGINT NOT NULL,
  completion BIGINT NOT NULL,
  reasoning  BIGINT NOT NULL,
  document   TEXT NOT NULL
);
CREATE INDEX request_account ON request (account, at_ms, id);

-- Answers kept for repeats of the same request. An answer that is still being made belongs to a life of a node.
CREATE TABLE idempotency (
  scope    TEXT NOT NULL,               -- whose request
  name     TEXT NOT NULL,               -- the Idempotency-Key, digested
  body     TEXT NOT NULL,               -- digest of what was asked
  owner    TEXT NOT NULL,               -- node.id while it is being made, then empty
  answer   TEXT NOT NULL,               -- JSON, then
  at_ms    BIGINT NOT NULL,
  PRIMARY KEY (scope, name)
);
CREATE INDEX idempotency_at ON idempotency (at_ms);

-- What is to be done outside, written with what is its reason, and done at least once.
CREATE TABLE outbox (
  id         TEXT PRIMARY KEY,
  kind       TEXT NOT NULL,
  account    TEXT NOT NULL,
  state      TEXT NOT NULL CHECK (state IN ('due', 'done', 'parked')),
  due_ms     BIGINT NOT NULL,
  version    BIGINT NOT NULL,
  document   TEXT NOT NULL,
  created_ms BIGINT NOT NULL
);
CREATE INDEX outbox_due ON outbox (kind, due_ms) WHERE state = 'due';
CREATE INDEX outbox_parked ON outbox (kind, created_ms) WHERE state = 'parked';
CREATE INDEX outbox_account ON outbox (account, kind, created_ms);
