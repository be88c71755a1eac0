"""Compiles the core where that is possible. All else about the project is in pyproject.toml.

`src/shardedflight/_core.py` is Python; Cython makes an extension module of it, with the C types of
`_core.pxd`, and it is installed beside the plain file. A compiler that is missing or fails costs
speed and nothing else, so the plain files are built then, and a note says so. Two variables of the
environment, set to anything but `0`, ask for something else, in the way of SQLAlchemy's setup.py:

- `SHARDEDFLIGHT_REQUIRE_COMPILED`: what can not be compiled is an error,
- `SHARDEDFLIGHT_PURE`: nothing is compiled to begin with.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CORE = Extension("shardedflight._core", ["src/shardedflight/_core.py"])

DIRECTIVES = {
    "language_level": "3",
    # It needs no GIL, so importing it leaves the GIL off where it is.
    "freethreading_compatible": True,
    # Methods are Python's to all who look: they bind, and have signatures, defaults, annotations.
    "binding": True,
    # Annotations speak to type checkers; `_core.pxd` speaks to the C compiler. As C types, `float`
    # would refuse what is no float and `dict` every subclass: other rules than those of the file.
    "annotation_typing": False,
}


def is_set(variable: str) -> bool:
    """Whether the environment has the variable, neither empty nor `0`."""
    return os.environ.get(variable, "") not in {"", "0"}


PURE = is_set("SHARDEDFLIGHT_PURE")
REQUIRE_COMPILED = is_set("SHARDEDFLIGHT_REQUIRE_COMPILED")


class CompileCore(build_ext):
    """Makes C of Python in the build folder and compiles it, or else leaves no extension at all."""

    def run(self) -> None:
        """Compiles all there is to compile, which is the core."""
        for extension in self.extensions:
            # With `pip install --editable` it is in src: an old one would hide the new file.
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        try:
            super().run()
        except Exception as error:
            why = f"the core could not be compiled ({type(error).__name__}: {error})"
            if REQUIRE_COMPILED:
                sys.exit(f"SHARDEDFLIGHT_REQUIRE_COMPILED is set, and {why}")
            # Found among all that a compiler says; pip shows it with -v.
            sys.stderr.write(
                f"\n*** ShardedFlight: {why}.\n"
                "*** The plain Python files are installed: they do the same, slower.\n\n"
            )
            self.extensions = []
            self.distribution.ext_modules = []
            # It looked for extensions before they were built.
            self.get_finalized_command("bdist_wheel").root_is_pure = True

    def build_extension(self, ext: Extension) -> None:
        """Compiles one extension."""
        from Cython.Build import cythonize

        (generated,) = cythonize(
            [ext], build_dir=self.build_temp, compiler_directives=DIRECTIVES, force=True
        )
        ext.sources = generated.sources
        super().build_extension(ext)


if PURE and REQUIRE_COMPILED:
    sys.exit(
        "SHARDEDFLIGHT_PURE and SHARDEDFLIGHT_REQUIRE_COMPILED are both set: "
        "unset the one that is not meant."
    )
setup(ext_modules=[] if PURE else [CORE], cmdclass={"build_ext": CompileCore})
