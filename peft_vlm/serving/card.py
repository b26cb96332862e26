"""Facts about an exported classifier: one JSON text, the same in every file format."""

import json
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np

from .checks import CARD, MAX_TEXT, PREPROCESSING, check_values, expect
from .errors import ExportedFileError
from .images import Preprocessing

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
        try:
            expect(len(text) <= MAX_TEXT, f"a card of at most {MAX_TEXT:,} characters", len(text), where=where)
            values = json.loads(text)
        except (RecursionError, json.JSONDecodeError) as error:
            raise ExportedFileError(
                f"Expected JSON as {METADATA_KEY!r} in {where!r}, got something else ({error}). Export again."
            ) from error
        check_values(values, {"format_version": "a number of 1 or more"}, where=where)
        if values["format_version"] > FORMAT_VERSION:
            raise ExportedFileError(
                f"{where!r} has format version {values['format_version']}, this release reads {FORMAT_VERSION}. "
                "Install a newer release of peft_vlm, or copy its folder `serving` again."
            )
        check_values(values, CARD, where=where)
        expect(set(values) == set(CARD), f"a card with {sorted(CARD)}", sorted(values), where=where)
        values["preprocessing"].setdefault("value_range", None)  # older files have none
        check_values(values["preprocessing"], PREPROCESSING, where=where)
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
