"""Test images that were trained on, told by their content."""

import hashlib
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.errors import DataError

logger = logging.getLogger(__name__)

#: Training images whose content is remembered, evenly spaced.
SAMPLE = 256


def image_sample(images: ImageClassificationDataset) -> list[str]:
    """Size and digest of the content of some images, evenly spaced, as a training summary records them.

    Args:
        images: Training images.
    """
    cells = images.some_images(SAMPLE)
    return sorted({print_ for cell in cells if (print_ := _fingerprint(cell, None)) is not None})


def check_not_trained_on(
    test: ImageClassificationDataset, sample: Sequence[str], *, num_train: int, refuse: bool = True
) -> None:
    """Refuse a test set that holds half of the training images, or consists of them by half; count fewer in the log.

    Args:
        test: Test images.
        sample: What `image_sample` gave for the training images.
        num_train: Number of training images.
        refuse: False: only log, for an accuracy on training images that is called so.

    Raises:
        DataError: Saying how many.
    """
    found = _found(test, sample)
    if not found:
        return
    share_of_train = len(set(found)) / len(set(sample))
    share_of_test = min(1.0, len(found) / len(set(sample)) * num_train / len(test))
    text = f"About {100 * share_of_test:.0f} % of the test images are training images, byte for byte"
    if refuse and max(share_of_train, share_of_test) >= 0.5:
        raise DataError(
            f"{text} ({100 * share_of_train:.0f} % of those that were trained on), so the accuracy would say nothing. "
            "Pass another split or dataset for the test."
        )
    logger.warning("%s.", text)


def is_chosen_on(test: ImageClassificationDataset, sample: Sequence[str]) -> bool:
    """True if a test set holds half of the validation images, on which the checkpoint of a run was chosen, or more.

    Args:
        test: Test images.
        sample: What `image_sample` gave for the validation images.
    """
    return bool(sample) and 2 * len(set(_found(test, sample))) >= len(set(sample))


def _found(test: ImageClassificationDataset, sample: Sequence[str]) -> list[str]:
    """Entries of a sample that are images of the test set, as often as they are."""
    known, sizes = set(sample), {entry.partition(":")[0] for entry in sample}
    prints = [_fingerprint(cell, sizes) for cell in test.some_images(len(test))] if sample else []
    return [entry for entry in prints if entry in known]


def _fingerprint(cell: Any, sizes: set[str] | None) -> str | None:
    """Size and digest of an image's content; None where it has none to read, or its size is not among some."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, str | Path):
        path = Path(cell)
        if not path.is_file() or (sizes is not None and str(path.stat().st_size) not in sizes):
            return None
        content = path.read_bytes()
    else:
        content = cell if isinstance(cell, bytes) else np.ascontiguousarray(np.asarray(cell)).tobytes()
    if sizes is not None and str(len(content)) not in sizes:
        return None
    return f"{len(content)}:{hashlib.blake2b(content, digest_size=8).hexdigest()}"
