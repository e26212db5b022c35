"""Customers without a channel: who is asking, what they may do, and how much of it. Decisions only, no I/O."""
