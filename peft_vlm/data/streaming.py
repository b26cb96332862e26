"""Labelled images that are read in order and never all at once: Hub streams, parquet and webdataset shards."""

import copy
import hashlib
import itertools
import logging
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info

from peft_vlm.data.class_names import ClassNames, match_labels, read_class_list, warn_of_codes
from peft_vlm.data.dataset import Item, UnreadableImages, collate, is_hf_dataset
from peft_vlm.data.folders import choose_split, shards_of
from peft_vlm.data.images import SAMPLE, as_value_range, check_value_range, read_image, top_of
from peft_vlm.data.loading import check_own_split, load_from_hub
from peft_vlm.data.transforms import ImageTransform
from peft_vlm.distributed import from_main, is_main_process, num_processes
from peft_vlm.errors import DataError, check_list
from peft_vlm.objective import Batch
from peft_vlm.text.prompts import check_class_names

if TYPE_CHECKING:
    import datasets

MOST_UNREADABLE = 100
"""Images in a row that cannot be read before a stream is given up."""

Row = tuple[dict[str, Any], int]  # of the source, not decoded, and its label


class ImageStream(TorchIterableDataset):
    """A stream of labelled images for training, divided among processes and their workers; one kind of `RunImages`.

    An epoch is the same number of whole batches on every process; a stream that ends earlier starts over with another
    order. Which images come, their order and their augmentation depend on (`seed`, `epoch`, number of processes and
    workers) alone, so a resumed run sees what the run it continues would have seen; what it has to skip is read but
    not decoded.

    Args:
        source: Rows with an image and a label column.
        class_names: Name of label 0, 1, ...
        num_images: Images per epoch over all processes.
        label_ids: Label of each raw label, a name or a number; None: the column holds labels.
        keep: Share of each class's images that an epoch shows, in label order; None: all. See `balanced_shares`.
        transform: Makes the pixels.
        image_column: Column of the image.
        label_column: Column of the label.
        shuffle_buffer: Rows among which the order is random, beside the order of the shards; 0: the order of the
            source.
        seed: Seed of order and augmentation.
        value_range: See `read_image`.

    Raises:
        DataError: If there are no images.
    """

    has_fixed_pixels = False
    has_positions = False

    def __init__(
        self,
        source: "datasets.IterableDataset",
        class_names: Sequence[str],
        *,
        num_images: int,
        label_ids: Mapping[Any, int] | None = None,
        keep: Sequence[float] | None = None,
        transform: ImageTransform | None = None,
        image_column: str = "image",
        label_column: str = "label",
        shuffle_buffer: int = 1000,
        seed: int = 0,
        value_range: Sequence[int | float] | None = None,
    ) -> None:
        self.source, self.class_names, self.num_images = source, check_class_names(class_names), num_images
        self.label_ids, self.keep, self.transform = label_ids, keep, transform
        self.image_column, self.label_column = image_column, label_column
        self.shuffle_buffer, self.seed, self.epoch = shuffle_buffer, seed, 0
        self.value_range = as_value_range(value_range)
        self.batch_size, self.rank, self.world_size = 1, 0, 1
        self._skipped_batches = 0
        self.unreadable = UnreadableImages(max(num_images, 1))  # by place in an epoch
        if len(self) < 1:
            raise DataError(f"Expected `num_images` of at least 1, got {num_images!r}.")

    def divide(self, *, batch_size: int, rank: int, world_size: int) -> None:
        """Say how the stream is read; the trainer does.

        Args:
            batch_size: Images per batch of a process.
            rank: Number of this process.
            world_size: Number of processes.

        Raises:
            DataError: If an epoch would have no whole batch.
        """
        self.batch_size, self.rank, self.world_size = batch_size, rank, world_size
        if not self.num_batches:
            raise DataError(
                f"Expected at least {batch_size * world_size} images, a batch for each of {world_size} processes, got "
                f"`num_images`={self.num_images!r}."
            )

    @property
    def num_shards(self) -> int:
        """Shards of the source, which readers divide among them."""
        return self.source.num_shards

    @property
    def num_batches(self) -> int:
        """Batches of an epoch on each process."""
        return self.num_images // (self.batch_size * self.world_size)

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def order_facts(self) -> dict[str, Any]:
        """What decides which images an epoch shows, and in which order, beside its number and who reads it."""
        return {"images": self.num_images, "stream_seed": self.seed, "shuffle_buffer": self.shuffle_buffer}

    def for_run(self, *, skip_unreadable: bool) -> "ImageStream":
        """A view of the same rows with an epoch, a place among the processes and notes on images of its own.

        Args:
            skip_unreadable: Whether another image takes the place of one that cannot be read.
        """
        other = copy.copy(self)
        other.epoch, other._skipped_batches = 0, 0
        other.unreadable = self.unreadable.copy(skip=skip_unreadable)
        return other

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and augmentation of the next iteration."""
        self.epoch = epoch

    def check_pixels(self) -> None:
        """Look at the first images and refuse numbers of more than 8 bits without a clear range."""
        tops = [top_of(row[self.image_column]) for row in itertools.islice(self.source, SAMPLE)]
        check_value_range(tops, value_range=self.value_range, are_all=False)

    def skip_batches(self, count: int) -> None:
        """Give placeholders for the first batches of the next iteration, which a resumed run throws away.

        Args:
            count: Batches of this process.
        """
        self._skipped_batches = count

    def collate(self, items: Sequence[Item]) -> Batch:
        """Items of the stream as a batch."""
        return collate(items)

    def __iter__(self) -> Iterator[Item]:
        if self.transform is None:
            raise DataError("The stream has no transform. Set `stream.transform`, for example to `TrainTransform`.")
        worker = get_worker_info()
        number, workers = (0, 1) if worker is None else (worker.id, worker.num_workers)
        mine, skipped = (
            self.batch_size * len(range(number, batches, workers))
            for batches in (self.num_batches, self._skipped_batches)
        )
        rows, ahead = self._rows(number), deque()
        for position in range(mine):
            wanted = ahead.popleft() if ahead else next(rows)
            index = (position * workers + number) * self.world_size + self.rank
            if position < skipped:
                yield {"pixel_values": torch.zeros(1, 1, 1), "labels": wanted[1], "index": index}
                continue
            image, label = self._first_readable(wanted, ahead, rows, index)
            pixels = self.transform(image, torch.Generator().manual_seed(self._seed_of("pixels", index)))
            yield {"pixel_values": pixels, "labels": label, "index": index}

    def _first_readable(
        self, wanted: Row, ahead: "deque[Row]", rows: Iterator[Row], index: int
    ) -> tuple[Image.Image, int]:
        """Image and label of a row or, where those that cannot be read are skipped, of the next that can.

        That one is only looked at and comes in its own turn as well: a resumed run, which decodes nothing of what it
        skips, must see what the run it continues would have seen.
        """
        for step in range(MOST_UNREADABLE):
            if step > len(ahead):
                ahead.append(next(rows))
            row, label = ahead[step - 1] if step else wanted
            try:
                where = f"image {index} of the stream"
                return read_image(row[self.image_column], where=where, value_range=self.value_range), label
            except DataError as error:
                if not self.unreadable.are_skipped:
                    raise
                if not step:
                    self.unreadable.note(index % self.num_images, error)
        raise DataError(f"Expected readable images, got {MOST_UNREADABLE} in a row that are not, from {index} on.")

    def _rows(self, worker: int) -> Iterator[Row]:
        """Rows of this process and worker with their labels, without end, not decoded."""
        from datasets.distributed import split_dataset_by_node

        random = np.random.default_rng(self._seed_of("keep", self.rank, worker))
        for number in itertools.count():
            rows = self.source
            if self.shuffle_buffer:
                rows = rows.shuffle(seed=self._seed_of("order", number) % 2**32, buffer_size=self.shuffle_buffer)
            seen = 0
            for row in split_dataset_by_node(rows, self.rank, self.world_size):
                raw, seen = row[self.label_column], seen + 1
                label = _label_of(raw, self.label_ids, num_classes=len(self.class_names), column=self.label_column)
                if self.keep is None or random.random() < self.keep[label]:
                    yield row, label
            if not seen:
                raise DataError(
                    f"Worker {worker} of process {self.rank} got no rows: the stream has {self.source.num_shards} "
                    "shards. Use fewer `dataloader_num_workers`, or more shards."
                )

    def _seed_of(self, *parts: object) -> int:
        text = ",".join(map(str, (self.seed, self.epoch, *parts)))
        return int.from_bytes(hashlib.blake2b(text.encode(), digest_size=7).digest(), "little")


def _label_of(raw: Any, label_ids: Mapping[Any, int] | None, *, num_classes: int, column: str) -> int:
    """Label from 0 of a cell of the label column.

    Args:
        raw: The cell.
        label_ids: Label of each raw label, a name or a number; None: the column holds labels.
        num_classes: Number of classes.
        column: Name of the column, for the message.

    Raises:
        DataError: If the cell names none of the classes.
    """
    label = raw if label_ids is None else label_ids.get(raw, label_ids.get(str(raw)))
    if not isinstance(label, int | np.integer) or not 0 <= label < num_classes:
        raise DataError(
            f"Expected labels of {num_classes} classes, got {raw!r} in column {column!r}. Pass `class_names` that "
            "cover the stream: a list in label order, or a mapping from labels to names."
        )
    return int(label)


SHARDS = {"parquet": "*.parquet", "webdataset": "*.tar"}
MEMORY_SHARDS = 240
"""Shards of a dataset in memory: most numbers of processes and workers divide them evenly."""

#: Path, id, dataset, stream, or a mapping of splits.
StreamSource = Any


def open_stream(
    source: StreamSource, *, split: str | None = None, columns: Sequence[str] | None = None
) -> "datasets.IterableDataset":
    """Rows of a dataset that is read as a stream.

    Args:
        source: A stream; a dataset in memory; a mapping of splits; a folder with parquet files or webdataset tars
            whose names begin with the split, also in its folder `data`; or the id of a dataset on the Hub, which is
            the only case that uses the network.
        split: Part to read; None: the only one, or `train`.
        columns: Only these, of which alone parquet files are read; None: all.

    Raises:
        DataError: If a folder has no such files, or they cannot be read; or the source has no such split.
    """
    check_list("columns", columns)
    rows = _opened(source, split, None if columns is None else list(columns))
    return rows if columns is None else rows.select_columns(list(columns))


def _opened(source: Any, split: str | None, columns: list[str] | None) -> "datasets.IterableDataset":
    """Rows with at least some columns; those alone where the source can leave the others unread."""
    from datasets import IterableDataset, load_dataset

    if isinstance(source, Mapping):
        return _opened(source[choose_split(map(str, source), split, where="The dataset")], None, columns)
    if isinstance(source, IterableDataset):
        check_own_split(source, split)
        return source
    if is_hf_dataset(source):
        check_own_split(source, split)
        if not len(source):
            raise DataError("Expected a dataset with rows, got an empty one.")
        table = source if columns is None else source.select_columns(columns)
        return table.to_iterable_dataset(num_shards=min(MEMORY_SHARDS, len(source)))
    folder = Path(source)
    if not folder.is_dir():
        return load_from_hub(str(source), split or "train", streaming=True)
    for builder, pattern in SHARDS.items():
        shards = shards_of(folder, pattern, number=r"[-_.]?\d+.*")
        if not shards:
            continue
        name = choose_split(shards, split, where=repr(str(folder)))
        options = {"columns": columns} if builder == "parquet" else {}
        try:
            return load_dataset(builder, data_files={"train": shards[name]}, split="train", streaming=True, **options)
        except ValueError as error:
            raise DataError(
                f"Expected {builder} files that can be read in {str(folder)!r}, got: {error}. Files 'cls' of "
                "webdataset shards hold integers; labels that are texts, as WordNet ids, belong into 'cls.txt'."
            ) from error
    raise DataError(f"Expected '<split>*.parquet' or '<split>*.tar' in {str(folder)!r}, got neither.")


def _class_labels(source: "datasets.IterableDataset", label_column: str) -> list[str] | None:
    """Class names that the stream itself knows; None where its labels are bare numbers or texts.

    Args:
        source: The stream.
        label_column: Column of the label.
    """
    from datasets import ClassLabel

    feature = None if source.features is None else source.features.get(label_column)
    return list(feature.names) if isinstance(feature, ClassLabel) else None


def _undecoded(source: "datasets.IterableDataset", image_column: str) -> "datasets.IterableDataset":
    """The stream with image files as bytes, so that skipping a row decodes nothing.

    Args:
        source: The stream.
        image_column: Column of the image.
    """
    from datasets import Image as ImageFeature

    features = source.features
    if features is not None and isinstance(features.get(image_column), ImageFeature):
        return source.cast_column(image_column, ImageFeature(decode=False))
    return source.decode(False)


logger = logging.getLogger(__name__)


def load_image_stream(
    source: StreamSource,
    *,
    num_images: int | None = None,
    class_names: ClassNames | None = None,
    images_per_class: int | None = None,
    split: str | None = None,
    image_column: str = "image",
    label_column: str = "label",
    transform: ImageTransform | None = None,
    shuffle_buffer: int = 1000,
    seed: int = 0,
    value_range: Sequence[int | float] | None = None,
) -> ImageStream:
    """A stream of labelled images from shards, a dataset in memory, or the Hub.

    Args:
        source: What `open_stream` opens.
        num_images: Images per epoch; None: counted from `images_per_class`.
        class_names: A list in label order, a mapping from raw labels (such as WordNet ids) to names, or a file with
            either (`read_class_list`). Labels that have names are matched by name. None: those of the source. All of
            them are classes, also such that no image shows; only where the images are counted, those of a mapping
            that have none are left out.
        images_per_class: Balanced sampling: no class shows more images per epoch, in expectation. Counts the labels
            in one pass first, which reads the label column of parquet files, and all of other shards and of what lies
            on the Hub. None: natural sampling.
        split: Part to read; None: the only one, or `train`.
        image_column: Column of the image.
        label_column: Column of the label.
        transform: Makes the pixels.
        shuffle_buffer: Rows among which the order is random.
        seed: Seed of order and augmentation.
        value_range: See `read_image`.

    Raises:
        DataError: If a column is missing, there are no class names, or neither number is given.
    """
    rows = _undecoded(open_stream(source, split=split), image_column)
    first = _first_row(rows, (image_column, label_column))
    names = read_class_list(class_names) if isinstance(class_names, str | Path) else class_names
    known = _class_labels(rows, label_column)
    if names is None and known is None:
        raise DataError(f"The labels in column {label_column!r} have no names. Pass `class_names`.")
    is_mapping = isinstance(names, Mapping)
    if known is not None and isinstance(first[label_column], int):
        ids, names = match_labels(known, names)
        label_ids: dict[Any, int] | None = {place: ids[name] for place, name in enumerate(known)}
    else:
        names, label_ids = _numbered(names or [], first[label_column])
    if class_names is None:
        warn_of_codes(names)
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
    order["value_range"] = value_range
    return ImageStream(rows, names, label_ids=label_ids, transform=transform, **columns, **order)


def _numbered(names: Sequence[str] | Mapping[Any, str], raw_label: Any) -> tuple[list[str], dict[Any, int] | None]:
    """Class names in label order, and the label of each raw label where the column holds texts, as this one."""
    if isinstance(names, Mapping):
        return list(names.values()), {str(raw): number for number, raw in enumerate(names)}
    if isinstance(raw_label, str):
        return list(names), {name: number for number, name in enumerate(names)}
    return list(names), None


def _first_row(rows: "datasets.IterableDataset", columns: Sequence[str]) -> dict[str, Any]:
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
    names: Sequence[str], label_ids: Mapping[Any, int], counts: Sequence[int]
) -> tuple[list[str], dict[Any, int], list[int]]:
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
    rows: "datasets.IterableDataset", label_column: str, names: Sequence[str], label_ids: Mapping[Any, int] | None
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
            counts[_label_of(row[label_column], label_ids, num_classes=len(names), column=label_column)] += 1
    except DataError as error:
        problem = error
    counts, problem = from_main((counts, problem))
    if problem is not None:
        raise problem
    return counts.tolist()
