"""What a run is refused for before it starts."""

from typing import Any

from torch import nn

from peft_vlm.data.streaming import ImageStream
from peft_vlm.errors import DataError, PeftVLMError
from peft_vlm.objective import Objective
from peft_vlm.text.prompts import readable


def check_run(model: nn.Module, objective: Objective, train_dataset: Any, eval_dataset: Any) -> None:
    """Refuse a run that could not train or evaluate.

    Args:
        model: Model with its adapter.
        objective: Its class prompts, if it has any, say what the columns of its logits mean.
        train_dataset: Training images, a dataset or a stream.
        eval_dataset: Validation images, a dataset, or None.

    Raises:
        PeftVLMError: If nothing is trainable.
        DataError: If the objective cannot train on a stream; if the images have no labels, or labels of other
            classes than the objective's, or it predicts none.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PeftVLMError(
            "Expected trainable parameters, got none. Load adapters for training with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`."
        )
    if isinstance(train_dataset, ImageStream):
        objective.check_stream()
    if objective.labels_are_positions:
        _check_places(objective, train_dataset)
    if eval_dataset is None:
        return
    if isinstance(eval_dataset, ImageStream):
        raise DataError(
            "Expected an `eval_dataset` with an end, got a stream, which repeats images. Load one with "
            "`load_image_dataset`."
        )
    if min(eval_dataset.labels) < 0:
        raise DataError("Expected an `eval_dataset` with labels, got images without. Leave it out.")
    if not objective.can_predict:
        raise DataError(
            "Expected an objective with answers to choose from for an `eval_dataset`, got "
            f"`{type(objective).__name__}` for free answers, which have no scores. Pass candidates to the objective "
            "(`tokenize_candidates`), or leave out `eval_dataset` and compare generated answers after training."
        )
    if objective.prompts is None:
        return
    expected = [readable(name) for name in objective.prompts.class_names]
    actual = [readable(name) for name in eval_dataset.class_names]
    if actual == expected:
        return
    pairs = zip(expected, actual, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(actual)))
    raise DataError(
        "Expected an `eval_dataset` with the class names of the objective's prompts in their order, got "
        f"{len(actual)} names for {len(expected)}, the first difference at label {place}: "
        f"{actual[place : place + 1]!r} for {expected[place : place + 1]!r}. Labels of one list are wrong in the "
        "other: `restrict` the dataset to the classes of the prompts, or make prompts of its classes."
    )


def _check_places(objective: Objective, dataset: Any) -> None:
    """Refuse training labels that stand for other classes in the prompts; classes may be worded otherwise there."""
    if objective.prompts is None:
        return
    places = {readable(name): place for place, name in enumerate(objective.prompts.class_names)}
    names = [readable(name) for name in dataset.class_names]
    moved = [(label, name) for label, name in enumerate(names) if places.get(name, label) != label]
    if len(names) > len(places):
        raise DataError(
            f"Expected training images of at most {len(places)} classes, as the objective's prompts, got "
            f"{len(names)}. `restrict` the dataset to the classes of the prompts, or make prompts of all its classes."
        )
    if moved:
        (label, name), count = moved[0], len(moved)
        raise DataError(
            f"Expected training images whose labels are places in the objective's prompts, got {count} classes that "
            f"stand elsewhere there: label {label}, {name!r}, is class {places[name]}. Make prompts of the dataset's "
            "`class_names`."
        )
