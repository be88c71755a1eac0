# C types of _core.py, for Cython alone: it reads this file beside the one that it compiles, and
# Python never does. What is not typed here is compiled as the Python that it is.
