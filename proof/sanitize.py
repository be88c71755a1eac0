"""The compiled core under AddressSanitizer, UndefinedBehaviorSanitizer and ThreadSanitizer.

The core is compiled anew with a sanitizer, in a folder of its own, and runs there: `proof.churn`
for some seconds and, for addresses and undefined behaviour, a selection of the tests. What the
sanitizer reports of the core's own code is a finding. Then each planted fault (an edited copy of
`_core.pxd`) is compiled as well and has to be found, which shows that the rest was looked at. What
is looked for depends on the interpreter, this one or that of `--python`, which needs nothing
installed:

- *address*: AddressSanitizer and UndefinedBehaviorSanitizer in one build, on an interpreter with a
  GIL, whose own allocator is switched off, so that every object is a block that they watch; and at
  the end LeakSanitizer, of which the blocks count that were allocated by way of the core.
- *thread*: ThreadSanitizer, on a free-threaded interpreter. If that was itself configured with
  `--with-thread-sanitizer`, all that the core reads and writes is looked at. Otherwise the
  sanitizer does not see the interpreter's mutexes, nor that an object's memory was freed and is
  another's now; so what the core locks is announced to it, and only reports about the lines count,
  the core's own memory, which is where it does without the interpreter.
- *references*: on a debug build of CPython (configured with `--with-pydebug`), which counts all
  references there are, `proof.references` without any sanitizer.

Blind to: what the churn and the tests do not do; races in Python code, which is the interpreter's
to run; without an instrumented interpreter, races on Python objects; memory that is wrongly used
inside of a block. On a free-threaded interpreter memory can not be looked at, for it has its
objects in an allocator that AddressSanitizer does not know.
"""

import argparse
import ast
import json
import os
import re
import shlex
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parent.parent

#: How many bits of an address the kernel draws.
RANDOM_BITS = Path("/proc/sys/vm/mmap_rnd_bits")

#: What is run under the sanitizers for addresses and undefined behaviour: all that the core does.
TESTS = (
    *("test_leading.py", "test_races.py", "test_lost_leader.py", "test_leaving.py"),
    *("test_forget.py", "test_errors.py", "test_many.py", "test_attack.py", "test_one_hash.py"),
    *("test_stats.py", "test_references.py", "test_go_scenarios.py"),
)

#: Put before the core's C, where the interpreter is not instrumented. Lines have memory that the
#: sanitizer sees, under a name that its reports tell. What is locked is announced to it, and that
#: whoever gets at lines has seen them made: how that came about is in the interpreter.
ANNOUNCED = """
#ifndef PY_SSIZE_T_CLEAN
#define PY_SSIZE_T_CLEAN
#endif
#include <Python.h>
#include <stdlib.h>
void __tsan_acquire(void *address);
void __tsan_release(void *address);
static char made, left;
static inline void announced_lock(PyMutex *mutex) {
    PyMutex_Lock(mutex);
    __tsan_acquire(mutex);
    __tsan_acquire(&made);
}
static inline void announced_unlock(PyMutex *mutex) {
    __tsan_release(mutex);
    __tsan_release(&left);
    PyMutex_Unlock(mutex);
}
__attribute__((noinline)) static void *memory_of_lines(size_t count, size_t size) {
    return calloc(count, size);
}
/* Lines are made when they are first needed, by whoever comes first. */
static inline int announced_publish(void *place, void *none, void *block) {
    __tsan_release(&made);
    return _Py_atomic_compare_exchange_ptr(place, none, block);
}
/* Whoever drops lines comes after all others: who that is is in the interpreter. */
static PyCapsule_Destructor drop_lines;
static void announced_drop(PyObject *capsule) {
    __tsan_acquire(&left);
    drop_lines(capsule);
}
static inline PyObject *announced_new(void *lines, const char *name, PyCapsule_Destructor drop) {
    __tsan_release(&made);
    if (drop == NULL) /* one of Cython's own */
        return PyCapsule_New(lines, name, drop);
    drop_lines = drop;
    return PyCapsule_New(lines, name, announced_drop);
}
static inline void *announced_get(PyObject *capsule, const char *name) {
    __tsan_acquire(&made);
    return PyCapsule_GetPointer(capsule, name);
}
#undef PyMutex_Lock
#undef PyMutex_Unlock
#define PyMutex_Lock announced_lock
#define PyMutex_Unlock announced_unlock
#define _Py_atomic_compare_exchange_ptr announced_publish
#define PyCapsule_New announced_new
#define PyCapsule_GetPointer announced_get
#define PyMem_RawCalloc memory_of_lines
/* Who is the last to use lines is in the interpreter too, so they stay. */
#define PyMem_RawFree(lines) ((void)(lines))
"""


#: Taking a line's lock and giving it back.
LOCKING = r"\b(?:un)?lock\(&line\.mutex\)"


class Lacking(Exception):
    """Something that is needed is not on this machine."""


@dataclass(frozen=True)
class Plant:
    """A fault: what to write in place of a pattern, inside one function of `_core.pxd`."""

    name: str
    function: str
    pattern: str
    new: str = "pass"

    def put(self, source: str) -> str:
        """The source with the fault in it."""
        found = re.search(
            rf"^cdef [^\n]*\b{self.function}\(.*?(?=\n\n\n|\Z)", source, re.MULTILINE | re.DOTALL
        )
        changed = re.sub(self.pattern, self.new, found[0]) if found is not None else ""
        if found is None or changed == found[0]:
            raise SystemExit(f"_core.pxd has changed: {self.name!r} can not be planted any more")
        return source.replace(found[0], changed)


@dataclass
class Sanitizer:
    """One build: how it is compiled and run, and what of its reports counts."""

    name: str
    flags: str
    runtime: str
    environment: dict[str, str]
    #: Where a report begins.
    start: str
    plants: Sequence[Plant]
    tests: Sequence[str] = ()
    header: str = ""
    #: Reports count that have this, not all that have the core in them.
    counts: str = r"_core\.(c|cpython)"
    rows: list[tuple[str, str, str]] = field(default_factory=list)


def address() -> Sanitizer:
    """Addresses, undefined behaviour and leaks."""
    return Sanitizer(
        name="address",
        # It says what is undefined on the standard error alone, so that is to be the end.
        flags="-fsanitize=address,undefined -fno-sanitize-recover=undefined",
        runtime="libasan.so",
        environment={
            "PYTHONMALLOC": "malloc",
            "ASAN_OPTIONS": "detect_leaks={leaks}:fast_unwind_on_malloc={fast}:exitcode=23"
            ":malloc_context_size=12:allocator_may_return_null=1:log_path={log}",
            "UBSAN_OPTIONS": "print_stacktrace=1",
            "LSAN_OPTIONS": "max_leaks=0",
        },
        start=r"^==\d+==ERROR: |^(?:Direct|Indirect) leak of |^[^\n]*: runtime error: ",
        tests=TESTS,
        plants=(
            Plant(
                "a seat that is not owned for as long as it is used",
                "line_leave",
                r"Py_INCREF\(<object>made\)",
            ),
            Plant(
                "a seat that is never let go",
                "line_release",
                r"Py_DECREF\(seat\)",
            ),
            Plant(
                "lines that are not aligned",
                "make_block",
                r"\(<uintptr_t>allocated \+ CACHE_LINE - 1\) & .*",
                "<uintptr_t>allocated + 1",
            ),
            Plant(
                "too little memory for lines",
                "make_block",
                r"PyMem_RawCalloc\(count \+ 1, lines\.stride\)",
                "PyMem_RawCalloc(count, lines.stride - CACHE_LINE)",
            ),
        ),
    )


def thread(instrumented: bool) -> Sanitizer:
    """Races."""
    options = "exitcode=0:history_size=7:report_signal_unsafe=0:log_path={log}"
    sanitizer = Sanitizer(
        name="thread",
        flags="-fsanitize=thread",
        runtime="libtsan.so",
        environment={"TSAN_OPTIONS": options},
        start=r"^WARNING: ThreadSanitizer: ",
        # One of the two accesses is in the core itself, not in what it has called.
        counts=r"#0 [^\n]*_core\.c(?:python)?",
        plants=(
            Plant(
                "a leader that gives its slot back without the line's lock",
                "line_pass",
                LOCKING,
            ),
            Plant(
                "a place that is looked at without the line's lock",
                "line_taken",
                LOCKING,
            ),
            Plant(
                "a seat that is looked for without the line's lock",
                "line_get",
                LOCKING,
            ),
        ),
    )
    if not instrumented:
        sanitizer.environment["TSAN_OPTIONS"] = f"{options}:ignore_noninstrumented_modules=1"
        sanitizer.header = ANNOUNCED
        sanitizer.counts = r"Location is heap block [^\n]*\n(?:[^\n]+\n){0,2}[^\n]*memory_of_lines"
    return sanitizer


def references() -> Sanitizer:
    """References, where the interpreter counts all of them."""
    return Sanitizer(
        name="references",
        flags="",
        runtime="",
        environment={},
        # A line of the table of proof.references that does not say that nothing has leaked.
        start=r"^\S.* \d+\.\d s  (?!nothing)",
        counts="",
        plants=(
            Plant("a seat that is never let go", "line_release", r"Py_DECREF\(seat\)"),
            Plant(
                "a key that is looked for and kept",
                "key_of_two",
                r"return \(SEVERAL,",
                "Py_INCREF(<object>part)\n        return (SEVERAL,",
            ),
        ),
    )


# -- building --------------------------------------------------------------------------------------

#: Asks an interpreter what there is to know for compiling.
ASK = """
import json, sys, sysconfig
print(json.dumps({
    "include": [sysconfig.get_path("include"), sysconfig.get_path("platinclude")],
    "suffix": sysconfig.get_config_var("EXT_SUFFIX"),
    "compiler": sysconfig.get_config_var("CC") or "cc",
    "free_threaded": bool(sysconfig.get_config_var("Py_GIL_DISABLED")),
    "debug": hasattr(sys, "gettotalrefcount"),
    "instrumented": "--with-thread-sanitizer" in str(sysconfig.get_config_var("CONFIG_ARGS")),
    "version": sys.version.split()[0] + sys.abiflags,
}))
"""


class Interpreter:
    """What the core is compiled for, and runs on."""

    def __init__(self, executable: str) -> None:
        self.executable = executable
        asked = [executable, "-c", ASK]
        said: dict[str, Any] = json.loads(
            subprocess.run(asked, capture_output=True, check=True).stdout
        )
        self.include = [f"-I{folder}" for folder in said["include"]]
        self.suffix: str = said["suffix"]
        self.debug: bool = said["debug"]
        self.free_threaded: bool = said["free_threaded"]
        self.instrumented: bool = said["instrumented"]
        self.version: str = said["version"]
        compiler = str(os.environ.get("CC") or said["compiler"]).split()[0]
        found = shutil.which(compiler) or shutil.which("cc")
        if found is None:
            raise Lacking(f"There is no C compiler ({compiler}): install gcc.")
        self.compiler = found

    def library(self, name: str) -> str:
        """The file of a sanitizer's library, which has to be loaded before all others."""
        asked = [self.compiler, f"-print-file-name={name}"]
        said = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.strip()
        if not Path(said).is_absolute() or not Path(said).exists():
            raise Lacking(f"{self.compiler} has no {name}: install gcc's sanitizer libraries.")
        return str(Path(said).resolve())


def directives() -> dict[str, Any]:
    """What setup.py tells Cython."""
    for statement in ast.parse((ROOT / "setup.py").read_text("utf-8")).body:
        if isinstance(statement, ast.Assign) and ast.unparse(statement.targets[0]) == "DIRECTIVES":
            return dict(ast.literal_eval(statement.value))
    raise SystemExit("setup.py has no DIRECTIVES any more")


def call(command: Sequence[str], folder: Path) -> None:
    """Runs one step of a build."""
    done = subprocess.run(
        command,
        cwd=folder,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        check=False,
    )
    if done.returncode:
        raise Lacking(f"The core can not be compiled:\n{shlex.join(command)}\n{done.stdout}")


def build(sanitizer: Sanitizer, plant: Plant | None, folder: Path, python: Interpreter) -> None:
    """Copies what is needed into the folder and compiles the core there."""
    for name in ("src", "tests", "proof"):
        shutil.copytree(
            ROOT / name,
            folder / name,
            ignore=shutil.ignore_patterns("*.so", "*.c", "__pycache__", "*.egg-info"),
        )
    shutil.copy2(ROOT / "pyproject.toml", folder)
    if plant is not None:
        types = folder / "src/shardedflight/_core.pxd"
        types.write_text(plant.put(types.read_text("utf-8")), "utf-8")
    told = [f"{name}={value}" for name, value in directives().items()]
    cython = [sys.executable, "-m", "cython", *(f"-X{one}" for one in told)]
    call([*cython, "src/shardedflight/_core.py", "-o", "_core.c"], folder)
    flags = [*sanitizer.flags.split(), "-g1", "-O1", "-fno-omit-frame-pointer", "-w"]
    if sanitizer.header:
        (folder / "announced.h").write_text(sanitizer.header)
        flags += ["-include", "announced.h"]
    extension = f"src/shardedflight/_core{python.suffix}"
    compiled = [python.compiler, "-shared", "-fPIC", "-pthread", *flags, *python.include]
    call([*compiled, "_core.c", "-o", extension], folder)


# -- running ---------------------------------------------------------------------------------------


def run(
    sanitizer: Sanitizer,
    python: Interpreter,
    folder: Path,
    arguments: Sequence[str],
    leaks: bool = False,
) -> tuple[int, str, list[str], int]:
    """Runs Python there; returns its exit code, what it said, the findings, and all reports."""
    logs = Path(tempfile.mkdtemp(prefix="reports-", dir=folder))
    values = {"log": logs / "report", "leaks": int(leaks), "fast": int(not leaks)}
    environment = {
        **os.environ,
        **{name: text.format(**values) for name, text in sanitizer.environment.items()},
        "PYTHONPATH": str(folder / "src"),
        "SHARDEDFLIGHT_PURE": "",
        "SHARDEDFLIGHT_REQUIRE_COMPILED": "1",
    }
    command = [python.executable, *arguments]
    if sanitizer.runtime and not python.instrumented:
        # Loaded by Python alone, not by what goes before it.
        command = ["env", f"LD_PRELOAD={python.library(sanitizer.runtime)}", *command]
    if sanitizer.runtime:
        command = [*without_random_addresses(), *command]
    done = subprocess.run(
        command,
        cwd=folder,
        env=environment,
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        check=False,
    )
    said = done.stdout.decode("utf-8", "replace")
    texts = [said, *(file.read_text("utf-8", "replace") for file in sorted(logs.iterdir()))]
    reports = [report for text in texts for report in split(sanitizer.start, text)]
    findings = [report for report in reports if re.search(sanitizer.counts, report)]
    return done.returncode, said, findings, len(reports)


def without_random_addresses() -> list[str]:
    """What goes before a command whose memory is to be where the sanitizers expect it.

    gcc's libraries are made for addresses of which 28 bits are random. With more, which kernels
    offer, a process may report its own fault forever before it has begun
    (https://github.com/google/sanitizers/issues/1614).
    """
    setarch = shutil.which("setarch")
    if setarch is not None:
        tried = subprocess.run([setarch, "-R", "true"], capture_output=True, check=False)
        if tried.returncode == 0:
            return [setarch, "-R"]
    bits = int(RANDOM_BITS.read_text()) if RANDOM_BITS.exists() else 0
    if bits > 28:
        raise Lacking(
            f"{RANDOM_BITS} is {bits}, more than the sanitizers bear, and setarch -R is not there "
            "or not allowed: have it, or run sysctl vm.mmap_rnd_bits=28."
        )
    return []


def split(start: str, text: str) -> Iterator[str]:
    """The reports of a log."""
    begins = [found.start() for found in re.finditer(start, text, re.MULTILINE)]
    for begin, end in pairwise([*begins, len(text)]):
        yield text[begin:end].partition("\nSUMMARY: ")[0]


def churn(seconds: float) -> list[str]:
    """The command line of the mix of calls."""
    return ["-m", "proof.churn", "--seconds", str(seconds)]


def every_outcome(times: int) -> list[str]:
    """The command line of proof.references."""
    return ["-m", "proof.references", "--times", str(times)]


def tests(names: Sequence[str]) -> list[str]:
    """The command line of the tests. Under a sanitizer all takes its time."""
    options = ["-q", "-x", "-s", "-p", "no:cacheprovider", "-o", "timeout=1200"]
    options += ["-o", "faulthandler_timeout=1300"]
    options += ["-k", "not left_behind_is_found"]  # without Python's allocator no block is counted
    return ["-m", "pytest", *options, *(f"tests/{name}" for name in names)]


def sound(
    sanitizer: Sanitizer, python: Interpreter, seconds: float, with_tests: bool, folder: Path
) -> bool:
    """Whether nothing is found of the core as it is."""
    build(sanitizer, None, folder, python)
    steps = [("churn", churn(seconds), False)]
    if sanitizer.name == "references":
        steps = [("every method, every outcome", every_outcome(20_000), False)]
    if sanitizer.name == "address":
        steps.append(("churn, for leaks", churn(max(2.0, seconds / 4)), True))
    if with_tests and sanitizer.tests:
        steps.append((f"{len(sanitizer.tests)} files of tests", tests(sanitizer.tests), False))
    well = True
    for name, arguments, leaks in steps:
        started = time.monotonic()
        code, said, findings, reports = run(sanitizer, python, folder, arguments, leaks)
        took = f"{time.monotonic() - started:.0f} s"
        # LeakSanitizer ends a process with 23, whoever has leaked.
        failed = code != 0 and not (leaks and code == 23)
        last = said.strip().splitlines()[-1] if said.strip() else ""
        print(f"{name}: {len(findings)} findings ({reports} reports), exit {code}, {took}")
        print(f"    {last}", flush=True)
        if failed or findings:
            well = False
            print(said[-4000:])
            print("\n\n".join(findings[:10]))
        found = f"{len(findings)} found, {reports - len(findings)} of others"
        sanitizer.rows.append((name, "FAILED" if failed else found, took))
    return well


def caught(sanitizer: Sanitizer, python: Interpreter, plant: Plant, folder: Path) -> bool:
    """Whether the planted fault is found."""
    build(sanitizer, plant, folder, python)
    started = time.monotonic()
    findings: list[str] = []
    arguments = every_outcome(1000) if sanitizer.name == "references" else churn(3.0)
    for leaks in (False, True) if sanitizer.name == "address" else (False, False):
        findings = run(sanitizer, python, folder, arguments, leaks)[2]
        if findings:
            break
    took = f"{time.monotonic() - started:.0f} s"
    first = findings[0].strip().splitlines()[0] if findings else "nothing was found"
    print(f"planted: {plant.name}: {first}", flush=True)
    sanitizer.rows.append((f"planted: {plant.name}", "caught" if findings else "MISSED", took))
    return bool(findings)


def examine(
    sanitizer: Sanitizer, python: Interpreter, seconds: float, with_tests: bool, planted: bool
) -> bool:
    """All that is done with one sanitizer."""
    with tempfile.TemporaryDirectory(prefix="sanitize-") as directory:
        print(f"-- {sanitizer.name}: compiling {sanitizer.flags}", flush=True)
        well = sound(sanitizer, python, seconds, with_tests, Path(directory, "as-it-is"))
        for number, plant in enumerate(sanitizer.plants if planted else ()):
            well &= caught(sanitizer, python, plant, Path(directory, f"plant-{number}"))
    return well


def main() -> int:
    """The command line."""
    parser = argparse.ArgumentParser(
        prog="python -m proof.sanitize",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--seconds", type=float, default=20.0, help="of churn (20)")
    parser.add_argument("--no-tests", action="store_true", help="churn alone")
    parser.add_argument("--no-plants", action="store_true", help="do not plant faults")
    parser.add_argument("--python", default=sys.executable, help="run the core on this interpreter")
    options = parser.parse_args()
    # Terminated, it ends as when it is interrupted, and ends what it has started.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        python = Interpreter(options.python)
        sanitizer = address()
        if python.debug:
            sanitizer = references()
        elif python.free_threaded:
            sanitizer = thread(python.instrumented)
        kind = "instrumented" if python.instrumented else "debug" if python.debug else "ordinary"
        print(f"CPython {python.version}, {kind} build, {python.compiler}")
        if sanitizer.runtime:
            python.library(sanitizer.runtime)
        planted, with_tests = not options.no_plants, not options.no_tests
        well = examine(sanitizer, python, options.seconds, with_tests, planted)
    except Lacking as error:
        print(error, file=sys.stderr)
        return 2
    print(f"\n{sanitizer.name:<72}{'result':<28}{'took':>8}")
    for name, result, took in sanitizer.rows:
        print(f"{name:<72}{result:<28}{took:>8}")
    return 0 if well else 1


if __name__ == "__main__":
    sys.exit(main())
