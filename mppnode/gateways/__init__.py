"""Payment companies we talk to and hear from, as adapters that keep no books."""
