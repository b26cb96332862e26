"""One call that opens a stream of labelled images with its class names."""

import logging
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
from datasets import Dataset as HFDataset
from datasets import IterableDataset

from peft_vlm.data.class_lists import read_class_list
from peft_vlm.data.open_stream import class_labels, open_stream, undecoded
from peft_vlm.data.streams import ImageStream, label_of
from peft_vlm.data.transforms import ImageTransform
from peft_vlm.distributed import from_main, is_main_process, num_processes
from peft_vlm.errors import DataError

logger = logging.getLogger(__name__)


def load_image_stream(
    source: str | Path | HFDataset | IterableDataset,
    *,
    num_images: int | None = None,
    class_names: Sequence[str] | Mapping[str, str] | str | Path | None = None,
    images_per_class: int | None = None,
    split: str = "train",
    image_column: str = "image",
    label_column: str = "label",
    transform: ImageTransform | None = None,
    shuffle_buffer: int = 1000,
    seed: int = 0,
) -> ImageStream:
    """A stream of labelled images from shards, a dataset in memory, or the Hub.

    Args:
        source: What `open_stream` opens.
        num_images: Images per epoch; None: counted from `images_per_class`.
        class_names: A list in label order, a mapping from raw labels (such as WordNet ids) to names, or a file with
            either (`read_class_list`). None: those of the source. All of them are classes, also such that no image
            shows; only where the images are counted, those of a mapping that have none are left out.
        images_per_class: Balanced sampling: no class shows more images per epoch, in expectation. Counts the labels
            in one pass first, which reads the label column of parquet files, and all of other shards and of what lies
            on the Hub. None: natural sampling.
        split: Part to read.
        image_column: Column of the image.
        label_column: Column of the label.
        transform: Makes the pixels.
        shuffle_buffer: Rows among which the order is random.
        seed: Seed of order and augmentation.

    Raises:
        DataError: If a column is missing, there are no class names, or neither number is given.
    """
    rows = undecoded(open_stream(source, split=split), image_column)
    first = _first_row(rows, (image_column, label_column))
    names = read_class_list(class_names) if isinstance(class_names, str | Path) else class_names
    names = class_labels(rows, label_column) if names is None else names
    if names is None:
        raise DataError(f"The labels in column {label_column!r} have no names. Pass `class_names`.")
    is_mapping = isinstance(names, Mapping)
    names, label_ids = _numbered(names, first[label_column])
    keep = None
    if images_per_class is not None:
        labels = open_stream(source, split=split, columns=[label_column])
        counts = count_labels(labels, label_column, names, label_ids)
        if is_mapping and label_ids is not None:
            names, label_ids, counts = _with_images(names, label_ids, counts)
        keep, counted = balanced_shares(counts, images_per_class=images_per_class)
        num_images = counted if num_images is None else num_images
    if num_images is None:
        raise DataError("Expected `num_images`, for a stream does not know its length, or `images_per_class`.")
    columns = {"image_column": image_column, "label_column": label_column}
    order: dict[str, Any] = {"shuffle_buffer": shuffle_buffer, "seed": seed, "num_images": num_images, "keep": keep}
    return ImageStream(rows, names, label_ids=label_ids, transform=transform, **columns, **order)


def _numbered(names: Sequence[str] | Mapping[str, str], raw_label: Any) -> tuple[list[str], dict[str, int] | None]:
    """Class names in label order, and the label of each raw label where the column holds texts, as this one."""
    if isinstance(names, Mapping):
        return list(names.values()), {raw: number for number, raw in enumerate(names)}
    if isinstance(raw_label, str):
        return list(names), {name: number for number, name in enumerate(names)}
    return list(names), None


def _first_row(rows: IterableDataset, columns: Sequence[str]) -> dict[str, Any]:
    """The first row of a stream; one without rows, images or labels is refused."""
    first = next(iter(rows), None)
    if first is None:
        raise DataError("Expected a stream with rows, got none.")
    missing = [column for column in columns if column not in first]
    if missing:
        raise DataError(
            f"Expected the column {missing[0]!r}, got the columns {sorted(first)!r}. Name yours with `image_column` "
            "and `label_column`; webdataset shards name them by file endings, such as 'jpg' and 'cls'."
        )
    return first


def _with_images(
    names: Sequence[str], label_ids: Mapping[str, int], counts: Sequence[int]
) -> tuple[list[str], dict[str, int], list[int]]:
    """The classes that have images: a list such as WordNet's names far more than any dataset shows."""
    kept = [(raw, label) for raw, label in label_ids.items() if counts[label]]
    if len(kept) < len(names):
        logger.info("%d of %d named classes have no images and are left out.", len(names) - len(kept), len(names))
    numbers = {raw: number for number, (raw, _) in enumerate(kept)}
    return [names[label] for _, label in kept], numbers, [counts[label] for _, label in kept]


def balanced_shares(counts: Sequence[int], *, images_per_class: int) -> tuple[list[float], int]:
    """Share of each class's images to keep so that no class shows more than a number per epoch, in expectation.

    Args:
        counts: Images of each class in the whole stream.
        images_per_class: Largest number of a class; 16 in POMP.

    Returns:
        Shares for `ImageStream(keep=...)`, and the images per epoch that they leave.
    """
    shares = [min(1.0, images_per_class / max(count, 1)) for count in counts]
    return shares, sum(min(count, images_per_class) for count in counts)


def count_labels(
    rows: IterableDataset, label_column: str, names: Sequence[str], label_ids: Mapping[str, int] | None
) -> list[int]:
    """Images of each class in a stream, which is read once: of connected processes, the main one reads it.

    Args:
        rows: The stream, best opened with its label column alone.
        label_column: Column of the label.
        names: Class names.
        label_ids: Label of each raw label where the column holds names.

    Raises:
        DataError: If a label is that of no class.
    """
    counts, problem = np.zeros(len(names), dtype=np.int64), None
    try:
        for row in rows if is_main_process() or num_processes() == 1 else ():
            counts[label_of(row[label_column], label_ids, num_classes=len(names), column=label_column)] += 1
    except DataError as error:
        problem = error
    counts, problem = from_main((counts, problem))
    if problem is not None:
        raise problem
    return counts.tolist()
