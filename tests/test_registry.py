"""Names and keyword arguments to objects; a mistake is one sentence that names the cure."""

import pytest

from speech_jax import registry
from speech_jax.errors import UserError

TABLE = {"ctc": 1, "contrastive": 2}


def build(width, *, depth=2, name="none"):
    """Something with an argument that it needs and two that it does not."""
    del name
    return width, depth


def test_a_name_is_looked_up():
    assert registry.lookup("task", TABLE, "ctc") == 1
    with pytest.raises(UserError) as raised:
        registry.lookup("task", TABLE, "contrastiv")
    assert str(raised.value) == (
        "unknown task 'contrastiv' (did you mean 'contrastive'?); known: ctc, contrastive"
    )
    with pytest.raises(UserError, match=r"^unknown task 'zzz'; known"):
        registry.lookup("task", TABLE, "zzz")


def test_arguments_are_handed_on():
    assert registry.call(build, {"width": 3}, what="x") == (3, 2)
    assert registry.call(build, {"width": 3, "depth": 4}, what="x") == (3, 4)


@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        (
            {"width": 3, "dept": 1},
            r"unknown key 'dept' \(did you mean 'depth'\?\); known: width, depth",
        ),
        ({"width": 3, "zzz": 1}, "unknown key 'zzz'; known: width, depth"),
        ({"depth": 1}, "'width' is missing: give it a value"),
        # What flax gives every module is nobody's setting.
        ({"width": 3, "name": "a"}, "unknown key 'name'"),
    ],
)
def test_a_mistake_is_a_sentence_that_names_the_section(kwargs, message):
    with pytest.raises(UserError, match=rf"^model \(conformer\): {message}") as raised:
        registry.call(build, kwargs, what="model (conformer)")
    assert "\n" not in str(raised.value)


def test_what_nobody_chose_is_left_out():
    section = {"warmup": 10, "depth": 7}
    given = {"width": 3, **section}
    assert registry.call(build, given, what="x", defaults=section) == (3, 7)
    with pytest.raises(UserError, match="'warmup'"):
        registry.call(build, given | {"warmup": 11}, what="x", defaults=section)
    with pytest.raises(UserError, match="'warmup'"):
        registry.call(build, given, what="x")


def test_a_function_of_any_keyword_is_asked_by_its_names_alone():
    def anything(width, **more):
        return width, more

    with pytest.raises(UserError, match="unknown key 'depth'"):
        registry.call(anything, {"width": 1, "depth": 2}, what="x")
