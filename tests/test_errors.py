"""Errors and the checks that raise them."""

import pytest

from peft_vlm.errors import check_choice


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
