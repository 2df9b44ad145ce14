"""Explicit signatures for methods that pass `**arguments` on to another method."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

Call = Callable[..., Any]

_OLDER = {"callback", "callback_steps"}
"""Deprecated arguments that diffusers accepts by `**kwargs`."""


def passing_on(own: Call, peer: Call) -> Callable[[Call], Call]:
    """Return a decorator that gives a method `peer`'s arguments, followed by the arguments that only `own` has.

    An unknown argument raises a TypeError, although `peer` would ignore it.

    Args:
        own: method that passes `**arguments` on to `peer`; its defaults override those of `peer`.
        peer: method of the parent class.
    """
    mine, theirs = dict(inspect.signature(own).parameters), dict(inspect.signature(peer).parameters)
    del mine["arguments"]
    theirs.pop("kwargs", None)
    first = [mine.get(name, each).replace(kind=each.kind) for name, each in theirs.items()]
    signature = inspect.Signature([*first, *(each for name, each in mine.items() if name not in theirs)])

    def decorate(call: Call) -> Call:
        @wraps(call)
        def bound(*arguments: Any, **named: Any) -> Any:
            older = {name: named.pop(name) for name in _OLDER & named.keys()}
            given = signature.bind(*arguments, **named).arguments
            return call(given.pop("self"), **given, **older)

        bound.__signature__ = signature  # type: ignore[attr-defined]
        return bound

    return decorate
