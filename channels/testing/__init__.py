"""Doubles that enforce the rules of the world they stand in for."""
