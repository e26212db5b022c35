"""Talking to a Tempo chain, and a development look-alike of one."""
