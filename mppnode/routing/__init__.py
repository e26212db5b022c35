"""Which provider serves a request."""
