"""The payer's side of a channel, without I/O."""
