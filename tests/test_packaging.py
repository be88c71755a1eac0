"""What a user installs: built from the source distribution, in an environment with nothing else."""

import json
import subprocess
import sys
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


def run(*command: str | Path, cwd: Path) -> str:
    """What the command printed; a failing one fails the test with all that it said."""
    done = subprocess.run(
        command, cwd=cwd, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, f"{command}\n{done.stdout}\n{done.stderr}"
    return done.stdout


@pytest.fixture(scope="module")
def sdist(tmp_path_factory: pytest.TempPathFactory) -> Path:
    checkout = tmp_path_factory.mktemp("checkout")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        (checkout / name).write_bytes((ROOT / name).read_bytes())
    for path in (ROOT / "src" / "shardedflight").rglob("*"):
        if path.is_file() and "__pycache__" not in path.parts:
            copy = checkout / path.relative_to(ROOT)
            copy.parent.mkdir(parents=True, exist_ok=True)
            copy.write_bytes(path.read_bytes())
    target = tmp_path_factory.mktemp("sdist")
    code = f"from setuptools import build_meta; build_meta.build_sdist({str(target)!r})"
    run(sys.executable, "-c", code, cwd=checkout)
    (built,) = target.iterdir()
    return built


@pytest.fixture(scope="module")
def wheel(sdist: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("wheel")
    # setuptools is part of the tests' environment, so that no index is asked for it.
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


def test_the_wheel_is_pure_and_holds_the_whole_package(wheel: Path) -> None:
    source = ROOT / "src"
    expected = {
        path.relative_to(source).as_posix()
        for path in (source / "shardedflight").rglob("*")
        if path.is_file() and "__pycache__" not in path.parts
    }
    with zipfile.ZipFile(wheel) as archive:
        names = {name for name in archive.namelist() if ".dist-info/" not in name}
        licences = [name for name in archive.namelist() if name.endswith("/licenses/LICENSE")]
    assert wheel.name.endswith("-py3-none-any.whl")
    assert names == expected
    assert "shardedflight/py.typed" in names
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
        print(*sorted({name.partition(".")[0] for name in set(sys.modules) - before}))
    """
    brought = set(installed("python", "-I", "-c", code).split())
    assert brought - set(sys.stdlib_module_names) == {"shardedflight"}


@pytest.mark.parametrize("command", [("python", "-I", "-m", "shardedflight"), ("shardedflight",)])
def test_help_needs_no_extra(command: tuple[str, ...], installed: Callable[..., str]) -> None:
    said = installed(*command, "--help")
    assert "demo" in said
    assert "bench" in said
