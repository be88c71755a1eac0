"""The documentation: it builds without a warning, has every public name, and draws what happens.

What its code does is tested in test_readme.py.
"""

import importlib
import importlib.util
import inspect
import json
import os
import pkgutil
import re
import shutil
import subprocess
import sys
import zlib
from collections.abc import Iterator
from pathlib import Path
from types import ModuleType

import pytest

import shardedflight

ROOT = Path(__file__).resolve().parent.parent
DOCS = ROOT / "docs"

#: What one build of the pages tells is the same for both cores and for every interpreter.
builds_pages = [
    pytest.mark.once,
    pytest.mark.skipif(shardedflight.__compiled__, reason="the plain core's run builds the pages"),
]


def build(source: Path, target: Path) -> subprocess.CompletedProcess[str]:
    """Builds the pages as `make docs` does; its standard error has the warnings."""
    pytest.importorskip("sphinx", reason="the extra `docs` is not installed")
    sphinx = [sys.executable, "-m", "sphinx", "-W", "--keep-going", "-q", "-b", "html"]
    return subprocess.run(
        [*sphinx, "-d", str(target / "doctrees"), str(source), str(target / "html")],
        capture_output=True,
        check=False,
        encoding="utf-8",
        timeout=110,
    )


@pytest.fixture(scope="module")
def pages(tmp_path_factory: pytest.TempPathFactory) -> Path:
    target = tmp_path_factory.mktemp("pages")
    done = build(DOCS, target)
    assert (done.returncode, done.stderr) == (0, "")
    return target / "html"


def public_modules() -> Iterator[ModuleType]:
    """The modules whose names users may use: not the programs, and none with an underscore."""
    yield shardedflight
    for found in pkgutil.walk_packages(shardedflight.__path__, "shardedflight."):
        first, *rest = found.name.split(".")[1:]
        if first in {"__main__", "bench", "demo"} or any(n.startswith("_") for n in (first, *rest)):
            continue
        yield importlib.import_module(found.name)


def public_names() -> Iterator[str]:
    """Every public name by the path under which it is documented."""
    reexported = {id(vars(shardedflight)[name]) for name in shardedflight.__all__}
    for module in public_modules():
        for name in getattr(module, "__all__", ()):
            value = getattr(module, name)
            if module is not shardedflight and id(value) in reexported:
                continue  # exceptions.py: they are documented where users import them
            yield f"{module.__name__}.{name}"
            if inspect.isclass(value):
                for member in vars(value):
                    found = getattr(value, member)
                    if not member.startswith("_") and (
                        callable(found) or isinstance(found, property)
                    ):
                        yield f"{module.__name__}.{name}.{member}"


def documented(pages: Path) -> set[str]:
    """The names in the inventory that Sphinx leaves for others to link to."""
    *_, packed = (pages / "objects.inv").read_bytes().split(b"\n", 4)
    entries = (line.split(" ") for line in zlib.decompress(packed).decode().splitlines())
    return {name for name, role, *_ in entries if role.startswith("py:")}


def in_pages(test: object) -> object:
    for mark in builds_pages:
        test = mark(test)
    return test


@in_pages
def test_the_pages_build_without_a_warning(pages: Path) -> None:
    assert (pages / "index.html").exists()


@in_pages
def test_every_public_name_is_in_the_reference(pages: Path) -> None:
    assert set(public_names()) - documented(pages) == set()


@in_pages
def test_a_page_asks_no_other_site_for_anything(pages: Path) -> None:
    """Scripts, styles, pictures, fonts: the pages are read on machines without the internet."""
    for page in pages.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        assert 'src="http' not in text
        assert 'src="//' not in text
        hrefs = re.findall(r'<link [^>]*href="([^"]*)"', text)
        assert [href for href in hrefs if "//" in href] == []


def one_page(source: Path, text: str) -> Path:
    """Documents with the configuration of ours and one page."""
    shutil.copytree(DOCS, source, ignore=shutil.ignore_patterns("*.md", "measured"))
    conf = (source / "conf.py").read_text("utf-8")
    conf = conf.replace("HERE.parent", f"Path({str(ROOT)!r})")
    (source / "conf.py").write_text(conf, encoding="utf-8")
    (source / "index.md").write_text(text, encoding="utf-8")
    return source


@in_pages
def test_a_broken_link_is_not_overlooked(tmp_path: Path) -> None:
    source = one_page(tmp_path / "docs", "# Begin\n\n[nowhere](nowhere.md) [gone](#gone)\n")
    done = build(source, tmp_path)
    assert done.returncode != 0
    assert "nowhere" in done.stderr
    assert "gone" in done.stderr


@in_pages
def test_what_the_benchmark_keeps_is_shown(tmp_path: Path) -> None:
    pytest.importorskip("rich", reason="the extra `bench` is not installed")
    source = one_page(tmp_path / "docs", "# Plots\n\n```{measured}\n```\n")
    kept = source / "measured" / "a run"
    bench = ["--quick", "--only", "do", "--without", "peers", "--keep", str(kept)]
    subprocess.run(
        [sys.executable, "-m", "shardedflight.bench", *bench],
        check=True,
        capture_output=True,
        env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
        timeout=110,
    )
    done = build(source, tmp_path)
    assert (done.returncode, done.stderr) == (0, "")
    page = (tmp_path / "html" / "index.html").read_text(encoding="utf-8")
    around = json.loads((kept / "figures.json").read_text(encoding="utf-8"))["surroundings"]
    assert around["python"] in page
    assert list((tmp_path / "html" / "_images").glob("ratios*.png"))


def test_the_diagrams_are_what_happens() -> None:
    spec = importlib.util.spec_from_file_location("diagrams", DOCS / "diagrams.py")
    assert spec is not None
    assert spec.loader is not None
    sys.modules[spec.name] = diagrams = importlib.util.module_from_spec(spec)
    try:
        spec.loader.exec_module(diagrams)
        drawn = diagrams.pictures()
    finally:
        del sys.modules[spec.name]
    kept = {path.name: path.read_text("utf-8") for path in (DOCS / "diagrams").iterdir()}
    assert drawn == kept, "run `python docs/diagrams.py`, and look at what has changed"
