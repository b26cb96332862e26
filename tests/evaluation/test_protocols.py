"""Protocols: which images meet which class names, and how scores are put together."""

from collections.abc import Sequence

import pytest
import torch

from peft_vlm.data import EvalTransform, ImageClassificationDataset
from peft_vlm.errors import DataError
from peft_vlm.evaluation import base_to_new, cross_dataset, domain_shift, few_shot, harmonic_mean, zero_shot
from peft_vlm.evaluation.classify import LogitsFn
from tests.tiny import COLOURS, clip_processor, colour_names, colour_rows

#: What the true colour is taken for; green is mistaken for yellow, orange for red.
SEEN_AS = {name: name for name in COLOURS} | {"green": "yellow", "orange": "red"}


class ColourClassifier:
    """Reads the colour off the mean pixel, with fixed mistakes, and records what it was asked for."""

    def __init__(self) -> None:
        self.calls: list[tuple[tuple[str, ...], str | Sequence[str] | None]] = []
        rows = colour_rows(1)
        dataset = ImageClassificationDataset(rows, COLOURS, transform=EvalTransform(clip_processor()))
        self.means = torch.stack([dataset[i]["pixel_values"].mean((1, 2)) for i in range(len(rows))])

    def logits_for(self, class_names: Sequence[str], *, template: str | Sequence[str] | None = None) -> LogitsFn:
        """One for the colour it sees, if it is among the names; else for the first name."""
        self.calls.append((tuple(class_names), template))

        def logits(pixel_values: torch.Tensor) -> torch.Tensor:
            nearest = torch.cdist(pixel_values.mean((2, 3)), self.means).argmin(-1).tolist()
            seen = [SEEN_AS[COLOURS[index]] for index in nearest]
            chosen = [class_names.index(name) if name in class_names else 0 for name in seen]
            return torch.eye(len(class_names))[chosen]

        return logits


def colours(per_class: int = 3, classes: int = 5, seed: int = 1) -> ImageClassificationDataset:
    """Test images of the first colours."""
    rows = colour_rows(per_class, classes=classes, seed=seed)
    return ImageClassificationDataset(rows, colour_names(classes), transform=EvalTransform(clip_processor()))


@pytest.mark.parametrize("protocol", [zero_shot, few_shot])
def test_all_classes_at_once(protocol: object) -> None:
    """Two of five colours are mistaken."""
    result = protocol(ColourClassifier(), colours(), batch_size=4)
    assert result.scores == {"accuracy": pytest.approx(60.0)}
    assert result.parts["all"].per_class == {"red": 100, "orange": 0, "yellow": 100, "green": 0, "blue": 100}
    assert result.protocol == protocol.__name__.replace("_", "-")


def test_base_to_new_tests_each_half_with_its_own_names() -> None:
    """Base red, orange, yellow: orange is wrong. New green, blue: green's rival yellow is not among the names."""
    classifier = ColourClassifier()
    result = base_to_new(classifier, colours())
    assert [names for names, _ in classifier.calls] == [("red", "orange", "yellow"), ("green", "blue")]
    assert result.scores["base"] == pytest.approx(200 / 3)
    assert result.scores["new"] == pytest.approx(100)
    assert result.scores["h"] == pytest.approx(harmonic_mean(200 / 3, 100.0))
    assert result.parts["new"].labels.tolist() == [0, 0, 0, 1, 1, 1]
    assert len(result.parts["base"].predicted) == 9


@pytest.mark.parametrize("protocol", [cross_dataset, domain_shift])
def test_targets_are_scored_over_their_own_classes_and_averaged(protocol: object) -> None:
    """The average is over datasets, not over images, as in papers."""
    classifier = ColourClassifier()
    targets = {"small": colours(1, classes=2), "large": colours(9, classes=4)}
    result = protocol(classifier, targets, templates={"large": "a large {}."})
    assert classifier.calls == [(COLOURS[:2], None), (COLOURS[:4], "a large {}.")]
    assert result.scores == pytest.approx({"small": 50, "large": 50, "average": 50})
    assert {name: part.num_images for name, part in result.parts.items()} == {"small": 2, "large": 36}


def test_the_source_domain_is_shown_and_not_averaged() -> None:
    """Its accuracy would hide the loss that the protocol measures."""
    targets = {"plain": colours(2, classes=1), "pixel": colours(2, classes=2), "hand": colours(2, classes=4)}
    result = domain_shift(ColourClassifier(), targets, source="plain")
    assert result.scores == pytest.approx({"plain": 100, "pixel": 50, "hand": 50, "average": 50})
    with pytest.raises(DataError, match="`source` to be one of several targets"):
        domain_shift(ColourClassifier(), targets, source="photo")


def test_targets_that_cannot_be_named_are_refused() -> None:
    """A target called 'average' would be overwritten by the average."""
    with pytest.raises(DataError, match="none of them called 'average'"):
        cross_dataset(ColourClassifier(), {"average": colours()})
    with pytest.raises(DataError, match="got .*\\[\\]"):
        domain_shift(ColourClassifier(), {})
    with pytest.raises(DataError, match=r"targets \['a'\], got some for \['b'\]"):
        cross_dataset(ColourClassifier(), {"a": colours()}, templates={"b": "{}"})
