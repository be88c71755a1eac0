"""One failure, raised by many callers: each gets an exception object of its own.

Raising an exception writes to it: the traceback grows by every frame it passes, the context is set
to what was being handled. When a thousand followers raise the leader's one object, each finds the
tracks of the others in it. So every follower raises a replica: same type, arguments and
attributes, and a traceback that begins where the leader failed.

`copy.copy` will not do: it calls the class with `args`, which an `__init__` of a user's own need
not accept. A replica is built below `__init__` and `__setattr__`: the built-in `__new__` makes an
empty object of the type, and what the object holds is carried over slot by slot. C state
(`OSError.errno`, `UnicodeDecodeError.start`) and `__slots__` are both found as descriptors of the
classes, so one rule covers them.
"""

from collections.abc import Iterator
from types import BuiltinFunctionType, GetSetDescriptorType, MemberDescriptorType, TracebackType
from typing import Any, cast

__all__ = ["Failure"]


# The fields as BaseException itself keeps them, whatever a subclass has put in their place.
_ARGS: Any = BaseException.__dict__["args"]
_CAUSE: Any = BaseException.__dict__["__cause__"]
_CONTEXT: Any = BaseException.__dict__["__context__"]
_TRACEBACK: Any = BaseException.__dict__["__traceback__"]


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
        "_state",
        "_traceback",
    )

    def __init__(self, error: BaseException, traceback: TracebackType | None) -> None:
        self._error = error
        self._traceback = traceback
        self._args = _ARGS.__get__(error)
        self._cause = error.__cause__
        self._context = error.__context__
        self._attributes = _unshare_notes(_own_dict(error).copy())
        self._state = tuple(_slot_values(error))
        self._inner: tuple[Failure, ...] = ()
        if isinstance(error, BaseExceptionGroup):
            group = cast("BaseExceptionGroup[BaseException]", error)
            self._inner = tuple(Failure(e, e.__traceback__) for e in group.exceptions)

    def replica(self) -> BaseException:
        """A new exception that says the same, its traceback beginning where the leader failed.

        Where a type cannot be made empty (an extension type without a usable `__new__`), the
        leader's own object is returned: shared, but right.
        """
        error = self._empty()
        if error is None:
            return self._error.with_traceback(self._traceback)
        _ARGS.__set__(error, self._args)
        _CAUSE.__set__(error, self._cause)
        _CONTEXT.__set__(error, self._context)
        _TRACEBACK.__set__(error, self._traceback)
        for descriptor, value in self._state:
            try:
                descriptor.__set__(error, value)
            except (AttributeError, TypeError):
                pass  # read-only: it was set when the object was made
        _own_dict(error).update(_unshare_notes(self._attributes.copy()))
        return error

    def _empty(self) -> BaseException | None:
        kind = type(self._error)
        arguments: tuple[Any, ...] = ()
        if self._inner:
            group = self._error
            assert isinstance(group, BaseExceptionGroup)
            arguments = (group.message, [failure.replica() for failure in self._inner])
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


def _own_dict(error: BaseException) -> dict[str, Any]:
    # Not vars(): a class may answer `__dict__` or `__getattribute__` in its own way.
    own: dict[str, Any] = BaseException.__dict__["__dict__"].__get__(error)
    return own


def _unshare_notes(attributes: dict[str, Any]) -> dict[str, Any]:
    notes = attributes.get("__notes__")
    if isinstance(notes, list):
        attributes["__notes__"] = notes.copy()
    return attributes


def _slot_values(error: BaseException) -> Iterator[tuple[Any, Any]]:
    """The filled slots of `error` outside its `__dict__`: those of C and of `__slots__` alike."""
    for base in type(error).__mro__:
        for name, descriptor in vars(base).items():
            if isinstance(descriptor, MemberDescriptorType) or (
                isinstance(descriptor, GetSetDescriptorType) and not name.startswith("__")
            ):
                try:
                    yield descriptor, descriptor.__get__(error)
                except AttributeError:
                    pass  # empty
