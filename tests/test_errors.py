"""Errors and the checks that raise them."""

import pytest

from peft_vlm.errors import check_choice, check_number


def test_a_value_outside_the_choices_is_named_with_all_of_them() -> None:
    """The user would otherwise have to read the source to learn what is allowed."""
    with pytest.raises(ValueError, match=r"^Expected `mode` to be one of \('a', 'b'\), got 'c'\.$"):
        check_choice("mode", "c", ["a", "b"])


@pytest.mark.parametrize("value", [["a"], {"a": 1}, 1, None])
def test_a_value_of_another_type_gets_the_same_message(value: object) -> None:
    """A list from a JSON file would fail with "unhashable type" where the choices are keys of a dictionary."""
    with pytest.raises(ValueError, match=r"Expected `mode` to be one of \('a', 'b'\), got"):
        check_choice("mode", value, {"a": 1, "b": 2})


def test_allowed_values_pass() -> None:
    """None is a choice where the caller lists it."""
    check_choice("mode", "a", {"a": 1, "b": 2})
    check_choice("mode", None, (None, "a"))


@pytest.mark.parametrize(
    ("value", "limits", "wanted"),
    [
        (-1, {"least": 0}, "of 0 or more, got -1"),
        (0, {"above": 0}, "above 0, got 0"),
        (1.5, {"least": 0, "most": 1}, "from 0 to 1, got 1.5"),
        (float("nan"), {"least": 0}, "of 0 or more, got nan"),
        (float("inf"), {"above": 0}, "above 0, got inf"),
        (float("nan"), {"least": 0, "most": 1}, "from 0 to 1, got nan"),
        (float("-inf"), {}, "to be finite, got -inf"),
        ("8", {"least": 0}, "of 0 or more, got '8'"),
    ],
)
def test_a_number_outside_of_its_range_is_named_with_it(value: object, limits: dict[str, float], wanted: str) -> None:
    """NaN is smaller than nothing: a check that asks for what is too small lets it through."""
    with pytest.raises(ValueError, match=rf"^Expected `weight` {wanted}\.$"):
        check_number("weight", value, **limits)
    for edge in (limits.get("least"), limits.get("most"), 1):
        if edge is not None:
            check_number("weight", edge, **limits)
