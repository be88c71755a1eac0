"""`coalesce`: calls of one function with equal arguments, made at once, run it once.

A decorated function is a `Coalesced`: a `functools.partial` without arguments of a closure that
does the work. The partial is there for what a plain function can not have, a `forget` that knows
the instance it was looked up on; being implemented in C it costs a call less than a `__call__`
would. Everything that looks through a partial, such as `inspect.iscoroutinefunction`, finds the
closure.

**Keys.** What a call was made with is bound to the signature by a function that was generated with
that very signature and returns its own arguments, as `collections.namedtuple` generates its
`__new__`: Python itself binds arguments far faster than `inspect.Signature.bind`, and a call that
does not fit gets the error it would have got. The flight's key is a `Token` of the function and
that tuple, so two functions never meet on one flight.

**Instances** are told apart by identity, never by equality. Without a cache, `id` serves: whoever
runs or waits holds its instance, so that no other object can have its id while the key is in
flight. An entry of a cache outlives that, so it is filed under a weak reference to the instance.

**The cache** is read and written under a lock that belongs to the mapping, however many functions
use it. The leader writes before its execution ends. Whoever comes later therefore finds the entry,
or the execution, or becomes a leader that looks for the entry once more. A leader may write only
while it holds the latest `Permit` for the key, and `forget` takes that away.
"""

import asyncio
import contextlib
import dataclasses
import inspect
import os
import sys
import weakref
from collections.abc import Awaitable, Callable, Hashable, MutableMapping
from functools import partial, update_wrapper
from types import MethodType
from typing import (
    TYPE_CHECKING,
    Any,
    Concatenate,
    Final,
    Generic,
    ParamSpec,
    Protocol,
    TypeVar,
    cast,
    overload,
)

from ._core import check_timeout
from ._flight import ShardedFlight
from ._lock import ForkHold, SteadyLock
from .exceptions import FlightTimeout

__all__ = ["coalesce"]

P = ParamSpec("P")
P2 = ParamSpec("P2")
R = TypeVar("R")
R2 = TypeVar("R2")
S = TypeVar("S")

#: What a lookup answers where nothing is cached: None may be.
_MISSING: Final = object()

# Annotations that name what does not exist yet are not to be evaluated.
_SIGNATURE_OPTIONS: dict[str, Any] = {}
if sys.version_info >= (3, 14):
    from annotationlib import Format

    _SIGNATURE_OPTIONS["annotation_format"] = Format.FORWARDREF


# -- what a decorated function is -----------------------------------------------------------------


class Coalesced(partial[R], Generic[P, R]):
    """A function whose concurrent calls with equal arguments share one execution."""

    if TYPE_CHECKING:  # as class attributes, annotations would be found instead of the function's
        flight: ShardedFlight
        cache: MutableMapping[Any, Any] | None
        _function: "Function"
        _calls: "Calls"

        @property
        def __wrapped__(self) -> Callable[P, R]: ...

        def __call__(self, *args: P.args, **kwargs: P.kwargs) -> R: ...

    def forget(self, /, *args: P.args, **kwargs: P.kwargs) -> None:
        """The next call with these arguments runs the function.

        Drops what is cached for them and forgets their key, as `ShardedFlight.forget` does: an
        execution that runs now serves those who have joined it, and its value is not cached.

        Args:
            *args: Arguments, as those of a call.
            **kwargs: Arguments, as those of a call.

        Raises:
            TypeError: The arguments do not fit the signature or are not hashable.
        """
        self._calls.forget(*args, **kwargs)

    def __set_name__(self, owner: type, name: str) -> None:
        # Not if a function from elsewhere is put into a class, as a default perhaps: it goes on
        # being called as a function.
        defined_in = getattr(self, "__qualname__", "").rpartition(".")[0]
        if (self.__module__, defined_in) == (owner.__module__, owner.__qualname__):
            self._calls.keys.make = self._function.methods.keys.make

    # In order: a class method by its class, anything else by its class, a method by an instance, a
    # class method by an instance, a static method. Type checkers take them all for functions. They
    # compare the first parameter if self is a Callable; mypy does not if it is a Coalesced.
    @overload
    def __get__(  # type: ignore[misc]
        self: Callable[Concatenate[type[S], P2], R2], instance: None, owner: type[S]
    ) -> "Coalesced[P2, R2]": ...
    @overload
    def __get__(self, instance: None, owner: type | None = None) -> "Coalesced[P, R]": ...
    @overload
    def __get__(
        self: Callable[Concatenate[S, P2], R2], instance: S, owner: type | None = None
    ) -> "Coalesced[P2, R2]": ...
    @overload
    def __get__(  # type: ignore[misc]
        self: Callable[Concatenate[type[S], P2], R2], instance: S, owner: type | None = None
    ) -> "Coalesced[P2, R2]": ...
    @overload
    def __get__(self, instance: object, owner: type | None = None) -> "Coalesced[P, R]": ...
    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        if instance is None:
            return self
        if instance is owner:
            # `classmethod` before Python 3.13. Later ones do themselves what is done here.
            return MethodType(self, instance)
        bound: Bound[..., Any] = Bound(self._function.methods.call, instance)
        bound.__dict__ = self.__dict__
        return bound

    def __getattr__(self, name: str) -> Any:
        if name == "__annotations__":  # from Python 3.14 on a function makes them when asked
            return self.__wrapped__.__annotations__
        raise AttributeError(f"{self!r} has no attribute {name!r}", name=name, obj=self)

    def __repr__(self) -> str:
        return f"<coalesced {self.__wrapped__!r}>"

    def __reduce__(self) -> Any:
        return self.__qualname__  # as functions are pickled, by name


class CoalescedStatic(Coalesced[P, R]):
    """Of a `staticmethod`."""

    def __set_name__(self, owner: type, name: str) -> None:
        pass

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self


class CoalescedClass(Coalesced[P, R]):
    """Of a `classmethod`. `P` are the parameters after the class."""

    def __get__(self, instance: object, owner: type | None = None) -> Any:
        return super().__get__(type(instance) if owner is None else owner)


class Bound(Coalesced[P, R]):
    """A `Coalesced` looked up on an instance. It has the same `__dict__`."""

    @property
    def __self__(self) -> Any:
        return self.args[0]

    @property
    def __func__(self) -> Any:
        return self.func

    @property
    def __wrapped__(self) -> Any:
        return MethodType(self.__dict__["__wrapped__"], self.args[0])

    def forget(self, /, *args: Any, **kwargs: Any) -> None:
        """As that of the function, for this instance."""
        self._function.methods.forget(self.args[0], *args, **kwargs)

    def __get__(self, instance: Any, owner: type | None = None) -> Any:
        return self

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, Bound):
            return NotImplemented
        return self.__dict__ is other.__dict__ and self.args[0] is other.args[0]

    def __hash__(self) -> int:
        return hash((id(self.__dict__), id(self.args[0])))

    def __reduce__(self) -> Any:
        return getattr, (self.args[0], self.__name__)


# -- which calls are the same call ----------------------------------------------------------------


class Token:
    """Stands for one decorated function in the keys of a flight and of a cache."""

    __slots__ = ("_module", "_name")

    def __init__(self, name: str, module: str = "") -> None:
        self._name = name
        self._module = module

    def __repr__(self) -> str:
        return self._name

    def __flight_key__(self) -> str:
        """What it is called in other processes: see `shardedflight.backends`."""
        return f"{self._module}:{self._name}"


class Keys:
    """Makes keys of the arguments of one function's calls.

    Args:
        fn: The function.
        key: The user's way to make a key of them, if any.
        typed: The types of the arguments belong to the key.
        identify: Replaces the first argument, an instance; None where it is an argument like any.
    """

    __slots__ = ("_name", "make")

    #: Makes a key. Takes what the function takes.
    make: Callable[..., Any]

    def __init__(
        self,
        fn: Callable[..., Any],
        key: Callable[..., Hashable] | None,
        typed: bool,
        identify: Callable[[Any], Hashable] | None,
    ) -> None:
        self._name = _name_of(fn)
        if key is not None:
            self.make = key
            return
        try:
            signature = inspect.signature(fn, **_SIGNATURE_OPTIONS)
            self.make = _binder(self._name, signature, typed, identify)
        except (TypeError, ValueError, SyntaxError) as error:
            raise TypeError(
                f"coalesce can not make keys for {fn!r}, it has no usable signature ({error}): "
                "give key="
            ) from error

    def refuse_unhashable(self, key: Any) -> None:
        """Raises a TypeError that says what to do about it, if `key` is not hashable."""
        try:
            hash(key)
        except TypeError as error:
            raise TypeError(
                f"calls of {self._name} can not be told apart ({error}): "
                "give coalesce a key= that makes something hashable of the arguments"
            ) from None


def _binder(
    fn_name: str,
    signature: inspect.Signature,
    typed: bool,
    identify: Callable[[Any], Hashable] | None,
) -> Callable[..., tuple[Any, ...]]:
    """Makes a function with this signature that returns a tuple of its arguments.

    Args:
        fn_name: Whose name the errors of calls that do not fit bear.
        signature: The signature.
        typed: The arguments' types belong to the tuple.
        identify: Replaces the first argument, if given.
    """
    kinds = inspect.Parameter
    parameters = signature.parameters.values()
    # Longer than any of its names, so that none of them can hide a helper.
    prefix = "_" * (1 + max(map(len, signature.parameters), default=0))
    helpers = {
        "identify": identify,
        "identify_first": _identify_first,
        "items": _typed_items if typed else _sorted_items,
        "type": type,
        "types": _types,
    }
    parts: list[str] = []
    for index, parameter in enumerate(parameters):
        name = parameter.name
        is_instance = index == 0 and identify is not None
        if parameter.kind is kinds.VAR_KEYWORD:
            parts.append(f"{prefix}items({name})")
        elif parameter.kind is kinds.VAR_POSITIONAL:
            first = f"{prefix}identify_first({prefix}identify, {name})"
            parts += [first if is_instance else name, f"{prefix}types({name})"][: 1 + typed]
        else:
            first = f"{prefix}identify({name})"
            parts += [first if is_instance else name, f"{prefix}type({name})"][: 1 + typed]
    optional = [parameter for parameter in parameters if parameter.default is not parameter.empty]
    bare = [parameter.replace(annotation=parameter.empty) for parameter in parameters]
    bare = [p if p.default is p.empty else p.replace(default=None) for p in bare]
    takes = str(inspect.Signature(bare))[1:-1]
    # Names, commas and None: no value of anybody's is in this source.
    make = eval(  # noqa: S307
        f"lambda {takes}: ({''.join(f'{part}, ' for part in parts)})",
        {prefix + helper: value for helper, value in helpers.items()},
    )
    make.__defaults__ = tuple(p.default for p in optional if p.kind is not kinds.KEYWORD_ONLY)
    make.__kwdefaults__ = {p.name: p.default for p in optional if p.kind is kinds.KEYWORD_ONLY}
    make.__name__ = make.__qualname__ = fn_name
    return make  # type: ignore[no-any-return]


def _sorted_items(keywords: dict[str, Any]) -> tuple[Any, ...]:
    return tuple((name, keywords[name]) for name in sorted(keywords))


def _typed_items(keywords: dict[str, Any]) -> tuple[Any, ...]:
    return tuple((name, keywords[name], type(keywords[name])) for name in sorted(keywords))


def _types(values: tuple[Any, ...]) -> tuple[type, ...]:
    return tuple(map(type, values))


def _identify_first(identify: Callable[[Any], Hashable], args: tuple[Any, ...]) -> tuple[Any, ...]:
    return (identify(args[0]), *args[1:]) if args else args


class Instance(weakref.ref[Any]):
    """A weak reference to an instance, compared as what it is: one for each instance."""

    __slots__ = ("id",)
    __eq__ = object.__eq__
    __hash__ = object.__hash__

    id: int


#: The one reference to each instance that lives, by id. An instance's entry is removed before its
#: memory is given back, so nobody finds it under the id of another object.
_instances: dict[int, Instance] = {}


def _instance(instance: Any) -> Instance:
    """The `Instance` of an instance, made when it is first asked for. From any thread."""
    me = id(instance)
    found = _instances.get(me)
    if found is None or found() is not instance:
        if found is not None:  # a signal handler's exception struck its removal
            _instances.pop(me, None)
        try:
            made = Instance(instance, _drop_instance)
        except TypeError:
            raise TypeError(
                f"instances of {type(instance).__qualname__} can not be weakly referenced, and a "
                "cache must not keep them alive: add __weakref__ to its __slots__ (weakref_slot= "
                "of a dataclass), or give coalesce a key="
            ) from None
        made.id = me
        found = _instances.setdefault(me, made)
    return found


def _drop_instance(reference: Instance) -> None:
    _instances.pop(reference.id, None)


# -- the cache ------------------------------------------------------------------------------------


class Guard:
    """The lock of one mapping, which it keeps alive as long as a function uses it."""

    __slots__ = ("__weakref__", "lock", "mapping")

    def __init__(self, mapping: MutableMapping[Any, Any]) -> None:
        self.mapping = mapping
        # Reentrant: a key's __eq__, or a destructor, may call the function again.
        self.lock = SteadyLock()


#: The guards by the ids of their mappings: what two functions share has one lock.
_guards: "weakref.WeakValueDictionary[int, Guard]" = weakref.WeakValueDictionary()
_guards_lock = SteadyLock()


def _guard(mapping: MutableMapping[Any, Any]) -> Guard:
    with _guards_lock:
        found = _guards.get(id(mapping))
        if found is None:
            found = _guards[id(mapping)] = Guard(mapping)
        return found


#: The child has to find the mappings whole.
_fork_hold = ForkHold(lambda: [guard.lock for guard in list(_guards.values())])


def _after_fork_in_child() -> None:
    global _guards_lock
    _guards_lock = SteadyLock()
    _fork_hold.after_in_child()
    for guard in list(_guards.values()):
        guard.lock = SteadyLock()


if hasattr(os, "register_at_fork"):
    os.register_at_fork(
        before=_fork_hold.before,
        after_in_parent=_fork_hold.after_in_parent,
        after_in_child=_after_fork_in_child,
    )


class Permit:
    """What a leader holds as long as it may write."""

    __slots__ = ("__weakref__",)


class Cache:
    """One function's entries in a mapping. The lock is held for the mapping's own work only."""

    __slots__ = ("_guard", "_permits", "_token")

    def __init__(self, mapping: MutableMapping[Any, Any], token: Token | None) -> None:
        self._guard = _guard(mapping)
        #: Tells this function's entries from others'. None if the keys are the user's.
        self._token = token
        #: The latest leader's, by key, under the lock. Nobody else holds a permit: a leader that
        #: ends, in whatever way, needs not give it back.
        self._permits: weakref.WeakValueDictionary[Any, Permit] = weakref.WeakValueDictionary()

    def _key(self, key: Any) -> Any:
        return key if self._token is None else (self._token, key)

    def get(self, key: Any) -> Any:
        """The value cached for `key`, or `_MISSING`."""
        key = self._key(key)
        with self._guard.lock:
            return self._get(key)

    def _get(self, key: Any) -> Any:
        try:
            # Not by `[]`, with which a mapping's __missing__ would make an entry.
            return self._guard.mapping.get(key, _MISSING)
        except KeyError:  # it expired between the two looks that Mapping.get takes
            return _MISSING

    def lead(self, key: Any, permit: Permit) -> Any:
        """As `get`, for a leader; if nothing is cached, `permit` allows it to write."""
        key = self._key(key)
        with self._guard.lock:
            value = self._get(key)
            if value is _MISSING:
                self._permits[key] = permit
            return value

    def put(self, key: Any, permit: Permit, value: Any) -> None:
        """Caches a leader's value, if it still may and the mapping takes it."""
        key = self._key(key)
        with self._guard.lock:
            if self._permits.get(key) is permit:
                try:
                    self._guard.mapping[key] = value
                except ValueError:  # what cachetools says to a value that is too large
                    pass

    def drop(self, key: Any) -> None:
        """Drops the entry, and the right of the leader that runs now to write one."""
        key = self._key(key)
        with self._guard.lock:
            self._permits.pop(key, None)
            with contextlib.suppress(KeyError):  # it expired between the two looks of `pop`
                self._guard.mapping.pop(key, None)


# -- calling --------------------------------------------------------------------------------------


@dataclasses.dataclass
class Function:
    """A function and the options it was decorated with."""

    fn: Callable[..., Any]
    coroutines: bool
    flight: ShardedFlight
    token: Token
    key: Callable[..., Hashable] | None
    typed: bool
    timeout: float | None
    cache: Cache | None

    @property
    def methods(self) -> "Calls":
        """The calls whose first argument is an instance, made when they are first wanted."""
        # Not a cached_property: before 3.12 that has a lock, which a fork would leave taken.
        made: Calls | None = self.__dict__.get("_methods")
        return made or self.__dict__.setdefault("_methods", self._make_methods())

    def _make_methods(self) -> "Calls":
        # Python's own id: see the top of this module.
        if self.key is None and self.flight._tier is not None:
            raise TypeError(
                f"the instances on which {self.token!r} is called are not told apart in other "
                "processes: with a flight that has a backend, give coalesce a key="
            )
        return Calls(self, id if self.cache is None else _instance)


class Calls:
    """The two ways to call a decorated function, with one way to make keys for both."""

    __slots__ = ("call", "forget", "keys")

    def __init__(
        self, function: Function, identify: Callable[[Any], Hashable] | None = None
    ) -> None:
        self.keys = Keys(function.fn, function.key, function.typed, identify)
        call_with = _call_async_with if function.coroutines else _call_with
        self.call = call_with(function, self.keys)
        update_wrapper(self.call, function.fn, updated=())
        self.forget = _forget_with(function, self.keys)


def _call_with(function: Function, keys: Keys) -> Callable[..., Any]:
    do, fn, token = function.flight.do, function.fn, function.token
    cache, timeout = function.cache, function.timeout

    def call(*args: Any, **kwargs: Any) -> Any:
        key = keys.make(*args, **kwargs)
        try:
            return do(partial(fn, *args, **kwargs), token, key, timeout=timeout)[0]
        except TypeError:
            keys.refuse_unhashable(key)
            raise

    if cache is None:
        return call

    def lead(key: Any, args: Any, kwargs: Any) -> Any:
        permit = Permit()
        value = cache.lead(key, permit)
        if value is _MISSING:
            value = fn(*args, **kwargs)
            cache.put(key, permit, value)
        return value

    def call_cached(*args: Any, **kwargs: Any) -> Any:
        key = keys.make(*args, **kwargs)
        try:
            value = cache.get(key)
            if value is _MISSING:
                value, _ = do(partial(lead, key, args, kwargs), token, key, timeout=timeout)
            return value
        except TypeError:
            keys.refuse_unhashable(key)
            raise

    return call_cached


def _call_async_with(function: Function, keys: Keys) -> Callable[..., Any]:
    fn, token, cache = function.fn, function.token, function.cache
    do: Callable[..., Awaitable[tuple[Any, bool]]] = function.flight.do_async
    if function.timeout is not None:
        do = partial(_do_within, function.flight, function.timeout)

    async def call(*args: Any, **kwargs: Any) -> Any:
        key = keys.make(*args, **kwargs)
        try:
            return (await do(partial(fn, *args, **kwargs), token, key))[0]
        except TypeError:
            keys.refuse_unhashable(key)
            raise

    if cache is None:
        return call

    async def lead(key: Any, args: Any, kwargs: Any) -> Any:
        permit = Permit()
        value = cache.lead(key, permit)
        if value is _MISSING:
            value = await fn(*args, **kwargs)
            cache.put(key, permit, value)
        return value

    async def call_cached(*args: Any, **kwargs: Any) -> Any:
        key = keys.make(*args, **kwargs)
        try:
            value = cache.get(key)
            if value is _MISSING:
                value, _ = await do(partial(lead, key, args, kwargs), token, key)
            return value
        except TypeError:
            keys.refuse_unhashable(key)
            raise

    return call_cached


def _forget_with(function: Function, keys: Keys) -> Callable[..., None]:
    flight, token, cache = function.flight, function.token, function.cache

    def forget(*args: Any, **kwargs: Any) -> None:
        key = keys.make(*args, **kwargs)
        try:
            try:
                if cache is not None:
                    cache.drop(key)
            finally:
                flight.forget(token, key)
        except TypeError:
            keys.refuse_unhashable(key)
            raise

    return forget


async def _do_within(
    flight: ShardedFlight, seconds: float, fn: Callable[[], Awaitable[R2]], /, *parts: Any
) -> tuple[R2, bool]:
    """`do_async` with the `timeout` of `do`: a follower leaves, a leader is not limited."""
    inside = left = False

    def lead() -> Awaitable[R2]:
        timer.cancel()
        if inside and not limit.expired():
            limit.reschedule(None)
        return fn()

    try:
        async with asyncio.timeout(None) as limit:
            # When this timer ends it only starts another one, of 0 seconds. So a leader, whose
            # first step was scheduled by then, comes first, however short the time is.
            timer = asyncio.get_running_loop().call_later(seconds, limit.reschedule, 0)
            inside = True
            try:
                return await flight.do_async(lead, *parts)
            except asyncio.CancelledError:
                left = True
                raise
            finally:
                inside = False
                timer.cancel()
    except TimeoutError:
        if not left:  # the function's own
            raise
    raise FlightTimeout(f"waited {seconds} s for the execution of {parts!r}")


# -- the decorator --------------------------------------------------------------------------------


class Decorator(Protocol):
    """What `coalesce(...)` with options returns."""

    def __call__(self, fn: Callable[P, R2], /) -> Coalesced[P, R2]: ...


@overload
def coalesce(fn: Callable[P, R2], /) -> Coalesced[P, R2]: ...
@overload
def coalesce(
    *,
    flight: ShardedFlight | None = None,
    key: Callable[..., Hashable] | None = None,
    cache: MutableMapping[Any, Any] | None = None,
    typed: bool = False,
    timeout: float | None = None,
) -> Decorator: ...
def coalesce(
    fn: Any = None,
    /,
    *,
    flight: ShardedFlight | None = None,
    key: Callable[..., Hashable] | None = None,
    cache: MutableMapping[Any, Any] | None = None,
    typed: bool = False,
    timeout: float | None = None,
) -> Any:
    """Decorates a function so that its concurrent calls with equal arguments run it once.

    All of them get what the one execution returned: the very object, without being told whether it
    was shared. Used bare or with options, on functions, coroutine functions and methods; a class
    or static method may be decorated below or above this. Functions are called from any number of
    threads, coroutine functions on any number of event loops.

    The decorated function has `flight`, `cache`, `__wrapped__` and `forget(*args, **kwargs)`.

    Args:
        fn: The function.
        flight: Where its executions run. By default a flight of its own. Functions on one flight
            never meet.
        key: Takes what the function takes, `self` included, and returns what makes two calls of
            the function the same call: any hashable. By default the arguments are bound to the
            signature, so that `f(1)`, `f(x=1)` and a default of 1 are one call, and instances are
            told apart by identity.
        cache: Keeps values. It is asked before a call joins or runs anything, and written when
            the function has returned, never when it has raised. A lock guards it against the
            calls of all functions that it was given to.
        typed: Arguments that are equal but of different types, such as 1 and 1.0, make different
            calls. As in `functools.lru_cache`, only the types of the arguments themselves count.
        timeout: Seconds to wait, at the most, as a follower. A leader is not limited.

    Returns:
        The decorated function, or, with options, a decorator.

    Raises:
        TypeError: An argument is of the wrong type, or `fn` is something else than a function or
            coroutine function: a generator function, a class.
        ValueError: `timeout` is negative, or `key` makes another option meaningless.

    A call raises what the function raises, what `ShardedFlight.do` and `do_async` raise, and a
    TypeError if its arguments do not fit the signature or are not hashable.
    """
    _check_options(flight, key, cache, typed, timeout)

    def decorate(target: Any, /) -> Any:
        unwrapped = isinstance(target, staticmethod | classmethod)
        fn: Any = cast("Any", target).__func__ if unwrapped else target
        token = Token(_name_of(fn), _module_of(fn))
        if flight is not None and flight._tier is not None:
            _check_found_by_name(fn)
        function = Function(
            fn,
            _takes_coroutines(fn),
            ShardedFlight(name=_name_of(fn)) if flight is None else flight,
            token,
            key,
            typed,
            timeout,
            None if cache is None else Cache(cache, token if key is None else None),
        )
        calls = Calls(function)
        if isinstance(target, staticmethod):
            coalesced: Coalesced[..., Any] = CoalescedStatic(calls.call)
        elif isinstance(target, classmethod):
            coalesced = CoalescedClass(calls.call)
        else:
            coalesced = Coalesced(calls.call)
        update_wrapper(coalesced, fn)
        coalesced.flight = function.flight
        coalesced.cache = cache
        coalesced._function = function
        coalesced._calls = calls
        return coalesced

    return decorate if fn is None else decorate(fn)


def _check_options(flight: Any, key: Any, cache: Any, typed: Any, timeout: Any) -> None:
    if flight is not None and not isinstance(flight, ShardedFlight):
        raise TypeError(f"flight must be a ShardedFlight or None, not {flight!r}")
    if flight is not None:
        _check_hooks(flight)
    if key is not None and (not callable(key) or inspect.iscoroutinefunction(key)):
        raise TypeError(f"key must be a function that returns a hashable, or None, not {key!r}")
    if cache is not None and not isinstance(cache, MutableMapping):
        raise TypeError(f"cache must be a MutableMapping or None, not {cache!r}")
    if not isinstance(typed, bool):
        raise TypeError(f"typed must be True or False, not {typed!r}")
    if typed and key is not None:
        raise ValueError("typed= has no meaning beside key=, which alone says what is one call")
    if timeout is not None:
        check_timeout(timeout)


class Probe:
    """Stands for a function or an argument, and notices whether it is part of a key as it is."""

    hashed = False

    def __hash__(self) -> int:
        self.hashed = True
        return 0

    def __repr__(self) -> str:
        return "x"


def _check_hooks(flight: ShardedFlight) -> None:
    function, argument = Probe(), Probe()
    try:
        flight._place((function, (argument,)))
    except Exception as error:
        raise TypeError(
            f"flight must take the keys of coalesce, such as (f, (1, 2)), and {flight!r} does not: "
            f"{error}"
        ) from error
    if not (function.hashed and argument.hashed):
        raise ValueError(
            "flight must not have a build_key that could let functions or calls meet, as that of "
            f"{flight!r} could"
        )


def _takes_coroutines(fn: Any) -> bool:
    """Whether `fn` is a coroutine function. Raises TypeError if it is no function at all."""
    if not callable(fn) or isinstance(fn, type):
        raise TypeError(
            f"coalesce decorates a function, not {fn!r}; its options are keyword arguments"
        )
    faces = (fn, fn.__call__)  # an object's __call__ may be what its class wrote with async
    if any(inspect.isgeneratorfunction(f) or inspect.isasyncgenfunction(f) for f in faces):
        raise TypeError(
            f"{fn!r} is a generator function, whose items can not be shared: coalesce a function "
            "that returns a list of them"
        )
    return any(map(inspect.iscoroutinefunction, faces))


def _check_found_by_name(fn: Any) -> None:
    """Raises ValueError if other processes could take another function for this one."""
    name = _name_of(fn)
    if "<" in name or not isinstance(getattr(fn, "__module__", None), str):
        raise ValueError(
            f"with a flight that has a backend, coalesce takes functions that a module or a class "
            f"has by name, and not {fn!r}: in other processes another one could be meant"
        )


def _module_of(fn: Any) -> str:
    """The module of a function, under a name that it has in all processes."""
    module = getattr(fn, "__module__", None)
    if module not in ("__main__", "__mp_main__"):
        return str(module)
    path = getattr(sys.modules.get(module), "__file__", None)
    return "__main__" if path is None else os.path.realpath(path)


def _name_of(fn: Any) -> str:
    name = getattr(fn, "__qualname__", None)
    return name if isinstance(name, str) else repr(fn)
