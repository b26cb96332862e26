"""Images that cannot be read: an error, or another image of the same class in their place, and counted."""

import copy
import hashlib
import logging
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any, NotRequired, Protocol, TypedDict, TypeGuard, runtime_checkable

import numpy as np
import torch
from jaxtyping import Float
from PIL import Image
from torch import Tensor
from torch.utils.data import Dataset

from peft_vlm.data.images import SAMPLE, as_value_range, check_value_range, read_image, top_of
from peft_vlm.data.transforms import EvalTransform, ImageTransform, TrainTransform
from peft_vlm.errors import DataError
from peft_vlm.objective import Batch
from peft_vlm.text.prompts import check_class_names, places_of

if TYPE_CHECKING:
    import datasets

logger = logging.getLogger(__name__)


class UnreadableImages:
    """What was found out about the images of a source, in memory that its data loader's workers share.

    Args:
        count: Rows of the source.
    """

    def __init__(self, count: int) -> None:
        self._skip = torch.zeros((), dtype=torch.bool).share_memory_()
        self._found = torch.zeros(count, dtype=torch.bool).share_memory_()

    def skip(self, skip: bool) -> None:
        """Say what happens to such an image from now on, in running workers too.

        Args:
            skip: Whether another one takes its place; False: an error, the default.
        """
        self._skip.fill_(skip)

    def copy(self, *, skip: bool) -> "UnreadableImages":
        """Notes of a training run, which begins with these where it skips such images.

        Args:
            skip: Whether another image takes the place of one that cannot be read.
        """
        other = UnreadableImages(len(self._found))
        if skip:
            other._found.copy_(self._found)
        other.skip(skip)
        return other

    @property
    def are_skipped(self) -> bool:
        """Whether another image takes the place of one that cannot be read."""
        return bool(self._skip)

    def note(self, row: int, error: DataError) -> None:
        """Count an image that another one stands in for, with a line of the log.

        Args:
            row: Row of the source.
            error: Why it cannot be read.
        """
        self._found[row] = True
        logger.warning("Another image takes the place of one that cannot be read: %s", error)

    @property
    def rows(self) -> list[int]:
        """Rows of the source whose images could not be read so far."""
        return self._found.nonzero().flatten().tolist()

    def first_readable(
        self, positions: Iterable[int], rows: Sequence[int], read: Callable[[int], Image.Image]
    ) -> tuple[int, Image.Image]:
        """The first position whose image can be read, and the image.

        Args:
            positions: The wanted position, then those that may take its place.
            rows: Row of the source at each position.
            read: Opens the image at a position.

        Raises:
            DataError: If none can be read.
        """
        problem: DataError | None = None
        for position in positions:
            if self._found[rows[position]]:
                continue
            try:
                return position, read(position)
            except DataError as error:
                self.note(rows[position], error)
                problem = error
        raise DataError("Expected at least one readable image of each class, got none of one class.") from problem


class Item(TypedDict):
    """One image as a transform left it, its label, and its position in the dataset."""

    pixel_values: NotRequired[Float[Tensor, "channels rows cols"]]
    labels: int
    index: int


@runtime_checkable
class RunImages(Protocol):
    """What a training run needs of its images: a dataset, whose images have positions, or a stream, whose have none.

    The trainer asks for `for_run` first and changes nothing but what that gives. Objectives get the same object in
    `prepare` and `epoch_start`.
    """

    #: Makes pixels; its mean, standard deviation and size are recorded with the adapter.
    transform: Any

    @property
    def class_names(self) -> Sequence[str]:
        """Name of label 0, 1, ..."""
        ...

    @property
    def unreadable(self) -> UnreadableImages:
        """What is done about images that cannot be read, and which they are."""
        ...

    @property
    def has_positions(self) -> bool:
        """Whether an image has a position that comes again in every epoch; then these are `PositionedImages`."""
        ...

    @property
    def has_fixed_pixels(self) -> bool:
        """Whether every epoch sees the same pixels, so that what a frozen model makes of them stays valid."""
        ...

    def __len__(self) -> int:
        """Images per epoch; of a stream, those that this process sees."""
        ...

    def for_run(self, *, skip_unreadable: bool) -> "RunImages":
        """A view with an epoch, repeated views and notes on unreadable images of its own; it shares the images.

        Args:
            skip_unreadable: Whether another image takes the place of one that cannot be read.
        """
        ...

    def set_epoch(self, epoch: int) -> None:
        """Draw order and augmentation of another epoch from now on."""
        ...

    def skip_batches(self, count: int) -> None:
        """Take note that a resumed run throws away the first batches of the next epoch.

        Args:
            count: Batches of this process.
        """
        ...

    def check_pixels(self) -> None:
        """Refuse images whose range of values is unclear."""
        ...

    def order_facts(self) -> dict[str, Any]:
        """What decides which images an epoch shows, beside seed, batch size and number of processes."""
        ...

    def collate(self, items: Sequence[Any]) -> Any:
        """Items as a batch."""
        ...


@runtime_checkable
class PositionedImages(RunImages, Protocol):
    """Images with positions: what caches, batch samplers and evaluation need beside `RunImages`."""

    @property
    def labels(self) -> Sequence[int]:
        """Class of the image at each position; -1 where it is unknown."""
        ...

    @property
    def epoch(self) -> int:
        """Epoch whose augmentation is drawn, from 0."""
        ...

    def __getitem__(self, index: int) -> Any:
        """What `collate` takes, for one position."""
        ...

    @property
    def is_augmented(self) -> bool:
        """Whether pixels are changed at random, which an evaluation must not do."""
        ...

    def repeat_views(self, num_views: int | None) -> None:
        """Draw the augmentation of epoch e modulo a number; None: every epoch's own.

        Args:
            num_views: Different views of each image.
        """
        ...

    def without_pixels(self) -> Any:
        """Labels and positions only, for objectives that read stored features."""
        ...


class ImageClassificationDataset(Dataset):
    """Images, labels and class names; an implementation of `PositionedImages`.

    Images are opened when they are asked for and nothing is kept, so memory does not grow with the dataset. What a
    random transform draws depends on (`seed`, `epoch`, position) alone: the number of workers changes nothing, and a
    resumed run sees the images of the run it continues.

    Args:
        source: A `datasets.Dataset`, or a sequence of mappings, with an image and a label column. Images may be
            whatever `read_image` opens.
        class_names: Name of label 0, 1, ...
        transform: Makes the pixels of an item; None until one is set.
        image_column: Column of the image.
        label_column: Column of the label, integers from 0; None for images without labels, whose label is -1.
        seed: Seed of the random transforms.
        value_range: See `read_image`.
    """

    has_positions = True

    #: Share of the images of each class that was drawn for the test of a source without parts.
    holdout = 0.0

    def __init__(
        self,
        source: "datasets.Dataset | Sequence[Mapping[str, Any]]",
        class_names: Sequence[str],
        *,
        transform: ImageTransform | None = None,
        image_column: str = "image",
        label_column: str | None = "label",
        seed: int = 0,
        value_range: Sequence[int | float] | None = None,
    ) -> None:
        check_columns(source, (image_column,) if label_column is None else (image_column, label_column))
        if is_hf_dataset(source):
            from datasets import Image as ImageFeature

            source = source.with_format(None)
            if isinstance(source.features[image_column], ImageFeature):
                source = source.cast_column(image_column, ImageFeature(decode=False))
        self.source, self.image_column = source, image_column
        # Free answers to questions have no classes.
        self.class_names = check_class_names(class_names) if isinstance(class_names, str) or len(class_names) else ()
        self.labels: list[int] = (
            [-1] * len(source) if label_column is None else _checked_labels(source, label_column, self.class_names)
        )
        self.transform, self.seed, self.value_range = transform, seed, as_value_range(value_range)
        self._num_views: int | None = None
        self._rows: Sequence[int] = range(len(self.labels))
        #: What is done about images that cannot be read; subsets share it.
        self.unreadable = UnreadableImages(len(self.labels))
        self.decoded: Any = None  # `feature_store.DecodedImages`, which views and subsets share
        # In shared memory, because workers that live on between epochs hold a copy of the dataset.
        self._epoch = torch.zeros((), dtype=torch.long).share_memory_()

    @property
    def epoch(self) -> int:
        """Epoch whose augmentation is drawn, from 0."""
        return int(self._epoch)

    def for_run(self, *, skip_unreadable: bool) -> "ImageClassificationDataset":
        """A view of the same images with an epoch, repeated views and notes on unreadable images of its own.

        Args:
            skip_unreadable: Whether another image takes the place of one that cannot be read.
        """
        other = copy.copy(self)
        other._epoch = torch.zeros((), dtype=torch.long).share_memory_()
        other._num_views = None
        other.unreadable = self.unreadable.copy(skip=skip_unreadable)
        return other

    def order_facts(self) -> dict[str, Any]:
        """What decides which images an epoch shows, beside seed, batch size and number of processes."""
        return {"images": len(self), "image_seed": self.seed}

    def skip_batches(self, count: int) -> None:
        """Do nothing: batches that a resumed run throws away are skipped by position, unread.

        Args:
            count: Batches of this process.
        """

    def set_epoch(self, epoch: int) -> None:
        """Draw the augmentation of another epoch from now on, in running workers too."""
        self._epoch.fill_(epoch)

    def repeat_views(self, num_views: int | None) -> None:
        """Draw the augmentation of epoch e modulo a number from now on; None: every epoch's own (the default).

        Set here and not by `set_epoch`, which data loaders call too.

        Args:
            num_views: Different views of each image.
        """
        self._num_views = num_views

    @property
    def has_fixed_pixels(self) -> bool:
        """Whether every epoch sees the same pixels, so that what a frozen model makes of them stays valid."""
        return isinstance(self.transform, EvalTransform)

    @property
    def is_augmented(self) -> bool:
        """Whether the transform is one of training."""
        return isinstance(self.transform, TrainTransform)

    def __len__(self) -> int:
        return len(self._rows)

    def image(self, index: int) -> Image.Image:
        """The image at a position, in RGB and without the transform.

        Args:
            index: Position in this dataset.

        Raises:
            DataError: If the image cannot be read; the message names position, row of the source, and file.
        """
        row = self._rows[index]
        if self.decoded is not None and (found := self.decoded.read(row)) is not None:
            return found
        where = f"image {index}" if row == index else f"image {index} (row {row} of the source)"
        image = read_image(self.source[row][self.image_column], where=where, value_range=self.value_range)
        if self.decoded is not None:
            self.decoded.write(row, image)
        return image

    def path_of(self, index: int) -> str:
        """The file of an image, as the source names it; empty where it has none.

        Args:
            index: Position of the image.
        """
        cell = self.source[self._rows[index]][self.image_column]
        if isinstance(cell, dict):
            cell = cell.get("path")
        return str(cell if isinstance(cell, str | Path) else getattr(cell, "filename", None) or "")

    def source_rows(self) -> list[int]:
        """Rows of the source that have a position here, each once, in their order."""
        return sorted(set(self._rows))

    def some_images(self, count: int) -> list[Any]:
        """Images as the source holds them, not opened: evenly spaced, all if there are no more.

        Args:
            count: How many, at most.
        """
        rows = self._rows[:: max(1, math.ceil(len(self._rows) / count))]
        return [self.source[row][self.image_column] for row in rows]

    def check_pixels(self) -> None:
        """Look at some images, and refuse numbers of more than 8 bits without a clear range."""
        tops = [top_of(cell) for cell in self.some_images(SAMPLE)]
        check_value_range(tops, value_range=self.value_range, are_all=len(tops) == len(self))

    def __getitem__(self, index: int) -> Item:
        if self.transform is None:
            raise DataError(
                "The dataset has no transform and its images have no common size. Set `dataset.transform`, for "
                "example to `EvalTransform(image_processor)`."
            )
        position, image = self._readable(index)
        pixels = self.transform(image, self._generator(index))
        return {"pixel_values": pixels, "labels": self.labels[position], "index": index}

    def _readable(self, index: int) -> tuple[int, Image.Image]:
        """The image at a position; in place of one that cannot be read, where this is allowed, the next of its class
        and its position.
        """
        if not self.unreadable.are_skipped:
            return index, self.image(index)
        label, count = self.labels[index], len(self._rows)
        others = ((index + step) % count for step in range(count))
        same = (position for position in others if self.labels[position] == label)
        return self.unreadable.first_readable(same, self._rows, self.image)

    def collate(self, items: Sequence[Item]) -> Batch:
        """Items of this dataset as a batch, see `collate`; other kinds of dataset make batches of other columns."""
        return collate(items)

    def without_pixels(self) -> "LabelDataset":
        """Labels and positions only, for objectives that read stored features."""
        return LabelDataset(self)

    def with_transform(self, transform: ImageTransform | None) -> "ImageClassificationDataset":
        """The same images under another transform; this dataset keeps its own."""
        other = self.select(range(len(self)))
        other.transform = transform
        return other

    def select(self, indices: Sequence[int]) -> "ImageClassificationDataset":
        """The images at some positions, in that order, with the same classes.

        Args:
            indices: Positions in this dataset; one may come several times.

        Raises:
            DataError: If a position is out of range.
        """
        wrong = [i for i in indices if not 0 <= i < len(self)]
        if wrong:
            raise DataError(f"Expected positions from 0 to {len(self) - 1}, got {wrong[:5]!r}.")
        return self._subset(indices, [self.labels[i] for i in indices], self.class_names)

    def restrict(self, class_ids: Sequence[int]) -> "ImageClassificationDataset":
        """The images of some classes, relabelled from 0 in the order given.

        Args:
            class_ids: Labels of this dataset; the first becomes class 0.

        Raises:
            DataError: If a class does not exist or comes twice.
        """
        wrong = [c for c in class_ids if not 0 <= c < len(self.class_names)]
        if wrong or len(set(class_ids)) != len(class_ids):
            raise DataError(
                f"Expected different class ids from 0 to {len(self.class_names) - 1}, got {list(class_ids)!r}."
            )
        new_label = {old: new for new, old in enumerate(class_ids)}
        kept = [i for i, label in enumerate(self.labels) if label in new_label]
        names = tuple(self.class_names[c] for c in class_ids)
        return self._subset(kept, [new_label[self.labels[i]] for i in kept], names)

    def with_class_names(self, class_names: Sequence[str]) -> "ImageClassificationDataset":
        """The same images with labels among another list of classes, matched by name.

        Args:
            class_names: Names of all classes that have images, found by `places_of`, in any order, and others.

        Raises:
            DataError: If a class is not among them.
        """
        places = places_of(self.class_names, check_class_names(class_names))
        missing = [name for name, place in zip(self.class_names, places, strict=True) if place is None]
        if missing:
            raise DataError(
                f"{len(missing)} of {len(self.class_names)} classes of the images are not among the "
                f"{len(class_names)} class names, the first is {missing[0]!r}."
            )
        labels = [places[label] if label >= 0 else label for label in self.labels]
        return self._subset(range(len(self)), labels, tuple(class_names))

    def group_by(self, column: str) -> dict[str, "ImageClassificationDataset"]:
        """One dataset per value of a further column of the source, such as a domain; all keep all class names.

        Args:
            column: Name of the column.
        """
        check_columns(self.source, (column,))
        cells = _cells(self.source, column)
        groups: dict[str, list[int]] = {}
        for position, row in enumerate(self._rows):
            groups.setdefault(str(cells[row]), []).append(position)
        return {name: self.select(positions) for name, positions in sorted(groups.items())}

    def _subset(
        self, indices: Sequence[int], labels: list[int], names: tuple[str, ...]
    ) -> "ImageClassificationDataset":
        other = copy.copy(self)
        other._rows = [self._rows[i] for i in indices]
        other.labels, other.class_names = labels, names
        other._epoch = self._epoch.clone().share_memory_()
        return other

    def _generator(self, index: int) -> torch.Generator:
        epoch = int(self._epoch)
        epoch = epoch % self._num_views if self._num_views else epoch
        digest = hashlib.blake2b(f"{self.seed},{epoch},{index}".encode(), digest_size=8).digest()
        return torch.Generator().manual_seed(int.from_bytes(digest, "little"))


class LabelDataset(Dataset):
    """Labels and positions of an image dataset.

    Args:
        images: The dataset that the positions refer to.
    """

    def __init__(self, images: ImageClassificationDataset) -> None:
        self.images = images

    def __len__(self) -> int:
        return len(self.images)

    def __getitem__(self, index: int) -> Item:
        return {"labels": self.images.labels[index], "index": index}

    def collate(self, items: Sequence[Item]) -> Batch:
        """Items of this dataset as a batch without pixels."""
        return collate(items)


def collate(items: Sequence[Item]) -> Batch:
    """Stack items to a batch; without pixels when the items have none.

    Args:
        items: What a dataset gave, all with pixels or all without.

    Returns:
        `labels` and `index` as int64, `pixel_values` as float32.

    Raises:
        DataError: If the images differ in size.
    """
    batch: Batch = {
        "labels": torch.tensor([item["labels"] for item in items]),
        "index": torch.tensor([item["index"] for item in items]),
    }
    pixels = [item["pixel_values"] for item in items if "pixel_values" in item]
    if not pixels:
        return batch
    shapes = {tuple(p.shape) for p in pixels}
    if len(shapes) > 1:
        raise DataError(
            f"Expected images of one size, got {sorted(shapes)!r}. Use a transform with a fixed size, such as "
            "`EvalTransform` with an image processor that crops or resizes to a square."
        )
    batch["pixel_values"] = torch.stack(pixels)
    return batch


def is_hf_dataset(source: Any) -> "TypeGuard[datasets.Dataset]":
    """Tell whether a source is a `datasets.Dataset`, without loading that library, which takes most of a second.

    Args:
        source: Rows of any kind.
    """
    library = sys.modules.get("datasets")
    return library is not None and isinstance(source, library.Dataset)


def check_columns(source: "datasets.Dataset | Sequence[Mapping[str, Any]]", names: Sequence[str]) -> None:
    """Refuse a source without rows or without some column.

    Args:
        source: A `datasets.Dataset` or a sequence of mappings.
        names: Columns that must be there.

    Raises:
        DataError: Naming the missing column and those that are there.
    """
    if not len(source):
        raise DataError("The dataset has no rows. Check the split name and the path.")
    columns = source.column_names if is_hf_dataset(source) else list(source[0])
    missing = [name for name in names if name not in columns]
    if missing:
        raise DataError(
            f"Expected the columns {list(names)!r}, got {columns!r}. Name the right ones with `image_column` and "
            "`label_column`."
        )


def _cells(source: "datasets.Dataset | Sequence[Mapping[str, Any]]", column: str) -> list[Any]:
    return source[column][:] if is_hf_dataset(source) else [row[column] for row in source]


def _checked_labels(
    source: "datasets.Dataset | Sequence[Mapping[str, Any]]", column: str, class_names: Sequence[str]
) -> list[int]:
    labels = _cells(source, column)
    for index, label in enumerate(labels):
        if not isinstance(label, int | np.integer) or not 0 <= label < len(class_names):
            raise DataError(
                f"Expected labels from 0 to {len(class_names) - 1} for {len(class_names)} class names, got {label!r} "
                f"at image {index}. Give every class a name; `load_unlabelled_images` reads images without labels."
            )
    return [int(label) for label in labels]
