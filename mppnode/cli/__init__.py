"""Commands; the only code that talks to a terminal."""
