"""Compiles the core where that is possible. All else about the project is in pyproject.toml.

`src/shardedflight/_core.py` is Python; Cython makes an extension module of it, with the C types of
`_core.pxd`, and it is installed beside the plain file. Three outcomes are wanted, so two variables
of the environment, set to anything but `0`, decide what a compiler that is missing or fails means:

- neither is set: the plain files are installed, and a note says so,
- `SHARDEDFLIGHT_REQUIRE_COMPILED`: the build fails,
- `SHARDEDFLIGHT_PURE`: nothing is compiled to begin with.

What is not compiled is built as a wheel for any Python, so setuptools has to know before it begins
that there will be no extension: a build that failed is begun again without one. That, and the
variables, are the ways of SQLAlchemy's setup.py.
"""

import os
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext

CORE = Extension(
    "shardedflight._core",
    ["src/shardedflight/_core.py"],
    # For the source distribution: Cython finds it by itself.
    depends=["src/shardedflight/_core.pxd"],
)

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


class NotCompiledError(Exception):
    """There is no extension, for whatever reason."""


class CompileCore(build_ext):
    """Makes C of Python in the build folder, compiles it, and leaves nothing old behind."""

    def run(self) -> None:
        """Compiles all there is to compile, which is the core."""
        for extension in self.extensions:
            # With `pip install --editable` it is in src: an old one would hide the new file.
            Path(self.get_ext_fullpath(extension.name)).unlink(missing_ok=True)
        try:
            super().run()
        except Exception as error:
            raise NotCompiledError(f"{type(error).__name__}: {error}") from error

    def build_extension(self, ext: Extension) -> None:
        """Compiles one extension."""
        from Cython.Build import cythonize

        (generated,) = cythonize(
            [ext], build_dir=self.build_temp, compiler_directives=DIRECTIVES, force=True
        )
        ext.sources = generated.sources
        super().build_extension(ext)


def is_set(variable: str) -> bool:
    """Whether the environment has the variable, neither empty nor `0`."""
    return os.environ.get(variable, "") not in {"", "0"}


def build() -> None:
    """Runs setuptools, with the extension or without."""
    pure = is_set("SHARDEDFLIGHT_PURE")
    required = is_set("SHARDEDFLIGHT_REQUIRE_COMPILED")
    if pure and required:
        sys.exit(
            "SHARDEDFLIGHT_PURE and SHARDEDFLIGHT_REQUIRE_COMPILED are both set: "
            "unset the one that is not meant."
        )
    if not pure:
        try:
            setup(ext_modules=[CORE], cmdclass={"build_ext": CompileCore})
        except NotCompiledError as error:
            if required:
                sys.exit(
                    "The core could not be compiled, which SHARDEDFLIGHT_REQUIRE_COMPILED demands: "
                    f"{error}"
                )
            note(f"The core could not be compiled ({error}).")
        else:
            return
    note("The plain Python files are built, without the compiled core: they do the same, slower.")
    setup()


def note(text: str) -> None:
    """Says something that is found among all that a compiler says. pip shows it with -v."""
    sys.stderr.write(f"\n*** ShardedFlight: {text}\n\n")


build()
