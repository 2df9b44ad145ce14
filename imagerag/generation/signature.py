"""A call that passes its arguments on to another, and says so in its signature."""

import inspect
from collections.abc import Callable
from functools import wraps
from typing import Any

Call = Callable[..., Any]

_OLDER = {"callback", "callback_steps"}
"""What diffusers still takes without naming it."""


def passing_on(own: Call, peer: Call) -> Callable[[Call], Call]:
    """Give a method the arguments of `peer`, in its order, and after them those of `own` that it has not.

    What neither has is a TypeError, as for any function, though `peer` would take it without a word.

    Args:
        own: passes `**arguments` on to `peer`. Where both have an argument, its default is the one that counts.
        peer: a method.
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
