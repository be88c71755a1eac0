"""Proof: tools that look for what tests by example do not find. None of it is installed.

Each is a program of its own, `python -m proof.<name> --help`, that `make` runs as long as it is
told; `tests/` runs a short version of each.
"""
