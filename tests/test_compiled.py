"""The two forms of the core: which one runs, and that callers see no difference.

That both do the same is what all the other tests are for, which run on each.
"""

import json
import os
import subprocess
import sys
import sysconfig
from pathlib import Path
from typing import Any

import pytest

from shardedflight import _core

FREE_THREADED = bool(sysconfig.get_config_var("Py_GIL_DISABLED"))
EXTENSION = Path(_core.__file__).with_name(f"_core{sysconfig.get_config_var('EXT_SUFFIX')}")

needs_both = pytest.mark.skipif(not EXTENSION.exists(), reason="the core is not compiled here")


def said_by(code: str, *options: str, **variables: str) -> Any:
    """What a new interpreter prints as JSON: one that has imported nothing yet."""
    without = {"SHARDEDFLIGHT_PURE", "SHARDEDFLIGHT_REQUIRE_COMPILED", "PYTHON_GIL"}
    kept = {name: value for name, value in os.environ.items() if name not in without}
    done = subprocess.run(
        [sys.executable, "-W", "error", *options, "-c", "import json, sys\n" + code],
        env={**kept, **variables},
        capture_output=True,
        check=False,
        encoding="utf-8",
        timeout=60,
    )
    assert (done.returncode, done.stderr) == (0, "")
    return json.loads(done.stdout)


FORM = """
import shardedflight
from shardedflight import _core
print(json.dumps([shardedflight.__compiled__, _core.__file__]))
"""


def test_the_plain_core_runs_where_it_is_asked_for() -> None:
    compiled, file = said_by(FORM, SHARDEDFLIGHT_PURE="1")
    assert not compiled
    assert Path(file) == EXTENSION.with_name("_core.py")


@needs_both
@pytest.mark.parametrize(
    "variables", [{}, {"SHARDEDFLIGHT_PURE": ""}, {"SHARDEDFLIGHT_PURE": "0"}], ids=str
)
def test_the_compiled_core_runs_where_nothing_is_asked_for(variables: dict[str, str]) -> None:
    compiled, file = said_by(FORM, **variables)
    assert compiled
    assert Path(file) == EXTENSION


@pytest.mark.parametrize("pure", ["", "1"])
def test_there_is_one_core_and_all_modules_have_it(pure: str) -> None:
    code = """
import shardedflight, shardedflight._core as core
from shardedflight import _deadlock, _flight, _many
print(json.dumps([
    shardedflight._core is core is sys.modules["shardedflight._core"],
    core.__spec__.name, core.__package__,
    {m.__name__: m.Core is core.Core for m in (_deadlock, _flight)},
    issubclass(shardedflight.ShardedFlight, core.Core),
]))
"""
    assert said_by(code, SHARDEDFLIGHT_PURE=pure) == [
        True,
        "shardedflight._core",
        "shardedflight",
        {"shardedflight._deadlock": True, "shardedflight._flight": True},
        True,
    ]


@pytest.mark.parametrize("pure", ["", "1"])
def test_cython_is_not_imported_where_it_is_installed(pure: str) -> None:
    code = "import shardedflight; print(json.dumps(sorted({*sys.modules} & {'cython', 'Cython'})))"
    assert said_by(code, SHARDEDFLIGHT_PURE=pure) == []


@needs_both
@pytest.mark.untraced
@pytest.mark.parametrize("imported", [True, False], ids=["imported", "not imported"])
@pytest.mark.parametrize("isolated", [True, False], ids=["isolated", "as mod_wsgi's"])
def test_one_interpreter_of_a_process_has_the_compiled_core(imported: bool, isolated: bool) -> None:
    """The first one that can load what Cython makes: the others have the plain core."""
    if isolated and not imported and sys.version_info[:2] == (3, 12):
        pytest.skip("CPython 3.12.1 crashes if such a one has imported asyncio first")
    code = f"""
import tempfile
try:
    import _interpreters as interpreters
    made = interpreters.create("isolated" if {isolated} else "legacy")
except ImportError:
    import _xxsubinterpreters as interpreters
    made = interpreters.create(isolated={isolated})
if {imported}:
    import shardedflight
with tempfile.NamedTemporaryFile("r+") as said:
    failed = interpreters.run_string(made, '''
import json, sys
sys.path[:] = {{0!r}}
from shardedflight import ShardedFlight, __compiled__
with open({{1!r}}, "w") as file:
    json.dump([__compiled__, ShardedFlight().do(lambda: "value", "k")], file)
'''.format(sys.path, said.name))
    assert failed is None, failed
    found = json.load(said)
import shardedflight
interpreters.destroy(made)
print(json.dumps([shardedflight.__compiled__, *found]))
"""
    here, there, outcome = said_by(code)
    assert (here, there) == (True, False) or (not imported and (here, there) == (False, True))
    assert outcome == ["value", False]


@pytest.mark.skipif(not FREE_THREADED, reason="this interpreter has its GIL for good")
@pytest.mark.parametrize("pure", ["", "1"])
def test_importing_the_package_leaves_the_gil_off(pure: str) -> None:
    code = """
import shardedflight
print(json.dumps([shardedflight.__compiled__, sys._is_gil_enabled()]))
"""
    assert said_by(code, SHARDEDFLIGHT_PURE=pure) == [not pure and EXTENSION.exists(), False]


@needs_both
def test_what_callers_see_of_a_method_is_the_same() -> None:
    code = """
import inspect
from shardedflight import ShardedFlight

found = {}
for name, method in inspect.getmembers(ShardedFlight, inspect.isroutine):
    if not name.startswith("_"):
        parameters = inspect.signature(method).parameters.values()
        found[method.__qualname__] = [
            [[p.name, p.kind, repr(p.default)] for p in parameters],
            sorted(method.__annotations__),
            inspect.cleandoc(method.__doc__),
        ]
print(json.dumps(found))
"""
    compiled = said_by(code)
    assert "Core.do" in compiled
    assert compiled == said_by(code, SHARDEDFLIGHT_PURE="1")
