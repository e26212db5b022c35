"""Everything here runs on both loops: the node serves on uvloop, and its transports differ in type and in closing."""

import asyncio

import uvloop


def pytest_asyncio_loop_factories():
    return {"asyncio": asyncio.new_event_loop, "uvloop": uvloop.new_event_loop}
