"""Facts about an exported classifier: one JSON text, the same in every file format, checked before it is used."""

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .errors import ExportedFileError
from .images import Preprocessing

MAX_SIDE = 8192
"""Most rows or columns of pixels that a classifier takes or resizes to."""

MAX_TEXT = 2**24
"""Longest card in characters."""

#: Whether a value can be, by the words that say what it should be.
KINDS: dict[str, Callable[[Any], bool]] = {
    "a number of 1 or more": lambda value: _is_count(value) and value >= 1,
    "a number of 0 or more": lambda value: _is_count(value),
    "a finite number": lambda value: _is_number(value),
    "a finite number above 0": lambda value: _is_number(value) and value > 0,
    "true or false": lambda value: isinstance(value, bool),
    "text": lambda value: isinstance(value, str),
    "names and values": lambda value: isinstance(value, dict) and all(isinstance(name, str) for name in value),
    "one text or more": lambda value: _is_list(value, lambda name: isinstance(name, str)),
    "a number of Pillow's filters": lambda value: _is_count(value) and value <= 5,
    "three finite numbers": lambda value: _is_list(value, _is_number, 3),
    "three finite numbers other than 0": lambda value: _is_list(value, lambda v: _is_number(v) and v != 0, 3),
    "null, or two numbers of which the second is larger": lambda value: (
        value is None or (_is_list(value, _is_number, 2) and value[0] < value[1])
    ),
    f"rows and columns of up to {MAX_SIDE}": lambda value: _is_list(value, _is_side, 2),
    f"one side or two of up to {MAX_SIDE}": lambda value: _is_list(value, _is_side) and len(value) <= 2,
}
SIDES = f"rows and columns of up to {MAX_SIDE}"

CARD = {
    "class_names": "one text or more",
    "preprocessing": "names and values",
    "architecture": "names and values",
    "source": "names and values",
    "format_version": "a number of 1 or more",
}
PREPROCESSING = {
    "image_size": SIDES,
    "resize": f"one side or two of up to {MAX_SIDE}",
    "resample": "a number of Pillow's filters",
    "rescale_factor": "a finite number",
    "image_mean": "three finite numbers",
    "image_std": "three finite numbers other than 0",
    "value_range": "null, or two numbers of which the second is larger",
}
ARCHITECTURE = {
    **dict.fromkeys(("width", "heads", "mlp", "layers", "positions", "dim"), "a number of 1 or more"),
    **dict.fromkeys(("patch_bias", "class_token", "pre_norm", "attention_pool"), "true or false"),
    **{"activation": "text", "eps": "a finite number above 0", "patch_size": SIDES, "image_size": SIDES},
    **dict.fromkeys(("slots", "tokens"), "names and values"),
}


def _is_count(value: Any) -> bool:
    """Whether a value is a whole number from 0 to 2**31."""
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value <= 2**31


def _is_side(value: Any) -> bool:
    """Whether a value can be a number of rows or columns."""
    return _is_count(value) and 1 <= value <= MAX_SIDE


def _is_number(value: Any) -> bool:
    """Whether a value is a finite number."""
    return isinstance(value, int | float) and not isinstance(value, bool) and abs(value) <= 1e30


def _is_list(value: Any, fits: Callable[[Any], bool], length: int | None = None) -> bool:
    """Whether a value is a list of one entry or more, or of so many, that all fit."""
    return isinstance(value, list | tuple) and len(value) == (length or max(len(value), 1)) and all(map(fits, value))


def expect(is_so: bool, what: str, got: Any, *, where: str) -> None:
    """Refuse a file.

    Args:
        is_so: Whether it is as it should be.
        what: What was expected, for the message.
        got: What is there instead.
        where: Name of the file.

    Raises:
        ExportedFileError: If it is not.
    """
    if not is_so:
        text = repr(got)
        text = text if len(text) <= 120 else f"{text[:120]}..."
        raise ExportedFileError(
            f"Expected {what} in {where!r}, got {text}. It is damaged, or no file of `peft-vlm export`: export again."
        )


def _check_values(values: Any, kinds: Mapping[str, str], *, where: str) -> None:
    """Refuse names and values of which one is missing or of another kind.

    Args:
        values: From a file.
        kinds: Kind of each value that must be there.
        where: Name of the file.
    """
    expect(isinstance(values, dict), "names and values", values, where=where)
    for name, kind in kinds.items():
        expect(name in values and KINDS[kind](values[name]), f"`{name}` as {kind}", values.get(name), where=where)


def check_architecture(shape: dict[str, Any], *, num_tensors: int, where: str) -> None:
    """Refuse sizes that cannot be, or that ask for more layers than the file has tensors.

    Args:
        shape: Sizes of an `ImageTower`.
        num_tensors: Tensors in the file.
        where: Name of the file.
    """
    _check_values(shape, ARCHITECTURE, where=where)
    expect(shape["layers"] <= num_tensors, f"at most {num_tensors} layers", shape["layers"], where=where)
    expect(shape["width"] % shape["heads"] == 0, "`heads` that divide `width`", shape["heads"], where=where)
    places = {"input", *map(str, range(shape["layers"]))}
    for name, count in shape["tokens"].items():
        expect(name in places and _is_count(count), "numbers of tokens by layer", {name: count}, where=where)
    for name, slots in shape["slots"].items():
        fits = name in places and isinstance(slots, dict) and set(slots) <= {"q_proj", "k_proj", "v_proj"}
        expect(fits and all(map(_is_count, slots.values())), "numbers of slots by layer", {name: slots}, where=where)
    head = shape.get("head")
    expect(isinstance(head, list) and len(head) <= 16, "at most 16 layers as `head`", head, where=where)
    for layer in head or ():
        numbers = isinstance(layer, list) and layer and all(_is_number(v) or isinstance(v, bool) for v in layer[1:])
        expect(
            bool(numbers) and len(layer) <= 4 and isinstance(layer[0], str), "a layer of `head`", layer, where=where
        )
    _check_pixel_prompt(shape, where)


def _check_pixel_prompt(shape: dict[str, Any], where: str) -> None:
    prompt = shape.get("pixel_prompt")
    if prompt is None:
        return
    _check_values(prompt, {"image_size": SIDES, "clamp": "true or false"}, where=where)
    expect(set(prompt) == {"image_size", "clamp", "window"}, "a pixel prompt", prompt, where=where)
    window = prompt["window"]
    if window is None:
        return
    expect(_is_list(window, _is_count, 4), "a window of top, left, rows and columns", window, where=where)
    inside = all(window[i] + window[i + 2] <= prompt["image_size"][i] for i in (0, 1))
    expect(inside, f"a window inside {prompt['image_size']}", window, where=where)


#: Key of the text in the metadata of a safetensors, ONNX or torch.export file.
METADATA_KEY = "peft_vlm_classifier"
FORMAT_VERSION = 1


@dataclass(frozen=True)
class ClassifierCard:
    """Classes, preprocessing and origin of an exported classifier.

    Args:
        class_names: Class of each column of the logits.
        preprocessing: Steps from an image to pixels.
        architecture: Sizes from which `ImageTower` is built.
        source: Origin: adapter, method, base model, template, package version.
        format_version: Layout of the file.
    """

    class_names: tuple[str, ...]
    preprocessing: Preprocessing
    architecture: dict[str, Any]
    source: dict[str, Any] = field(default_factory=dict)
    format_version: int = FORMAT_VERSION

    def to_json(self) -> str:
        """The card as JSON text."""
        values = asdict(self)
        if self.preprocessing.value_range is None:  # older releases do not know it
            del values["preprocessing"]["value_range"]
        return json.dumps(values, ensure_ascii=False)

    @classmethod
    def from_json(cls, text: str | None, *, where: str) -> "ClassifierCard":
        """Read a card.

        Args:
            text: JSON text; None where a file has none.
            where: Name of the file, for the error message.

        Raises:
            ExportedFileError: If there is none, a newer release wrote it, or it says what cannot be.
        """
        if text is None:
            raise ExportedFileError(
                f"Expected {where!r} to be a classifier that `peft-vlm export` wrote, got a file without the metadata "
                f"{METADATA_KEY!r}."
            )
        expect(len(text) <= MAX_TEXT, f"a card of at most {MAX_TEXT:,} characters", len(text), where=where)
        try:
            values = json.loads(text)
        except (RecursionError, ValueError) as error:  # a number of 5,000 digits as well
            raise ExportedFileError(
                f"Expected JSON as {METADATA_KEY!r} in {where!r}, got something else ({error}). Export again."
            ) from error
        _check_values(values, {"format_version": "a number of 1 or more"}, where=where)
        if values["format_version"] > FORMAT_VERSION:
            raise ExportedFileError(
                f"{where!r} has format version {values['format_version']}, this release reads {FORMAT_VERSION}. "
                "Install a newer release of peft_vlm, or copy its folder `serving` again."
            )
        _check_values(values, CARD, where=where)
        expect(set(values) == set(CARD), f"a card with {sorted(CARD)}", sorted(values), where=where)
        values["preprocessing"].setdefault("value_range", None)  # older files have none
        _check_values(values["preprocessing"], PREPROCESSING, where=where)
        names = sorted(values["preprocessing"])
        expect(names == sorted(PREPROCESSING), f"`preprocessing` with {sorted(PREPROCESSING)}", names, where=where)
        preprocessing = {k: tuple(v) if isinstance(v, list) else v for k, v in values.pop("preprocessing").items()}
        names = tuple(values.pop("class_names"))
        return cls(names, Preprocessing(**preprocessing), **values)


def best_labels(logits: np.ndarray, class_names: Sequence[str], top_k: int) -> list[list[tuple[str, float]]]:
    """Most likely classes of each image with their probabilities, best first.

    Args:
        logits: Shape (images, classes).
        class_names: Names of the columns.
        top_k: Labels per image, at most.

    Raises:
        ValueError: If `top_k` is below 1.
    """
    if top_k < 1:
        raise ValueError(f"Expected `top_k` of at least 1, got {top_k!r}.")
    shifted = np.exp(logits - logits.max(axis=1, keepdims=True))
    probabilities = shifted / shifted.sum(axis=1, keepdims=True)
    order = np.argsort(-probabilities, axis=1, kind="stable")[:, :top_k]
    rows = zip(probabilities, order.tolist(), strict=True)
    return [[(str(class_names[c]), float(row[c])) for c in best] for row, best in rows]
