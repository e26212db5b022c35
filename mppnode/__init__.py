"""The inference node that is paid by the token."""
