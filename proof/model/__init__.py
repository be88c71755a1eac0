"""The protocol of the Redis tier as a model, explored state by state: `python -m proof.model`.

- `server`: what the server holds, and each Lua script as a step; compared with the real scripts by
  tests/test_model.py.
- `protocol`: processes, callers, the adversary, and what has to hold.
- `checker`: explores any such model, and judges progress.
- `planted`: faults that the checker has to find.
- `spaces`: which scenarios are explored.
"""
