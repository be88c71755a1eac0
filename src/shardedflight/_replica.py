"""One failure, raised by many callers: each gets an exception object of its own.

Raising an exception writes to it: the traceback grows by every frame it passes, the context is set
to what was being handled. When a thousand followers raise the leader's one object, each finds the
tracks of the others in it. So every follower raises a replica: same type, arguments and
attributes, and a traceback that begins where the leader failed.

`copy.copy` will not do: it calls the class with `args`, which an `__init__` of a user's own need
not accept. A replica is built below `__init__` and `__setattr__`: the built-in `__new__` makes an
empty object of the type, and what the object holds is carried over slot by slot. C state
(`OSError.errno`, `UnicodeDecodeError.start`) and `__slots__` are both found as descriptors of the
classes, so one rule covers them. `copy.copy` is the second way, for types that no `__new__` makes
empty.
"""

import copy
from collections.abc import Iterator
from types import BuiltinFunctionType, GetSetDescriptorType, MemberDescriptorType, TracebackType
from typing import Any

__all__ = ["Failure", "traceback_of"]


# The fields as BaseException itself keeps them, whatever a subclass has put in their place.
_ARGS: Any = BaseException.__dict__["args"]
_CAUSE: Any = BaseException.__dict__["__cause__"]
_CONTEXT: Any = BaseException.__dict__["__context__"]
_TRACEBACK: Any = BaseException.__dict__["__traceback__"]
_DICT: Any = BaseException.__dict__["__dict__"]
_MESSAGE: Any = BaseExceptionGroup.__dict__["message"]
_INNER: Any = BaseExceptionGroup.__dict__["exceptions"]


def traceback_of(error: BaseException) -> TracebackType | None:
    """The traceback, whatever the class answers for `__traceback__`."""
    traceback: TracebackType | None = _TRACEBACK.__get__(error)
    return traceback


class Failure:
    """What an exception says, taken once, when the leader failed; makes replicas of it.

    It is taken before the leader raises the exception to its own caller: what that caller adds to
    its object (notes, attributes, a longer traceback) is not seen by anybody else.
    """

    __slots__ = (
        "_args",
        "_attributes",
        "_cause",
        "_context",
        "_error",
        "_inner",
        "_message",
        "_shared",
        "_state",
        "_traceback",
    )

    def __init__(self, error: BaseException, traceback: TracebackType | None) -> None:
        # This runs under a lock, so nothing of the error's own code may run: descriptors are asked,
        # not attributes.
        self._error = error
        self._traceback = traceback
        self._inner: tuple[Failure, ...] = ()
        self._message: Any = None
        self._args = _ARGS.__get__(error)
        self._cause = _CAUSE.__get__(error)
        self._context = _CONTEXT.__get__(error)
        self._attributes: dict[str, Any] = {}
        self._state: tuple[tuple[Any, Any], ...] = ()
        try:
            self._attributes = _unshare_notes(_DICT.__get__(error).copy())
            self._state = tuple(_slot_values(error))
            if issubclass(type(error), BaseExceptionGroup):
                self._message = _MESSAGE.__get__(error)
                self._inner = tuple(Failure(e, traceback_of(e)) for e in _INNER.__get__(error))
        except RecursionError:  # a group too deep for what is left of the stack
            self._shared = True
        else:
            self._shared = False

    def replica(self) -> BaseException:
        """A new exception that says the same, its traceback beginning where the leader failed.

        Where a type can neither be made empty nor copied (an extension type's may be so), or a
        group is nested too deep, the leader's own object is returned: shared, but right.
        """
        error = None if self._shared else self._empty()
        if error is None and not self._shared and not self._inner:
            error = self._copy()
        if error is None:
            _TRACEBACK.__set__(self._error, self._traceback)
            return self._error
        _ARGS.__set__(error, self._args)
        _CAUSE.__set__(error, self._cause)
        _CONTEXT.__set__(error, self._context)
        _TRACEBACK.__set__(error, self._traceback)
        for descriptor, value in self._state:
            try:
                # An empty member of C's reads as None, and would not be empty once None is set.
                if value is not None or not _reads_none(descriptor, error):
                    descriptor.__set__(error, value)
            except (AttributeError, TypeError):
                pass  # read-only: it was set when the object was made
        attributes = _DICT.__get__(error)
        attributes.clear()
        attributes.update(_unshare_notes(self._attributes.copy()))
        return error

    def _empty(self) -> BaseException | None:
        kind = type(self._error)
        arguments: tuple[Any, ...] = ()
        if self._inner:
            try:
                arguments = (self._message, [failure.replica() for failure in self._inner])
            except RecursionError:
                return None
        for base in kind.__mro__:
            new = vars(base).get("__new__")
            if isinstance(new, BuiltinFunctionType):
                try:
                    made: BaseException = new(kind, *arguments)
                except TypeError:
                    continue  # "not safe": the layout is that of another base
                if type(made) is kind:
                    return made
        return None

    def _copy(self) -> BaseException | None:
        """As the type copies itself: for extension types of which none is empty, as pydantic's."""
        try:
            made = copy.copy(self._error)
        except Exception:
            return None
        return made if type(made) is type(self._error) and made is not self._error else None


def _unshare_notes(attributes: dict[str, Any]) -> dict[str, Any]:
    notes = attributes.get("__notes__")
    if isinstance(notes, list):
        attributes["__notes__"] = notes.copy()
    return attributes


def _reads_none(descriptor: Any, error: BaseException) -> bool:
    try:
        return descriptor.__get__(error) is None
    except AttributeError:
        return False


def _slot_values(error: BaseException) -> Iterator[tuple[Any, Any]]:
    """The filled slots of `error` outside its `__dict__`: those of C and of `__slots__` alike."""
    for base in type(error).__mro__:
        for name, descriptor in list(vars(base).items()):
            if isinstance(descriptor, MemberDescriptorType) or (
                isinstance(descriptor, GetSetDescriptorType) and not name.startswith("__")
            ):
                try:
                    yield descriptor, descriptor.__get__(error)
                except AttributeError:
                    pass  # empty
