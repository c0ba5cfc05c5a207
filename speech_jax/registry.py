"""Names and keyword arguments to objects, with errors that name the nearest known one."""

import difflib
import inspect
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from speech_jax.errors import UserError

_VARIADIC = (inspect.Parameter.VAR_KEYWORD, inspect.Parameter.VAR_POSITIONAL)


def lookup(kind: str, table: Mapping[str, Any], name: str) -> Any:
    """`table[name]`; an unknown name is a UserError that lists what there is."""
    if name in table:
        return table[name]
    raise UserError(f"unknown {kind} {name!r}{_nearest(name, table)}; known: {', '.join(table)}")


def call(
    function: Callable,
    kwargs: Mapping[str, Any],
    *,
    what: str,
    defaults: Mapping[str, Any] | None = None,
) -> Any:
    """`function(**kwargs)`; an argument that it does not take, or lacks, is a UserError naming it.

    `what` names the configuration section that the arguments came from. `defaults` are values that
    nobody chose: an argument that the function does not take is left out if it has such a value,
    so that another name in a section does not ask for its other keys to be removed.
    """
    parameters = {
        name: parameter
        for name, parameter in inspect.signature(function).parameters.items()
        if parameter.kind not in _VARIADIC and name not in ("parent", "name")
    }
    given = {}
    for key, value in kwargs.items():
        if key in parameters:
            given[key] = value
        elif not (defaults and key in defaults and defaults[key] == value):
            known = ", ".join(parameters)
            raise UserError(
                f"{what}: unknown key {key!r}{_nearest(key, parameters)}; known: {known}"
            )
    for key, parameter in parameters.items():
        if parameter.default is inspect.Parameter.empty and key not in given:
            raise UserError(f"{what}: {key!r} is missing: give it a value")
    return function(**given)


def _nearest(name: str, known: Iterable[str]) -> str:
    close = difflib.get_close_matches(name, list(known), n=1, cutoff=0.5)
    return f" (did you mean {close[0]!r}?)" if close else ""
