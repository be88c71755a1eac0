"""Where a thread can be stopped: at the lines, or the instructions, of the flight's own modules.

Not at all of them: one that touches nothing but the local variables of its function commutes with
whatever another thread does, so a switch before it shows nothing that a switch behind it does not.
Those are left out. What tells them apart, from the instructions, errs on the side of stopping.
"""

import dis
from collections.abc import Callable
from pathlib import Path
from types import CodeType, FrameType
from typing import Any

import shardedflight

from .scheduler import running

__all__ = ["Trace", "make_trace"]

Trace = Callable[[FrameType, str, Any], Any]

_PACKAGE = Path(shardedflight.__file__).parent
#: Left out: what makes replicas of errors, and what tells observers. They share no state.
_FILES = {
    str(_PACKAGE / f"{name}.py")
    for name in ("_core", "_deadlock", "_flight", "_future", "_lock", "_many", "_waiting")
}

#: Instructions that touch the function's own variables and stack alone.
_LOCAL = (
    "BUILD_TUPLE",
    "CACHE",
    "CHECK_EXC_MATCH",
    "COPY",
    "EXTENDED_ARG",
    "IS_OP",
    "JUMP",
    "KW_NAMES",
    "LOAD_CONST",
    "LOAD_FAST",
    "LOAD_SMALL_INT",
    "NOP",
    "NOT_TAKEN",
    "POP_EXCEPT",
    "POP_JUMP_",
    "POP_TOP",
    "PUSH_",
    "RERAISE",
    "RESUME",
    "RETURN_",
    "STORE_FAST",
    "SWAP",
    "TO_BOOL",
)
#: Global names that nobody assigns to, and that hold what never changes.
_CONSTANTS = {"COMPILED", "End", "Execution", "KeyError", "LoopRun", "None", "cython"}


def _is_local(code: CodeType, instructions: list[dis.Instruction]) -> bool:
    before = ""
    for instruction in instructions:
        name = instruction.opname
        if name == "LOAD_GLOBAL":
            if instruction.argval not in _CONSTANTS:
                return False
        elif not name.startswith(_LOCAL):
            return False
        # The truth of a container is a look into it.
        tests = name == "TO_BOOL" or (name.startswith("POP_JUMP_") and "NONE" not in name)
        if tests and before not in {"IS_OP", "CHECK_EXC_MATCH", "LOAD_GLOBAL", "TO_BOOL"}:
            return False
        if name not in {"CACHE", "EXTENDED_ARG", "NOT_TAKEN"}:
            before = name
    return True


def _steps(code: CodeType, by_instruction: bool) -> set[int]:
    """The lines, or the offsets of the instructions, at which `code` can be stopped."""
    groups: dict[int, list[dis.Instruction]] = {}
    line = 0
    for instruction in dis.get_instructions(code):
        positions = instruction.positions
        if positions is not None and positions.lineno is not None:
            line = positions.lineno
        groups.setdefault(instruction.offset if by_instruction else line, []).append(instruction)
    return {place for place, group in groups.items() if not _is_local(code, group)}


def _tracer(code: CodeType, by_instruction: bool) -> Trace:
    steps = _steps(code, by_instruction)
    if by_instruction:

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if event == "opcode" and frame.f_lasti in steps:
                running().step()
            return trace

    else:

        def trace(frame: FrameType, event: str, _: object) -> Any:
            if event == "line" and frame.f_lineno in steps:
                running().step()
            return trace

    return trace


def make_trace(by_instruction: bool = False, only: tuple[str, ...] = ()) -> Trace:
    """What `sys.settrace` is given: it stops in all functions of the flight, or in `only` these."""
    # By id: the hash of a code object is made of all that it has. The object is kept, too.
    tracers: dict[int, tuple[CodeType, Trace | None]] = {}

    def trace(frame: FrameType, event: str, arg: object) -> Any:
        code = frame.f_code
        known = tracers.get(id(code))
        if known is None:
            ours = code.co_filename in _FILES and (not only or code.co_name in only)
            known = tracers[id(code)] = (code, _tracer(code, by_instruction) if ours else None)
        tracer = known[1]
        if tracer is not None and by_instruction:
            frame.f_trace_opcodes = True
            frame.f_trace_lines = False
        return tracer

    return trace
