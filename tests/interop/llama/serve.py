"""Runs llama.cpp's own HTTP server on a model file until its standard input closes; prints its address.

A process of its own: the server's threads and its log have no place in the tests' process.
"""

from __future__ import annotations

import sys

import xllamacpp


def main(model: str) -> None:
    params = xllamacpp.CommonParams()
    params.model.path = model
    params.port = 0
    params.n_parallel = 2
    params.n_ctx = 512
    params.warmup = False
    params.cpuparams.n_threads = 1
    server = xllamacpp.Server(params)
    sys.stdout.write(f"{server.listening_address}\n")
    sys.stdout.flush()
    sys.stdin.read()


if __name__ == "__main__":
    main(sys.argv[1])
