"""Templates: where the class name goes and what is refused."""

import pytest

from peft_vlm.errors import ClassNameError
from peft_vlm.text import IMAGENET_ENSEMBLE, fill


def test_underscores_and_doubled_spaces_become_one_space() -> None:
    """CoOp's class names come from folder names; an underscore would be a token of its own."""
    assert fill("a photo of a {}.", "annual_crop  land ") == "a photo of a annual crop land."


def test_other_braces_are_left_alone() -> None:
    """`str.format` would raise KeyError on a class name or template with braces."""
    assert fill("a {} in {braces}", "{set}") == "a {set} in {braces}"


@pytest.mark.parametrize(("template", "count"), [("a photo.", 0), ("{} and {}", 2)])
def test_a_template_has_one_place_for_the_name(template: str, count: int) -> None:
    """Without it every class would get the same text."""
    with pytest.raises(ClassNameError, match=f"exactly once in the template.*with {count}.*'a photo of a {{}}.'"):
        fill(template, "cat")


def test_the_ensemble_is_made_of_distinct_templates() -> None:
    """A template listed twice would count twice in the average."""
    assert len(set(IMAGENET_ENSEMBLE)) == 7
    assert all(fill(template, "cat") for template in IMAGENET_ENSEMBLE)
