"""Surfaces: bytes to engine calls and back."""
