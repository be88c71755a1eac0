"""The documents hold: README.md and docs/*.md are run, and their links lead somewhere.

- Each `python` block is a script of its own, so that a reader can copy one and run it. Where the
  line before the next `text` block is the word `prints`, that block is what the script prints.
- Each line of a `bash` block names a `make` target, a module, an option or an extra that exists.
- Each relative link leads to a file, and to a heading in it.
"""

import ast
import importlib.util
import os
import re
import shlex
import subprocess
import sys
import tomllib
from dataclasses import dataclass
from functools import cache
from itertools import chain
from pathlib import Path

import pytest

from shardedflight import ShardedFlight

ROOT = Path(__file__).resolve().parent.parent
RUNNABLE = [ROOT / "README.md", *sorted((ROOT / "docs").glob("**/*.md"))]
DOCUMENTS = sorted({*ROOT.glob("*.md"), *RUNNABLE})

# A block in any other language would go unchecked without anybody noticing. Those in braces are
# directives of Sphinx, which test_docs.py builds.
LANGUAGES = {"python", "bash", "text", "json", "toml"}
DIRECTIVES = {"{eval-rst}", "{include}", "{measured}", "{toctree}"}

FENCE = re.compile(r"(?P<indent> *)```(?P<language>[^`\n]*)")
LINK = re.compile(r"\[[^\]]*\]\((?P<target>[^)\s]+)\)")
HEADING = re.compile(r"#{1,6} +(?P<title>.+?)\s*$")


@dataclass(frozen=True)
class Block:
    """A fenced block: where it is, its language, what it says, and what it is said to print."""

    path: Path
    line: int
    language: str
    text: str
    prints: str | None

    def __str__(self) -> str:
        return f"{self.path.relative_to(ROOT)}:{self.line}"


def blocks_of(path: Path) -> list[Block]:
    """The fenced blocks of one document."""
    found: list[Block] = []
    prose: list[str] = []
    lines = iter(enumerate(path.read_text(encoding="utf-8").splitlines(), 1))
    for number, line in lines:
        opening = FENCE.fullmatch(line)
        if opening is None:
            if line.strip():
                prose.append(line.strip())
            continue
        indent, language = len(opening["indent"]), opening["language"].strip()
        body: list[str] = []
        for _, inner in lines:
            if inner.strip() == "```":
                break
            body.append(inner[indent:])
        else:
            raise AssertionError(f"{path}:{number}: this block does not end")
        text = "\n".join(body) + "\n"
        if language == "text" and prose == ["prints"] and found and found[-1].language == "python":
            script = found.pop()
            found.append(Block(path, script.line, "python", script.text, text))
        found.append(Block(path, number, language, text, None))
        prose = []
    return found


def prose_of(path: Path) -> list[str]:
    """The lines of one document that are in no fenced block."""
    inside = False
    found: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        if line.lstrip().startswith("```"):
            inside = not inside
        elif not inside:
            found.append(line)
    return found


def anchors_of(path: Path) -> set[str]:
    """The anchors that GitHub gives the headings of one document."""
    found: set[str] = set()
    for line in prose_of(path):
        heading = HEADING.fullmatch(line)
        if heading is None:
            continue
        slug = re.sub(r"[^\w\- ]", "", heading["title"].lower()).replace(" ", "-")
        repeated = sum(1 for known in found if re.fullmatch(re.escape(slug) + r"(-\d+)?", known))
        found.add(f"{slug}-{repeated}" if repeated else slug)
    return found


BLOCKS = [block for path in RUNNABLE for block in blocks_of(path)]


def environment() -> dict[str, str]:
    """This process's environment, in which a child finds the package and speaks UTF-8."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "PYTHONIOENCODING": "utf-8"}


@pytest.mark.parametrize("block", BLOCKS, ids=str)
def test_a_block_says_its_language(block: Block) -> None:
    assert block.language.partition(" ")[0] in LANGUAGES | DIRECTIVES


@pytest.mark.around
@pytest.mark.once
@pytest.mark.parametrize("block", [b for b in BLOCKS if b.language == "python"], ids=str)
def test_a_python_block_runs(block: Block, tmp_path: Path) -> None:
    for module in modules_wanted(block.text):
        if importlib.util.find_spec(module) is None:
            pytest.skip(f"it needs {module}, which is not installed here")
    script = tmp_path / "block.py"
    script.write_text(block.text, encoding="utf-8")
    run = subprocess.run(
        [sys.executable, "-W", "error", "-X", "faulthandler", str(script)],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        encoding="utf-8",
        env=environment(),
        timeout=60,
    )
    assert (run.returncode, run.stderr) == (0, "")
    if block.prints is not None:
        assert run.stdout == block.prints


def modules_wanted(code: str) -> set[str]:
    """The names of the packages that a script imports."""
    found: set[str] = set()
    for node in ast.walk(ast.parse(code)):
        if isinstance(node, ast.Import):
            found.update(alias.name.partition(".")[0] for alias in node.names)
        elif isinstance(node, ast.ImportFrom) and node.module is not None and node.level == 0:
            found.add(node.module.partition(".")[0])
    return found


def commands_of(block: Block) -> list[list[str]]:
    """The commands of a bash block, each as its words, comments left out."""
    lines = block.text.replace("\\\n", " ").splitlines()
    return [words for line in lines if (words := shlex.split(line, comments=True))]


COMMANDS = [
    pytest.param(command, id=f"{block}: {shlex.join(command)}")
    for block in BLOCKS
    if block.language == "bash"
    for command in commands_of(block)
]


@pytest.mark.parametrize("command", COMMANDS)
def test_a_command_exists(command: list[str]) -> None:
    match command:
        case ["make", *words]:
            targets = [word for word in words if "=" not in word]
            assert targets
            assert set(targets) <= make_targets()
            arguments = [word.removeprefix("ARGS=") for word in words if word.startswith("ARGS=")]
            for target in targets if arguments else []:
                assert target in {"demo", "bench", "test", "docs", "docs-links"}
                if target in {"demo", "bench"}:
                    options_exist(["shardedflight", target], shlex.split(arguments[0]))
        case ["python", "-m", "pip", "install", *what] | ["pip", "install", *what]:
            assert what
            for requirement in what:
                assert requirement in others() or set(extras_named(requirement)) <= extras()
        case ["python", "-m", module, *arguments]:
            options_exist([module], arguments)
        case ["shardedflight", subcommand, *arguments]:
            options_exist(["shardedflight", subcommand], arguments)
        case ["git", "clone", *_] | ["cd", _]:
            pass
        case _:
            raise AssertionError(f"nobody checks that this exists: {shlex.join(command)}")


@pytest.mark.parametrize("path", RUNNABLE, ids=lambda path: str(path.relative_to(ROOT)))
def test_targets_named_in_prose_exist(path: Path) -> None:
    named = re.findall(r"`make ([\w-]+)[^`]*`", "\n".join(prose_of(path)))
    assert set(named) <= make_targets()


@cache
def make_targets() -> set[str]:
    """The targets that the Makefile declares as commands."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    return set(
        re.findall(r"[\w-]+", "".join(re.findall(r"^\.PHONY:(.*)$", makefile, re.MULTILINE)))
    )


@cache
def extras() -> set[str]:
    """The extras that the project has."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    return set(project["optional-dependencies"])


@cache
def others() -> set[str]:
    """The packages of other projects that the extras name: the tests know that they work."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text(encoding="utf-8"))["project"]
    named = chain.from_iterable(project["optional-dependencies"].values())
    return {re.split(r"[^\w.-]", requirement, maxsplit=1)[0] for requirement in named}


def extras_named(requirement: str) -> list[str]:
    """The extras that a requirement of this project asks for."""
    match = re.fullmatch(r"(?:\.|shardedflight)(?:\[([\w,-]+)\])?", requirement)
    assert match is not None, f"not this project: {requirement}"
    return match[1].split(",") if match[1] else []


def options_exist(program: list[str], arguments: list[str]) -> None:
    """Fails unless `python -m program` knows the options among `arguments`."""
    options = [word.partition("=")[0] for word in arguments if word.startswith("--")]
    help_text = help_of(tuple(program))
    for option in options:
        assert re.search(re.escape(option) + r"\b", help_text), f"{program} has no {option}"


@cache
def help_of(program: tuple[str, ...]) -> str:
    """What the program says of itself."""
    run = subprocess.run(
        [sys.executable, "-m", *program, "--help"],
        capture_output=True,
        check=False,
        encoding="utf-8",
        env=environment(),
        timeout=60,
    )
    if run.returncode != 0 and "pip install" in run.stderr:
        pytest.skip(run.stderr.strip())
    assert run.returncode == 0, run.stderr
    return run.stdout


LINKS = [
    pytest.param(path, match["target"], id=f"{path.relative_to(ROOT)}: {match['target']}")
    for path in DOCUMENTS
    for line in prose_of(path)
    for match in LINK.finditer(re.sub(r"`[^`]*`", "", line))
    if not re.match(r"[a-z]+:", match["target"])
]


@pytest.mark.parametrize(("path", "target"), LINKS)
def test_a_link_leads_somewhere(path: Path, target: str) -> None:
    file, _, anchor = target.partition("#")
    destination = path if not file else (path.parent / file).resolve()
    assert destination.is_relative_to(ROOT)
    assert destination.exists()
    if anchor:
        assert anchor in anchors_of(destination)


def test_the_figures_are_of_the_benchmark_as_it_is() -> None:
    pytest.importorskip("rich", reason="the extra `bench` is not installed")
    from shardedflight.bench.benchmarks import benchmarks

    measured = {benchmark.what for benchmark in benchmarks(quick=False)}
    measured.add("`do`, leader, calls per second of all threads together")
    for path in (ROOT / "README.md", ROOT / "docs" / "performance.md"):
        tables = re.findall(
            r"^`python -m shardedflight\.bench.*\n\n((?:\|.*\n)+)",
            "\n".join(prose_of(path)),
            flags=re.MULTILINE,
        )
        for table in tables:
            shown = {line.split(" | ")[0].removeprefix("| ") for line in table.splitlines()[2:]}
            assert shown <= measured


@pytest.mark.skipif(
    getattr(sys, "_is_gil_enabled", lambda: True)(), reason="the number is of free-threaded builds"
)
def test_the_default_number_of_shards_is_the_documented_one() -> None:
    text = (ROOT / "docs" / "semantics.md").read_text(encoding="utf-8")
    documented = re.findall(r"(\d+) on a free-threaded build", text)
    assert documented == [str(ShardedFlight().shards)]
