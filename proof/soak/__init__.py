"""Soak: every method at once from threads, event loops and processes, for as long as it is told.

`python -m proof.soak --help`. The modules, each importing from those above it only:

    keys       the keys, and what functions do
    mix        one window: callers of all kinds on one flight, recorded as a history
    tally      what `stats()` has to say of a history
    census     what a process has: threads, descriptors, memory
    worker     a process of the soak
    __main__   the program: starts the workers, merges what they saw, prints
"""
