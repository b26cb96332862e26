"""Labelled images that are read in order and never all at once: Hub streams, parquet and webdataset shards."""

import hashlib
import itertools
from collections import deque
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from datasets import IterableDataset
from datasets.distributed import split_dataset_by_node
from PIL import Image
from torch.utils.data import IterableDataset as TorchIterableDataset
from torch.utils.data import get_worker_info

from peft_vlm.data.dataset import Item, collate
from peft_vlm.data.images import read_image
from peft_vlm.data.transforms import ImageTransform
from peft_vlm.data.unreadable import UnreadableImages
from peft_vlm.errors import DataError
from peft_vlm.shapes import Batch

MOST_UNREADABLE = 100
"""Images in a row that cannot be read before a stream is given up."""

Row = tuple[dict[str, Any], int]  # of the source, not decoded, and its label


class ImageStream(TorchIterableDataset):
    """A stream of labelled images for training, divided among processes and their workers.

    An epoch is the same number of whole batches on every process; a stream that ends earlier starts over with another
    order. Which images come, their order and their augmentation depend on (`seed`, `epoch`, number of processes and
    workers) alone, so a resumed run sees what the run it continues would have seen; what it has to skip is read but
    not decoded.

    Args:
        source: Rows with an image and a label column.
        class_names: Name of label 0, 1, ...
        num_images: Images per epoch over all processes.
        label_ids: Label of each raw label where the column holds names; None: it holds integers.
        keep: Share of each class's images that an epoch shows, in label order; None: all. See `balanced_shares`.
        transform: Makes the pixels.
        image_column: Column of the image.
        label_column: Column of the label.
        shuffle_buffer: Rows among which the order is random, beside the order of the shards; 0: the order of the
            source.
        seed: Seed of order and augmentation.

    Raises:
        DataError: If there are no images.
    """

    has_fixed_pixels = False

    def __init__(
        self,
        source: IterableDataset,
        class_names: Sequence[str],
        *,
        num_images: int,
        label_ids: Mapping[str, int] | None = None,
        keep: Sequence[float] | None = None,
        transform: ImageTransform | None = None,
        image_column: str = "image",
        label_column: str = "label",
        shuffle_buffer: int = 1000,
        seed: int = 0,
    ) -> None:
        self.source, self.class_names, self.num_images = source, tuple(class_names), num_images
        self.label_ids, self.keep, self.transform = label_ids, keep, transform
        self.image_column, self.label_column = image_column, label_column
        self.shuffle_buffer, self.seed, self.epoch = shuffle_buffer, seed, 0
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
    def num_batches(self) -> int:
        """Batches of an epoch on each process."""
        return self.num_images // (self.batch_size * self.world_size)

    def __len__(self) -> int:
        return self.num_batches * self.batch_size

    def order_facts(self) -> dict[str, Any]:
        """What decides which images an epoch shows, and in which order, beside its number and who reads it."""
        return {"images": self.num_images, "stream_seed": self.seed, "shuffle_buffer": self.shuffle_buffer}

    def set_epoch(self, epoch: int) -> None:
        """Choose the order and augmentation of the next iteration."""
        self.epoch = epoch

    def repeat_views(self, num_views: int | None) -> None:
        """Nothing to do: a stream repeats no views; the trainer calls this with None.

        Args:
            num_views: Only None.

        Raises:
            DataError: For a number of views.
        """
        if num_views is not None:
            raise DataError("Expected a dataset with positions for repeated views, got a stream.")

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
                return read_image(row[self.image_column], where=f"image {index} of the stream"), label
            except DataError as error:
                if not self.unreadable.are_skipped:
                    raise
                if not step:
                    self.unreadable.note(index % self.num_images, error)
        raise DataError(f"Expected readable images, got {MOST_UNREADABLE} in a row that are not, from {index} on.")

    def _rows(self, worker: int) -> Iterator[Row]:
        """Rows of this process and worker with their labels, without end, not decoded."""
        random = np.random.default_rng(self._seed_of("keep", self.rank, worker))
        for number in itertools.count():
            rows = self.source
            if self.shuffle_buffer:
                rows = rows.shuffle(seed=self._seed_of("order", number) % 2**32, buffer_size=self.shuffle_buffer)
            seen = 0
            for row in split_dataset_by_node(rows, self.rank, self.world_size):
                raw, seen = row[self.label_column], seen + 1
                label = label_of(raw, self.label_ids, num_classes=len(self.class_names), column=self.label_column)
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


def label_of(raw: Any, label_ids: Mapping[str, int] | None, *, num_classes: int, column: str) -> int:
    """Label from 0 of a cell of the label column.

    Args:
        raw: The cell.
        label_ids: Label of each raw label where the column holds names; None: it holds integers.
        num_classes: Number of classes.
        column: Name of the column, for the message.

    Raises:
        DataError: If the cell names none of the classes.
    """
    label = raw if label_ids is None else label_ids.get(raw)
    if not isinstance(label, int | np.integer) or not 0 <= label < num_classes:
        raise DataError(
            f"Expected labels of {num_classes} classes, got {raw!r} in column {column!r}. Pass `class_names` that "
            "cover the stream: a list in label order, or a mapping from labels to names."
        )
    return int(label)
