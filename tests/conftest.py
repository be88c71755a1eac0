"""What holds for every test.

pytest imports test modules by path (`--import-mode=importlib`), so they need no package and their
names may repeat; `pythonpath = ["tests"]` is what makes `from support import spawn` work in them.
A test has 120 seconds, then pytest-timeout prints the stacks of all threads and ends the run; if
not even that can run, faulthandler does it 30 seconds later. One that is marked to have longer is
left to pytest-timeout alone: what takes so long are processes of its own.
Every warning is an error, and so are exceptions that nobody could catch: in `__del__`, in a thread.
"""

import faulthandler
import os
import sys
import sysconfig
from collections.abc import Iterator
from pathlib import Path

import pytest
from hypothesis import HealthCheck, settings

import shardedflight
from shardedflight import _core

# How long an example takes depends on the machine: what hangs is ended by the timeout above.
settings.register_profile(
    "shardedflight",
    parent=settings(),
    deadline=None,
    suppress_health_check=[HealthCheck.too_slow],
)
settings.load_profile("shardedflight")

SRC = Path(__file__).resolve().parent.parent / "src"
FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))


def gil_is_on() -> bool:
    return not FREE_THREADED or sys._is_gil_enabled()  # type: ignore[attr-defined]


def pytest_report_header() -> str:
    core = "compiled" if shardedflight.__compiled__ else "plain"
    gil = "on" if gil_is_on() else "off"
    return f"CPython {sys.version.split()[0]}, GIL {gil}, {core} core: {_core.__file__}"


@pytest.hookimpl(tryfirst=True)
def pytest_runtest_setup(item: pytest.Item) -> None:
    if item.get_closest_marker("timeout") is not None:
        faulthandler.cancel_dump_traceback_later()


def is_set(variable: str) -> bool:
    return os.environ.get(variable, "") not in {"", "0"}


@pytest.fixture(scope="session", autouse=True)
def core_is_the_one_asked_for() -> None:
    """No test counts that ran on the other core, or on a compiled one older than its source."""
    core = Path(_core.__file__)
    assert (core.suffix != ".py") is shardedflight.__compiled__
    if is_set("SHARDEDFLIGHT_PURE"):
        assert not shardedflight.__compiled__, "SHARDEDFLIGHT_PURE is set, and the core compiled"
    if is_set("SHARDEDFLIGHT_REQUIRE_COMPILED"):
        assert shardedflight.__compiled__, "SHARDEDFLIGHT_REQUIRE_COMPILED is set: no compiled core"
    if shardedflight.__compiled__ and core.is_relative_to(SRC):
        for source in (core.with_name("_core.py"), core.with_name("_core.pxd")):
            assert source.stat().st_mtime <= core.stat().st_mtime, (
                f"{source.name} is newer than the compiled core: run make"
            )


@pytest.fixture(scope="session", autouse=True)
def gil_stays_off() -> Iterator[None]:
    """On a free-threaded build no test counts that ran with the GIL: an import may turn it on."""
    assert not FREE_THREADED or not gil_is_on(), "the GIL is on before the first test"
    yield
    assert not FREE_THREADED or not gil_is_on(), "something that the tests import turned the GIL on"
