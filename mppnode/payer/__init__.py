"""Drivers of the payer state machine. Imports channels/ only."""
