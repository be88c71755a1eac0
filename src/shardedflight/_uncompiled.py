"""What `_core.py` asks of Cython when it is not compiled: no, it is not."""

compiled = False
