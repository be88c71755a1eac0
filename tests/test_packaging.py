"""What a user installs: built from the source distribution, in an environment with nothing else.

In a run of the compiled core the wheel is the compiled one, in a run of the plain core the plain.
"""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
import tarfile
import tomllib
import zipfile
from collections.abc import Callable
from email.message import Message
from email.parser import HeaderParser
from pathlib import Path
from typing import Any

import pytest

import shardedflight

ROOT = Path(__file__).resolve().parent.parent
PROJECT: dict[str, Any] = tomllib.loads((ROOT / "pyproject.toml").read_text("utf-8"))["project"]

PIP = (sys.executable, "-m", "pip", "--disable-pip-version-check")

EXTENSION = f"_core{sysconfig.get_config_var('EXT_SUFFIX')}"
SOURCES = {
    path.relative_to(ROOT).as_posix()
    for path in (ROOT / "src" / "shardedflight").rglob("*")
    if path.is_file()
    and "__pycache__" not in path.parts
    and path.suffix not in {".so", ".pyd"}  # what `make` has compiled
}
# The rest of what a distribution is built from.
AROUND = {"LICENSE", "MANIFEST.in", "README.md", "pyproject.toml", "setup.py"}
INSTALLED = {name.removeprefix("src/") for name in SOURCES if not name.endswith(".pxd")}

PURE = {"SHARDEDFLIGHT_PURE": "1", "SHARDEDFLIGHT_REQUIRE_COMPILED": ""}
REQUIRED = {"SHARDEDFLIGHT_PURE": "", "SHARDEDFLIGHT_REQUIRE_COMPILED": "1"}
EITHER = {"SHARDEDFLIGHT_PURE": "", "SHARDEDFLIGHT_REQUIRE_COMPILED": ""}
AS_TESTED = REQUIRED if shardedflight.__compiled__ else PURE

pytestmark = [pytest.mark.around, pytest.mark.once]

# Microsoft's compiler is found without them.
needs_cc = pytest.mark.skipif(sys.platform == "win32", reason="CC names no compiler here")


def attempt(*command: str | Path, cwd: Path, **variables: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command,
        cwd=cwd,
        env={**os.environ, **AS_TESTED, **variables},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        check=False,
    )


def run(*command: str | Path, cwd: Path, **variables: str) -> str:
    """What the command printed; a failing one fails the test with all that it said."""
    done = attempt(*command, cwd=cwd, **variables)
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture
def checkout(tmp_path: Path) -> Path:
    return copy_checkout(tmp_path / "checkout")


def copy_checkout(target: Path) -> Path:
    for name in (*AROUND, *SOURCES):
        copy = target / name
        copy.parent.mkdir(parents=True, exist_ok=True)
        copy.write_bytes((ROOT / name).read_bytes())
    return target


def backend(call: str, target: Path, before: str = "pass") -> tuple[str, str, str]:
    """The command by which a frontend asks setuptools for a distribution."""
    target.mkdir(exist_ok=True)
    code = f"{before}; from setuptools import build_meta; build_meta.{call}({str(target)!r})"
    return (sys.executable, "-c", code)


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkout = copy_checkout(tmp_path_factory.mktemp("checkout"))
    target = tmp_path_factory.mktemp("sdist")
    run(*backend("build_sdist", target), cwd=checkout)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    # setuptools and Cython are part of the tests' environment, so that no index is asked for them.
    run(*PIP, "wheel", "--no-index", "--no-build-isolation", sdist, cwd=target)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def installed(wheel: Path, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., str]:
    """Runs a command with the Python of an environment that has the wheel and nothing else."""
    place = tmp_path_factory.mktemp("installed")
    environment = place / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=place)
    scripts = "Scripts" if sys.platform == "win32" else "bin"
    # No index, and no --no-deps either: a dependency would end this with an error.
    run(*PIP, "--python", environment, "install", "--no-index", wheel, cwd=place)

    def command(name: str, *arguments: str) -> str:
        return run(environment / scripts / name, *arguments, cwd=place)

    return command


@pytest.fixture(scope="module")
def metadata(wheel: Path) -> Message:
    with zipfile.ZipFile(wheel) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/METADATA"))
        return HeaderParser().parsestr(archive.read(name).decode())


def test_the_source_distribution_holds_what_the_build_needs(sdist: Path) -> None:
    with tarfile.open(sdist) as archive:
        names = {member.name.partition("/")[2] for member in archive if member.isfile()}
    names = {name for name in names if ".egg-info/" not in name}
    generated = {"PKG-INFO", "setup.cfg"}
    assert names - generated == {*SOURCES, *AROUND}


def names_in(wheel: Path) -> set[str]:
    with zipfile.ZipFile(wheel) as archive:
        return {name for name in archive.namelist() if ".dist-info/" not in name}


def test_the_wheel_holds_the_whole_package_and_nothing_else(wheel: Path) -> None:
    extensions = {f"shardedflight/{EXTENSION}"} if shardedflight.__compiled__ else set[str]()
    assert names_in(wheel) == INSTALLED | extensions
    assert wheel.name.endswith("-py3-none-any.whl") is not shardedflight.__compiled__
    assert {"shardedflight/py.typed", "shardedflight/_core.py"} <= INSTALLED
    with zipfile.ZipFile(wheel) as archive:
        licences = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
    assert len(licences) == 1


def test_the_metadata_says_what_the_project_is(metadata: Message) -> None:
    assert metadata["Name"] == "shardedflight"
    assert metadata["Version"] == PROJECT["version"]
    assert metadata["Requires-Python"] == ">=3.11"
    assert metadata["License-Expression"] == "MIT"
    assert metadata["Description-Content-Type"] == "text/markdown"


def test_only_extras_need_other_packages(metadata: Message) -> None:
    needed = metadata.get_all("Requires-Dist", [])
    assert needed, "the extras are missing"
    assert [need for need in needed if "extra ==" not in need] == []
    assert set(metadata.get_all("Provides-Extra", [])) == set(PROJECT["optional-dependencies"])


def test_the_public_surface_is_all(installed: Callable[..., str]) -> None:
    code = """if True:
        import json, shardedflight
        names = {name for name in vars(shardedflight) if not name.startswith("_")}
        print(json.dumps([sorted(names), shardedflight.__all__]))
    """
    names, public = json.loads(installed("python", "-I", "-c", code))
    # `exceptions` is there because its names were imported from it.
    assert set(names) - {"exceptions"} == set(public)
    assert public == list(shardedflight.__all__)


def test_importing_brings_in_the_standard_library_only(installed: Callable[..., str]) -> None:
    code = """if True:
        import sys
        before = set(sys.modules)
        import shardedflight
        new = {name: sys.modules[name] for name in set(sys.modules) - before}
        # Compiled modules share what Cython needs in modules that nobody imports: without a spec.
        print(*{name.partition(".")[0] for name in new if getattr(new[name], "__spec__", None)})
    """
    brought = set(installed("python", "-I", "-c", code).split())
    assert brought - set(sys.stdlib_module_names) == {"shardedflight"}


@pytest.mark.parametrize("command", [("python", "-I", "-m", "shardedflight"), ("shardedflight",)])
def test_help_needs_no_extra(command: tuple[str, ...], installed: Callable[..., str]) -> None:
    said = installed(*command, "--help")
    assert "demo" in said
    assert "bench" in said


# -- the suite, on what is installed --------------------------------------------------------------

SHORT = ["tests/test_compiled.py", "tests/test_go_scenarios.py", "tests/test_forget.py"]
# What else is about the checkout, and not about the package.
WHOLE = ["tests", "--ignore=tests/test_packaging.py", "--ignore=tests/test_docs.py"]


@pytest.mark.parametrize(
    "selection",
    [
        pytest.param(SHORT, id="short"),
        pytest.param(WHOLE, id="whole", marks=[pytest.mark.whole, pytest.mark.timeout(1200)]),
    ],
)
def test_the_suite_passes_where_only_the_wheel_is(
    selection: list[str], wheel: Path, tmp_path: Path
) -> None:
    environment = tmp_path / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment, cwd=tmp_path)
    python = environment / ("Scripts/python" if sys.platform == "win32" else "bin/python")
    run(*PIP, "--python", environment, "install", "--no-index", wheel, cwd=tmp_path)
    code = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(run(python, "-c", code, cwd=tmp_path).strip())
    # pytest and all else come from the environment of this run, but not the package: that is
    # found there by a .pth file, and those in a folder that a .pth file names are not read.
    (site / "packages.pth").write_text(sysconfig.get_path("purelib") + "\n", "utf-8")

    elsewhere = tmp_path / "elsewhere"
    for folder in ("proof", "tests"):
        shutil.copytree(ROOT / folder, elsewhere / folder)
    shutil.copytree(ROOT / "docs", elsewhere / "docs")
    shutil.copytree(ROOT / "examples", elsewhere / "examples")
    for path in (*ROOT.glob("*.md"), ROOT / "LICENSE", ROOT / "Makefile", ROOT / "pyproject.toml"):
        shutil.copy(path, elsewhere)

    said = run(python, "-m", "pytest", *selection, cwd=elsewhere, PYTHONPATH="")
    print(said)
    core = site / "shardedflight" / (EXTENSION if shardedflight.__compiled__ else "_core.py")
    assert f"core: {core}\n" in said  # see conftest.py
    assert " passed" in said


# -- where the core can not be compiled, or shall not be ------------------------------------------


def wheel_without_extension(
    checkout: Path, before: str = "pass", **variables: str
) -> tuple[str, str]:
    """Builds a wheel that has to be one for any Python. Returns its name and what was said."""
    done = attempt(*backend("build_wheel", checkout / "dist", before), cwd=checkout, **variables)
    assert done.returncode == 0, done.stderr
    (built,) = (checkout / "dist").iterdir()
    assert names_in(built) == INSTALLED
    with zipfile.ZipFile(built) as archive:
        (name,) = (name for name in archive.namelist() if name.endswith(".dist-info/WHEEL"))
        assert b"Root-Is-Purelib: true" in archive.read(name)
    return built.name.partition("-py3-")[2], done.stderr


def refusal(checkout: Path, **variables: str) -> str:
    """What a build said that has to fail."""
    done = attempt(*backend("build_wheel", checkout / "dist"), cwd=checkout, **variables)
    assert done.returncode != 0
    assert list(checkout.glob("dist/*.whl")) == []
    return done.stderr


NOTE = "*** ShardedFlight: the core could not be compiled ("


@needs_cc
def test_without_a_compiler_the_plain_files_are_built_and_a_note_says_so(checkout: Path) -> None:
    tag, said = wheel_without_extension(checkout, CC="no-such-compiler", **EITHER)
    assert tag == "none-any.whl"
    assert NOTE + "CompileError: " in said


def test_without_cython_the_plain_files_are_built_and_a_note_says_so(checkout: Path) -> None:
    blocked = "import sys; sys.modules['Cython'] = None"
    tag, said = wheel_without_extension(checkout, blocked, **EITHER)
    assert tag == "none-any.whl"
    assert NOTE + "ModuleNotFoundError: " in said


def test_the_variable_pure_compiles_nothing(checkout: Path) -> None:
    tag, said = wheel_without_extension(checkout, CC="no-such-compiler", **PURE)
    assert tag == "none-any.whl"
    assert "compiled" not in said


@needs_cc
def test_the_variable_require_compiled_makes_a_failing_compiler_an_error(checkout: Path) -> None:
    said = refusal(checkout, CC="false", **REQUIRED)
    assert "SHARDEDFLIGHT_REQUIRE_COMPILED is set, and the core could not be compiled (" in said


def test_variables_that_contradict_each_other_are_an_error(checkout: Path) -> None:
    said = refusal(checkout, **{**PURE, "SHARDEDFLIGHT_REQUIRE_COMPILED": "1"})
    assert "SHARDEDFLIGHT_PURE and SHARDEDFLIGHT_REQUIRE_COMPILED are both set" in said


@needs_cc
def test_an_editable_install_leaves_no_core_that_was_compiled_before(checkout: Path) -> None:
    old = checkout / "src" / "shardedflight" / EXTENSION
    old.write_bytes(b"compiled from an older file")
    run(
        *backend("build_editable", checkout / "dist"),
        cwd=checkout,
        CC="no-such-compiler",
        **EITHER,
    )
    assert not old.exists()
    assert list(checkout.glob("dist/*.whl"))
