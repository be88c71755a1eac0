"""What the plain core has in place of the `cython` module.

Only Cython itself reads `import cython`, while it compiles. Where the core runs as Python, it finds
its names here, whether Cython is installed or not: so there is one plain core, not two.
"""

__all__ = ["compiled"]

#: Whether the module that asks was compiled. Cython puts True in its place.
compiled = False
