"""Who serves a request: rules that decide, and the picture of the providers' health they decide by."""
