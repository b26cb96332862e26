"""Files of an exported classifier: safetensors, torch.export, ONNX."""

import logging
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict
from importlib.util import find_spec
from pathlib import Path

import torch

from peft_vlm.errors import PeftVLMError, check_list
from peft_vlm.files import write_json
from peft_vlm.serving.card import METADATA_KEY
from peft_vlm.serving.plain import PlainClassifier

CARD_NAME = "classifier.json"


def _export_program(classifier: PlainClassifier) -> torch.export.ExportedProgram:
    """The classifier as a torch program for batches of any size, without Python code of ours.

    Args:
        classifier: Result of `export_classifier`.
    """
    shape = {"pixel_values": {0: torch.export.Dim.DYNAMIC}}
    return torch.export.export(classifier, (_example(classifier),), dynamic_shapes=shape)


def save_program(classifier: PlainClassifier, path: Path) -> None:
    """Write the torch program; `torch.export.load(path).module()` runs it.

    Args:
        classifier: Result of `export_classifier`.
        path: File that ends in `.pt2`.
    """
    torch.export.save(_export_program(classifier), path, extra_files={METADATA_KEY: classifier.card.to_json()})


def save_onnx(classifier: PlainClassifier, path: Path) -> None:
    """Write an ONNX file with input `pixel_values`, output `logits` and the card as metadata.

    Args:
        classifier: Result of `export_classifier`.
        path: File to write.

    Raises:
        PeftVLMError: If the extra `onnx` is not installed.
    """
    missing = [name for name in ("onnx", "onnxscript") if find_spec(name) is None]
    if missing:
        raise PeftVLMError(
            f"Writing ONNX needs {' and '.join(missing)}. Install: pip install onnx onnxscript onnxruntime."
        )
    names = {"input_names": ["pixel_values"], "output_names": ["logits"]}
    with _quiet():
        program = torch.onnx.export(_export_program(classifier), dynamo=True, verbose=False, **names)
    assert program is not None, "the dynamo exporter gives a program"
    program.model.metadata_props[METADATA_KEY] = classifier.card.to_json()
    program.save(str(path), external_data=False)


FORMATS: dict[str, tuple[str, Callable[[PlainClassifier, Path], None]]] = {
    "safetensors": ("classifier.safetensors", PlainClassifier.save),
    "onnx": ("classifier.onnx", save_onnx),
    "pt2": ("classifier.pt2", save_program),
}
"""File name and writer by the word of the command line."""


def write_export(classifier: PlainClassifier, folder: str | Path, formats: Sequence[str]) -> list[Path]:
    """Write a classifier in several formats, and `classifier.json` with its card.

    Args:
        classifier: Result of `export_classifier`.
        folder: Made where it does not exist.
        formats: Keys of `FORMATS`.

    Returns:
        The files.

    Raises:
        PeftVLMError: If a format is unknown.
    """
    check_list("formats", formats)
    unknown = sorted(set(formats) - set(FORMATS))
    if unknown or not formats:
        raise PeftVLMError(f"Expected formats of {sorted(FORMATS)!r}, got {list(formats)!r}.")
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    files = []
    for name in formats:
        file_name, write = FORMATS[name]
        write(classifier, folder / file_name)
        files.append(folder / file_name)
    write_json(folder / CARD_NAME, asdict(classifier.card))
    return [*files, folder / CARD_NAME]


@contextmanager
def _quiet() -> Iterator[None]:
    """Silence the exporter of torch 2.13 about missing torchvision and its own deprecated calls."""
    log = logging.getLogger("torch.onnx._internal.exporter._registration")
    level = log.level
    log.setLevel(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.filterwarnings("ignore", "`isinstance\\(treespec, LeafSpec\\)`", FutureWarning)
            yield
    finally:
        log.setLevel(level)


def _example(classifier: PlainClassifier) -> torch.Tensor:
    """Two images: a dimension of one would be taken for a constant."""
    return torch.zeros(2, 3, *classifier.card.architecture["image_size"], dtype=classifier.tower.positions.dtype)
