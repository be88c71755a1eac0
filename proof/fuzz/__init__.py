"""Fuzzing: what a hostile caller, key, hook, client, server or file can say, by hypothesis.

Each target is a strategy and a check of one case that it makes. `make fuzz` goes round the targets
with fresh seeds as long as it is told; `tests/test_fuzz.py` runs each a few times, always the same.
"""
