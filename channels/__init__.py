"""Payment channels without I/O: identifiers, vouchers, wire codecs, the account and payer state machines."""
