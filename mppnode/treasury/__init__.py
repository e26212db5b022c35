"""Moving earned money on chain."""
