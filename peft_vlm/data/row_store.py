"""A tensor row per image, in memory or in a memory-mapped file."""

import logging
import shutil
import tempfile
import weakref
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor

from peft_vlm.errors import AdapterError, DataError

logger = logging.getLogger(__name__)

STORAGES = ("ram", "disk")
_MEMORY = Path("/proc/meminfo")


class RowStore:
    """Tensors of one shape by position.

    Args:
        storage: `"ram"`, or `"disk"` for a memory-mapped file.
        name: What is stored, for the log and the file.
        folder: Where the file goes, in a folder of its own that is removed with the store; the system's folder for
            temporary files by default.

    Raises:
        ValueError: If the storage is unknown.
    """

    def __init__(self, storage: str, *, name: str, folder: str | Path | None = None) -> None:
        if storage not in STORAGES:
            raise ValueError(f"Expected a storage out of {STORAGES!r} for the {name}, got {storage!r}.")
        self.storage, self.name, self.folder = storage, name, folder
        self.rows: Tensor | None = None

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
        if self.storage == "ram":
            self.rows = torch.empty(shape, dtype=dtype)
            return
        if self.folder is not None:
            Path(self.folder).mkdir(parents=True, exist_ok=True)
        # a folder of its own: two processes, or two runs, must not share a file
        folder = tempfile.mkdtemp(prefix="peft_vlm_cache_", dir=self.folder)
        weakref.finalize(self, shutil.rmtree, folder, ignore_errors=True)
        path = Path(folder) / f"{self.name.replace(' ', '_')}.bin"
        self.rows = torch.from_file(str(path), shared=True, size=count, dtype=dtype).view(shape)

    def write(self, index: Int[Tensor, " batch"], rows: Float[Tensor, "batch *row"]) -> None:
        """Store some rows; `allocate` comes first."""
        assert self.rows is not None
        self.rows[index.cpu()] = rows.to(self.rows.device, self.rows.dtype)

    def read(self, index: Int[Tensor, " batch"], device: torch.device) -> Float[Tensor, "batch *row"]:
        """Some rows on a device.

        Args:
            index: Positions.
            device: Where the rows are wanted.

        Raises:
            AdapterError: If nothing was stored.
        """
        if self.rows is None:
            raise AdapterError(
                f"Expected stored {self.name}, got none: an empty feature cache. Call `epoch_start` before training."
            )
        return self.rows[index.cpu()].to(device)


def check_room(size: int, storage: str, *, name: str, folder: str | Path | None = None) -> None:
    """Refuse what does not fit, before hours of work end in a killed process.

    Args:
        size: Bytes to store.
        storage: `"ram"` (checked on Linux only) or `"disk"`.
        name: What is stored, for the message.
        folder: Where a file goes; the system's folder for temporary files by default.

    Raises:
        DataError: If there is less room.
    """
    if storage == "disk":
        folder = Path(folder or tempfile.gettempdir())
        while not folder.exists():
            folder = folder.parent
        free = shutil.disk_usage(folder).free
    elif _MEMORY.is_file():
        line = next((line for line in _MEMORY.read_text().splitlines() if line.startswith("MemAvailable:")), None)
        free = size if line is None else 1024 * int(line.split()[1])
    else:
        return
    if size > free:
        where = "RAM" if storage == "ram" else str(folder)
        raise DataError(
            f"Expected room for {size / 2**30:.1f} GB of {name}, got {free / 2**30:.1f} GB free in {where}. Train on "
            "fewer images, store them elsewhere ('ram' or 'disk', where there is a choice), or switch the cache off "
            "('none')."
        )
