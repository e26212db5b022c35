"""The wire forms of MPP: challenges, credentials, receipts, events."""
