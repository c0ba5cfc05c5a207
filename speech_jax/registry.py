"""Names and keyword arguments to objects, with errors that name the nearest known one."""

import difflib
import inspect
from collections.abc import Callable, Mapping
from typing import Any

from speech_jax.errors import UserError


def lookup(kind: str, table: Mapping[str, Any], name: str) -> Any:
    """`table[name]`; an unknown name is a ValueError that lists what there is."""
    if name in table:
        return table[name]
    raise UserError(f"unknown {kind} {name!r}{_nearest(name, table)}; known: {', '.join(table)}")


def call(function: Callable, kwargs: Mapping[str, Any], *, what: str) -> Any:
    """`function(**kwargs)`; an argument that it does not take is a ValueError naming the nearest.

    `what` names the configuration section that the arguments came from.
    """
    parameters = inspect.signature(function).parameters
    known = [
        name
        for name, parameter in parameters.items()
        if parameter.kind is not inspect.Parameter.VAR_KEYWORD and name not in ("parent", "name")
    ]
    for key in kwargs:
        if key not in known:
            raise UserError(
                f"{what}: unknown key {key!r}{_nearest(key, known)}; known: {', '.join(known)}"
            )
    return function(**kwargs)


def _nearest(name: str, known) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
