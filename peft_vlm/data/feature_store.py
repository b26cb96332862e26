"""A tensor row per image, in memory or in a memory-mapped file."""

import logging
import platform
import shutil
import tempfile
import uuid
import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from jaxtyping import Float, Int
from PIL import Image
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_vlm.data.dataset import ImageClassificationDataset, collate
from peft_vlm.data.images import num_pixels
from peft_vlm.distributed import (
    all_agree,
    equal_passes,
    from_main,
    gather_rows,
    local_place,
    num_processes,
    part_of,
    process_index,
    progress_bar,
    wait_for_everyone,
)
from peft_vlm.errors import AdapterError, DataError, check_choice
from peft_vlm.models.towers import device_of, image_features

logger = logging.getLogger(__name__)

STORAGES = ("ram", "disk")
_MEMORY = Path("/proc/meminfo")
_SHARED_MEMORY = Path("/dev/shm")


class RowStore:
    """Tensors of one shape by position.

    The processes of one machine share the rows, each having filled a part of them (`divided_pass`); all of them call
    `allocate` and `complete` together.

    Args:
        storage: `"ram"`, or `"disk"` for a memory-mapped file.
        name: Name of the stored values, for the log and the file.
        folder: Folder of the file; the system's folder for temporary files by default. It has no name once it is
            open, so that nothing is left of it, however the run ends.

    Raises:
        ValueError: If the storage is unknown.
    """

    def __init__(self, storage: str, *, name: str, folder: str | Path | None = None) -> None:
        check_choice("storage", storage, STORAGES)
        self.storage, self.name, self.folder = storage, name, folder
        self.rows: Tensor | None = None

    @property
    def megabytes(self) -> float:
        """Size of all rows in MB (2**20 bytes)."""
        return 0.0 if self.rows is None else self.rows.numel() * self.rows.element_size() / 2**20

    def allocate(self, shape: tuple[int, ...], dtype: torch.dtype) -> None:
        """Reserve room, once; the size is logged first.

        Args:
            shape: Number of rows, then the shape of a row.
            dtype: dtype of the stored tensors.

        Raises:
            DataError: If there is less room than that.
        """
        if self.rows is not None and self.rows.shape == shape and self.rows.dtype == dtype:
            return
        count = torch.Size(shape).numel()
        megabytes = count * dtype.itemsize / 2**20
        sizes = " x ".join(str(size) for size in shape)
        logger.info("Storing %s: %s numbers = %.1f MB in %s", self.name, sizes, megabytes, self.storage)
        check_room(count * dtype.itemsize, self.storage, name=self.name, folder=self.folder)
        if self.storage == "ram" and local_place()[1] == 1:
            self.rows = torch.empty(shape, dtype=dtype)
        else:
            self.rows = self._mapped(count, dtype).view(shape)

    def _mapped(self, count: int, dtype: torch.dtype) -> Tensor:
        """A tensor in a file that the processes of this machine share; in memory-backed storage for `"ram"`."""
        leads, parent = local_place()[0] == 0, Path(self.folder or tempfile.gettempdir())
        if self.storage == "ram" and _SHARED_MEMORY.is_dir():
            parent = _SHARED_MEMORY
        # The name of the machine, because several may see one folder and each has a file of its own.
        folder = parent / f"peft_vlm_cache_{from_main(uuid.uuid4().hex)}_{platform.node()}"
        path, problem = folder / f"{self.name.replace(' ', '_')}.bin", None
        if leads:
            try:
                check_room(count * dtype.itemsize, "disk", name=self.name, folder=parent)
                folder.mkdir(parents=True)
                rows = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
            except (OSError, RuntimeError, DataError) as error:
                problem = error
        if not all_agree(problem is None):
            shutil.rmtree(folder, ignore_errors=True)
            raise problem or DataError(f"Another process found no room for the {self.name}; see its message.")
        if not leads:
            rows = torch.from_file(str(path), shared=True, size=count, dtype=dtype)
        wait_for_everyone()
        if leads:
            shutil.rmtree(folder, ignore_errors=True)  # the open file stays; systems that cannot do so keep it ...
            weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)  # ... until the store is gone
        return rows

    def complete(self) -> None:
        """Wait until every process has written its rows."""
        wait_for_everyone()

    def write(self, index: Int[Tensor, " batch"], rows: Float[Tensor, "batch *row"]) -> None:
        """Store some rows; `allocate` comes first."""
        assert self.rows is not None
        self.rows[index.cpu()] = rows.to(self.rows.device, self.rows.dtype)

    def read(self, index: Int[Tensor, " batch"], device: torch.device) -> Float[Tensor, "batch *row"]:
        """Some rows on a device.

        Args:
            index: Positions.
            device: Device of the result.

        Raises:
            AdapterError: If nothing was stored.
        """
        if self.rows is None:
            raise AdapterError(
                f"Expected stored {self.name}, got none: an empty feature cache. Call `epoch_start` before training."
            )
        return self.rows[index.cpu()].to(device)


class DecodedImages:
    """Images of a dataset in 8-bit RGB, each decoded once, by whichever worker reads it first.

    Workers and the processes of a machine share the bytes, so memory does not grow with their number. All processes
    of a training make one together.

    Args:
        images: Dataset; the headers of its images are read here, which says how much room they take.
        storage: `"ram"`, or `"disk"` for a memory-mapped file.

    Raises:
        DataError: If there is less room than that.
    """

    def __init__(self, images: ImageClassificationDataset, storage: str) -> None:
        rows = images.source_rows()
        sizes = torch.tensor([3 * num_pixels(images.source[row][images.image_column]) for row in rows])
        self._store = RowStore(storage, name="decoded images")
        self._store.allocate((max(1, int(sizes.sum())),), torch.uint8)
        assert self._store.rows is not None, "`allocate` makes them"
        self._bytes = self._store.rows if storage == "disk" else self._store.rows.share_memory_()
        self._starts = torch.full((len(images.source),), -1).index_copy(0, torch.tensor(rows), sizes.cumsum(0) - sizes)
        self._sizes = torch.zeros(len(images.source), dtype=torch.long).index_copy(0, torch.tensor(rows), sizes)
        self._heights = torch.zeros(len(images.source), dtype=torch.int32).share_memory_()

    def read(self, row: int) -> Image.Image | None:
        """The image of a row of the source; None where it is not there yet.

        Args:
            row: Row of the source.
        """
        height, start = int(self._heights[row]), int(self._starts[row])
        if not height:
            return None
        pixels = self._bytes[start : start + int(self._sizes[row])].view(height, -1, 3)
        return Image.fromarray(pixels.numpy())

    def write(self, row: int, image: Image.Image) -> None:
        """Keep the image of a row of the source, unless its header had announced another size.

        Args:
            row: Row of the source.
            image: As `read_image` gives it.
        """
        pixels = torch.from_numpy(np.array(image)).flatten()
        if len(pixels) == self._sizes[row]:
            start = int(self._starts[row])
            self._bytes[start : start + len(pixels)] = pixels
            self._heights[row] = image.size[1]  # last: from now on other workers read the bytes


def keep_decoded(images: Any, storage: str, *, reads_once: bool) -> Any:
    """Let images keep what they decode for the epochs to come; the same images.

    Args:
        images: Images of a run.
        storage: `"ram"`, `"disk"`, or `"none"`.
        reads_once: Whether the run stores features of pixels that never change, and reads each image once.

    Raises:
        DataError: If nothing would be read twice from there.
    """
    if storage == "none":
        return images
    if reads_once or not isinstance(images, ImageClassificationDataset):
        why = "the objective stores features, and reads each image once" if reads_once else "a stream has no positions"
        raise DataError(f"Expected `decoded_images='none'`, got {storage!r}: {why}.")
    images.decoded = DecodedImages(images, storage)
    return images


def divided_pass(dataset: Any, *, batch_size: int, num_workers: int = 0) -> DataLoader:
    """One pass over a dataset in its order, divided among the processes of this machine: batches of this one's part.

    Args:
        dataset: Images with a `collate`.
        batch_size: Images per batch.
        num_workers: Processes that decode images.
    """
    index, parts = local_place()
    wait_for_everyone()  # none may still read what is about to be overwritten
    options: dict[str, Any] = {"collate_fn": dataset.collate, "num_workers": num_workers}
    if parts == 1:
        return DataLoader(dataset, batch_size=batch_size, **options)
    rows = part_of(len(dataset), index=index, parts=parts)
    passes = equal_passes(rows, total=len(dataset), parts=parts, size=batch_size)
    return DataLoader(dataset, batch_sampler=[rows.tolist() for rows in passes], **options)


#: Pixels of a batch -> a row of features per image.
Encoder = Callable[[Float[Tensor, "batch channels rows cols"]], Float[Tensor, "batch *row"]]


class ViewCache:
    """Features of the training images in the views that an epoch sees of them.

    Each view is computed in one pass over the dataset, in its order, so that a resumed run computes the same numbers.

    Args:
        store: Where the features are kept.
        num_views: Augmented views per image that come again, view v being the augmentation of epoch v; None: every
            epoch has its own, which takes the place of the one before.
        batch_size: Images per forward pass; bounds the working memory.
        num_workers: Processes that read images.
    """

    def __init__(self, store: RowStore, *, num_views: int | None, batch_size: int, num_workers: int) -> None:
        self.store, self.num_views = store, num_views
        self.batch_size, self.num_workers = batch_size, num_workers
        self._filled: set[int] = set()
        self._offset, self._has_shown = 0, False
        self._owners: tuple[object, ...] = ()

    def bind(self, *owners: object) -> None:
        """Forget what was stored for other images or models.

        Args:
            *owners: Dataset and models that the features come from.
        """
        if len(owners) != len(self._owners) or any(a is not b for a, b in zip(owners, self._owners, strict=True)):
            self._filled.clear()
            self._owners = owners

    def start_epoch(
        self, encode: Encoder, dataset: ImageClassificationDataset, epoch: int, *, device: torch.device
    ) -> None:
        """Choose the epoch's view, and compute its features unless they are there.

        Args:
            encode: Features of a batch.
            dataset: Training images, which repeat their views (`repeat_views`) if this does; their epoch is set.
            epoch: Number of the epoch, from 0.
            device: Where `encode` runs.
        """
        total = self.num_views or 1
        view = epoch % total
        self._offset = view * len(dataset)
        if view in self._filled:
            return
        loader = divided_pass(dataset, batch_size=self.batch_size, num_workers=self.num_workers)
        title = f"Storing {self.store.name}" + (f", view {view + 1} of {total}" if total > 1 else "")
        seen_before = self.num_views is None and self._has_shown  # a bar per epoch would stand in that of the run
        progress = progress_bar(
            loader, desc=title, leave=False, disable=seen_before or (len(loader) < 2 and total == 1)
        )
        self._has_shown = True
        for batch in progress:
            with torch.no_grad():
                features = encode(batch["pixel_values"].to(device))
            self.store.allocate((total * len(dataset), *features.shape[1:]), features.dtype)
            self.store.write(batch["index"] + self._offset, features)
            progress.set_postfix_str(f"{self.store.megabytes:.1f} MB in {self.store.storage}")
            del batch, features  # or they would live on beside the next batch
        self.store.complete()
        if self.num_views:
            self._filled.add(view)

    def fill(self, encode: Encoder, dataset: ImageClassificationDataset, *, device: torch.device) -> None:
        """Compute the features of every view now; the dataset keeps its epoch.

        Args:
            encode: Features of a batch.
            dataset: Training images that repeat their views.
            device: Where `encode` runs.
        """
        epoch, total = dataset.epoch, self.num_views or 1
        for view in range(total):
            dataset.set_epoch(view)
            self.start_epoch(encode, dataset, view, device=device)
        dataset.set_epoch(epoch)
        self._offset = epoch % total * len(dataset)

    def read(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch *row"]:
        """Features of some images in this epoch's view, on the device of their positions.

        Args:
            index: Positions in the dataset.
        """
        return self.store.read(index + self._offset, index.device)


def should_store(setting: str, dataset: Any, *, num_views: int | None) -> tuple[bool, str]:
    """Return whether features of training images are stored, and why: as a setting says, or where it is `"auto"`, if
    images come again unchanged.

    Args:
        setting: `"auto"`, a place, or `"none"`.
        dataset: Training images.
        num_views: Augmented views that come again; None if every epoch has new ones.
    """
    if setting != "auto":
        return setting != "none", "as the settings say"
    if dataset.has_fixed_pixels:
        return True, "every epoch sees the same pixels"
    if num_views:
        return True, f"{num_views} views of each image come again"
    return False, "every epoch has new augmentation, so that nothing would be read twice"


def check_views(num_views: int | None, image_cache: str) -> None:
    """Refuse a number of views that cannot be, or that nothing would store.

    Args:
        num_views: Augmented views that come again, or None.
        image_cache: Where features are stored.

    Raises:
        ValueError: Saying what is possible.
    """
    if num_views is not None and (isinstance(num_views, bool) or not isinstance(num_views, int) or num_views < 1):
        raise ValueError(f"Expected `num_views` of 1 or more, or None, got {num_views!r}.")
    if num_views is not None and image_cache == "none":
        raise ValueError(
            f"Expected stored features for `num_views`={num_views}, got `image_cache`='none'. Use 'auto'."
        )


def check_room(size: int, storage: str, *, name: str, folder: str | Path | None = None) -> None:
    """Refuse a store that does not fit, before hours of work end in a killed process.

    Args:
        size: Bytes to store.
        storage: `"ram"` (checked on Linux only) or `"disk"`.
        name: Name of the stored values, for the message.
        folder: Folder of the file; the system's folder for temporary files by default.

    Raises:
        DataError: If there is less room.
    """
    if storage == "disk":
        folder = Path(folder or tempfile.gettempdir())
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
    else:
        free = _free_ram()
    if free is not None and size > free:
        where = "RAM" if storage == "ram" else str(folder)
        raise DataError(
            f"Expected room for {size / 2**30:.1f} GB of {name}, got {free / 2**30:.1f} GB free in {where}. Train on "
            "fewer images, store them elsewhere ('ram' or 'disk', where there is a choice), or switch the cache off "
            "('none')."
        )


def _free_ram() -> int | None:
    """Bytes of free memory; None on systems other than Linux."""
    if not _MEMORY.is_file():
        return None
    line = next((line for line in _MEMORY.read_text().splitlines() if line.startswith("MemAvailable:")), None)
    return None if line is None else 1024 * int(line.split()[1])


@torch.no_grad()
def all_image_features(
    model: nn.Module,
    dataset: ImageClassificationDataset,
    *,
    batch_size: int = 64,
    num_workers: int = 0,
    divide: bool = False,
) -> Float[Tensor, "images dim"]:
    """Projected image features of a dataset, not normalised, in float32 on the CPU.

    Args:
        model: Model in evaluation mode.
        dataset: Images with a transform.
        batch_size: Images per forward pass.
        num_workers: Processes that decode images.
        divide: Divide the images among the processes of the training, which must all call this; all get all features.
    """
    device = device_of(model)
    index, parts = (process_index(), num_processes()) if divide else (0, 1)
    part = part_of(len(dataset), index=index, parts=parts)
    passes = equal_passes(part, total=len(dataset), parts=parts, size=batch_size)
    loader = DataLoader(
        dataset, batch_sampler=[rows.tolist() for rows in passes], collate_fn=collate, num_workers=num_workers
    )
    progress = progress_bar(loader, desc="Image features", leave=False, disable=len(loader) < 10)
    chunks = [image_features(model, batch["pixel_values"].to(device)).float() for batch in progress]
    features = torch.cat(chunks)[: len(part)]
    return (gather_rows(features) if divide else features).cpu()
