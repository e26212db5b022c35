"""Configuration read whole, checked whole, then frozen."""
