"""The compiled core under the sanitizer that this interpreter is for: `make sanitize`, in short."""

import shutil
import subprocess
import sys
from pathlib import Path

import pytest
from proof import sanitize
from proof.churn import Churn

import shardedflight

TYPES = (sanitize.ROOT / "src/shardedflight/_core.pxd").read_text("utf-8")


def test_the_mix_of_calls_finds_nothing_wrong() -> None:
    churn = Churn(seed=1)
    churn.run(1.0, threads=4)
    assert churn.wrong == []
    assert sum(churn.done.values()) > 0


@pytest.mark.parametrize(
    "plant",
    [
        *sanitize.address().plants,
        *sanitize.thread(instrumented=False).plants,
        *sanitize.references().plants,
    ],
    ids=lambda plant: plant.name,
)
def test_every_fault_can_still_be_planted(plant: sanitize.Plant) -> None:
    assert plant.put(TYPES) != TYPES


def test_a_fault_that_can_not_be_planted_is_said() -> None:
    with pytest.raises(SystemExit, match="can not be planted any more"):
        sanitize.Plant("a fault", "line_pass", "no such text").put(TYPES)


@pytest.mark.once
def test_what_is_lacking_is_said(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CC", "no-such-compiler")
    monkeypatch.setenv("PATH", "")
    with pytest.raises(sanitize.Lacking, match="no C compiler"):
        sanitize.Interpreter(sys.executable)


@pytest.mark.once
def test_addresses_are_not_random() -> None:
    if not sys.platform.startswith("linux") or shutil.which("setarch") is None:
        pytest.skip("there is no setarch")
    try:
        before = sanitize.without_random_addresses()
    except sanitize.Lacking as lacking:
        pytest.skip(str(lacking))
    if not before:
        pytest.skip("setarch -R is not allowed here")
    address = "import ctypes; print(ctypes.cast(ctypes.CDLL(None).printf, ctypes.c_void_p).value)"
    command = [*before, sys.executable, "-c", address]
    assert len({subprocess.check_output(command) for _ in range(3)}) == 1


@pytest.mark.once
def test_addresses_that_are_too_random_are_said(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    bits = tmp_path / "mmap_rnd_bits"
    monkeypatch.setenv("PATH", "")
    monkeypatch.setattr(sanitize, "RANDOM_BITS", bits)
    bits.write_text("28\n")
    assert sanitize.without_random_addresses() == []
    bits.write_text("32\n")
    with pytest.raises(sanitize.Lacking, match=r"is 32, .* run sysctl vm\.mmap_rnd_bits=28"):
        sanitize.without_random_addresses()


@pytest.mark.once
@pytest.mark.skipif(shardedflight.__compiled__, reason="the plain core's run builds it anew")
@pytest.mark.timeout(600)
def test_nothing_is_found_in_the_core(tmp_path: Path) -> None:
    """That planted faults are found takes a build for each: `make sanitize` does it."""
    pytest.importorskip("Cython")
    if not sys.platform.startswith("linux") or shutil.which("cc") is None:
        pytest.skip("the sanitizers are gcc's, on Linux")
    python = sanitize.Interpreter(sys.executable)
    sanitizer = sanitize.thread(False) if python.free_threaded else sanitize.address()
    try:
        python.library(sanitizer.runtime)
        sanitize.without_random_addresses()
    except sanitize.Lacking as lacking:
        pytest.skip(str(lacking))
    sanitize.build(sanitizer, None, tmp_path, python)
    code, said, findings, _ = sanitize.run(sanitizer, python, tmp_path, sanitize.churn(1.0))
    assert (code, findings) == (0, []), said
    assert "calls on the compiled core" in said
