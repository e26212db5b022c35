"""Upstream inference APIs."""
