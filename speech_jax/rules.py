"""Rules: a value for each parameter of a tree, by the end of its path.

A rule is (regular expression, value). Its expression has to match the end of the parameter's path
('encoder/layers/attention/qkv/kernel'), from its beginning or from behind a '/': 'head/kernel' does
not match 'my_head/kernel', and 'encoder/.*' matches whatever is in the encoder.
"""

import re
from collections.abc import Sequence
from typing import Any

import jax

from speech_jax.errors import UserError

Rules = Sequence[tuple[str, Any]]


def path_name(path: tuple) -> str:
    """A pytree path as text: 'encoder/layers/attention/qkv/kernel'."""
    return jax.tree_util.keystr(path, simple=True, separator="/")


def names(params: Any) -> list[str]:
    """The path of every parameter."""
    return [path_name(path) for path, _ in jax.tree_util.tree_leaves_with_path(params)]


def matches(pattern: str, name: str) -> bool:
    """Whether a rule's expression matches a parameter's path.

    Raises:
      UserError: the expression is none.
    """
    try:
        return re.search(rf"(?:^|/)(?:{pattern})$", name) is not None
    except re.error as error:
        raise UserError(f"{pattern!r} is not a regular expression: {error}") from error


def first(rules: Rules, name: str, default: Any) -> Any:
    """The value of the first rule that matches, or the default."""
    return next((value for pattern, value in rules if matches(pattern, name)), default)


def within(part: str, rules: Rules) -> Rules:
    """Rules for what lies in `part` of a task's parameters, and for nothing beside it."""
    return tuple((rf"{part}/(?:.*/)?(?:{pattern})", value) for pattern, value in rules)


def only(rules: Rules, name: str, kind: str) -> Any:
    """The value of the one rule that matches.

    Raises:
      UserError: none does, or several do.
    """
    found = [(pattern, value) for pattern, value in rules if matches(pattern, name)]
    if not found:
        raise UserError(f"no {kind} rule matches parameter {name}: add one beside its module")
    if len(found) > 1:
        patterns = " and ".join(repr(pattern) for pattern, _ in found)
        raise UserError(f"the {kind} rules {patterns} both match parameter {name}: keep one")
    return found[0][1]


def check_used(rules: Rules, params: Any, key: str) -> None:
    """Raises a UserError for a rule that matches no parameter; `key` names the setting."""
    known = names(params)
    for pattern, _ in rules:
        if not any(matches(pattern, name) for name in known):
            raise UserError(
                f"config.{key}: no parameter matches {pattern!r}; a rule matches the end of a "
                f"path, as of {', '.join(known[:6])}, ..."
            )
