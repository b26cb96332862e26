"""The clean side of FCA: visual tokens of images without the prompt, computed once where pictures stay the same."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_vlm.adapters.pixel_prompt import without_prompt
from peft_vlm.data.feature_store import STORAGES, RowStore, divided_pass
from peft_vlm.errors import DataError
from peft_vlm.methods.tvp.frozen import hold_still, on_device
from peft_vlm.methods.tvp.tasks import Task

CACHES = (*STORAGES, "none")


class CleanTokens:
    """Visual tokens of the shrunken images without the prompt, by position in the dataset.

    Args:
        task: Makes the tokens.
        cache: One of `CACHES`.
        folder: Where the file of `"disk"` goes; the system's folder for temporary files by default.
        batch_size: Images per forward pass while caching.
        num_workers: Processes that decode images while caching.

    Raises:
        ValueError: If the cache is unknown.
    """

    def __init__(
        self, task: Task, *, cache: str, folder: str | Path | None, batch_size: int, num_workers: int
    ) -> None:
        if cache not in CACHES:
            raise ValueError(f"Expected `fca_cache` to be one of {CACHES!r}, got {cache!r}.")
        self.task, self.cache, self.folder = task, cache, folder
        self.batch_size, self.num_workers = batch_size, num_workers
        self._store: RowStore | None = None

    def clear(self) -> None:
        """Forget what is stored: another model or dataset follows."""
        self._store = None

    def fill(self, model: nn.Module, dataset: Any) -> None:
        """Compute the tokens of all images in their order, once, if every epoch shows the same pictures.

        Args:
            model: `PeftModel` with an active pixel prompt.
            dataset: Training images or questions.

        Raises:
            DataError: If images have different numbers of visual tokens.
        """
        if self.cache == "none" or self._store is not None or not dataset.has_fixed_pixels:
            return
        store = RowStore(self.cache, name="clean visual tokens", folder=self.folder)
        device = next(model.parameters()).device
        loader = divided_pass(dataset, batch_size=self.batch_size, num_workers=self.num_workers)
        hold_still(model)
        for batch in tqdm(loader, desc="Clean visual tokens", leave=False, disable=len(loader) < 10):
            batch = on_device(batch, device)
            rows = self._by_row(model, batch, self.compute(model, batch))
            if store.rows is not None and store.rows.shape[1:] != rows.shape[1:]:
                different = f"{store.rows.shape[1]} and {rows.shape[1]} tokens"
                raise DataError(_UNEVEN.format(different))
            store.allocate((len(dataset), *rows.shape[1:]), rows.dtype)
            store.write(batch["index"], rows)
        store.complete()
        self._store = store

    def get(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "tokens width"]:
        """The tokens of a batch, stored or computed.

        Args:
            model: `PeftModel` with an active pixel prompt.
            batch: `index` where they are stored, else the columns of the task.
        """
        if self._store is None:
            return self.compute(model, batch)
        return self._store.read(batch["index"], batch["index"].device).flatten(0, 1)

    @torch.no_grad()
    def compute(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "tokens width"]:
        """The tokens of a batch, computed.

        Args:
            model: `PeftModel` with an active pixel prompt.
            batch: Columns of the task.
        """
        with without_prompt(model):
            return self.task.encode(model, batch)

    def _by_row(
        self, model: nn.Module, batch: Mapping[str, Tensor], tokens: Float[Tensor, "tokens width"]
    ) -> Float[Tensor, "batch tokens_per_row width"]:
        counts = self.task.count(model, batch)
        if int(counts.min()) != int(counts.max()):
            raise DataError(_UNEVEN.format(f"{int(counts.min())} to {int(counts.max())} tokens"))
        return tokens.view(len(counts), -1, tokens.shape[-1])


_UNEVEN = (
    "Expected as many visual tokens for every image, got {}. A cache needs pictures of one size: bring them to one, "
    "or set `fca_cache='none'`."
)
