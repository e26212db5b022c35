"""What a stream has consumed so far."""
