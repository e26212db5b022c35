-- After accounts.sql. A third of each page stays empty, so that an update stays on its page (HOT).
ALTER TABLE credit SET (fillfactor = 70);
