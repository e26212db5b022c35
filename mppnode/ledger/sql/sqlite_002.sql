-- Holds have owners and requests have a time. The JSON in "holds" and in the journal is read in both forms (rows.py).
ALTER TABLE channel ADD COLUMN active_at INTEGER NOT NULL DEFAULT 0;                      -- when the last request began
ALTER TABLE channel ADD COLUMN live INTEGER NOT NULL DEFAULT 0 CHECK (live IN (0, 1));    -- has at least one hold
ALTER TABLE channel ADD COLUMN soft INTEGER NOT NULL DEFAULT 0 CHECK (soft IN (0, 1));    -- written by a relaxed commit
UPDATE channel SET live = 1 WHERE holds <> '{}';
