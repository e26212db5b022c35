"""Money that comes through a payment processor, and what is told to those who pay it."""
