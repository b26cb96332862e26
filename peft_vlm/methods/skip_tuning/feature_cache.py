"""LSkip's store: the hidden states that enter the first tuned layer, computed in large batches without autograd."""

import logging
import tempfile
from pathlib import Path

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from peft_vlm.data.dataset import ImageClassificationDataset, collate
from peft_vlm.errors import AdapterError
from peft_vlm.towers import Towers

logger = logging.getLogger(__name__)


class HiddenStateCache:
    """Hidden states of every training image, by position in the dataset.

    Args:
        storage: `"ram"`, or `"disk"` for a memory-mapped file.
        folder: Where the file goes; a temporary folder by default, removed with the cache.
    """

    def __init__(self, storage: str, *, folder: str | Path | None = None) -> None:
        self.storage, self.folder = storage, folder
        self.hidden: Tensor | None = None
        self._temporary: tempfile.TemporaryDirectory[str] | None = None

    def allocate(self, shape: tuple[int, int, int], dtype: torch.dtype) -> None:
        """Reserve room, once; later epochs overwrite it.

        Args:
            shape: (images, tokens, width).
            dtype: dtype of the stored states.
        """
        if self.hidden is not None and self.hidden.shape == shape and self.hidden.dtype == dtype:
            return
        images, tokens, width = shape
        size = images * tokens * width * dtype.itemsize / 2**20
        logger.info(
            "Feature cache: %d images x %d tokens x %d = %.0f MB in %s", images, tokens, width, size, self.storage
        )
        if self.storage == "ram":
            self.hidden = torch.empty(shape, dtype=dtype)
            return
        if self.folder is None:
            self._temporary = tempfile.TemporaryDirectory(prefix="peft_vlm_cache_")
            folder = Path(self._temporary.name)
        else:
            folder = Path(self.folder)
        folder.mkdir(parents=True, exist_ok=True)
        path = folder / "skip_tuning_hidden_states.bin"
        flat = torch.from_file(str(path), shared=True, size=images * tokens * width, dtype=dtype)
        self.hidden = flat.view(shape)

    def write(self, index: Int[Tensor, " batch"], hidden: Float[Tensor, "batch tokens width"]) -> None:
        """Store the states of some images; `allocate` comes first."""
        assert self.hidden is not None
        self.hidden[index] = hidden.to(self.hidden.device)

    def read(self, index: Int[Tensor, " batch"], device: torch.device) -> Float[Tensor, "batch tokens width"]:
        """States of some images on a device.

        Args:
            index: Positions in the dataset.
            device: Where the states are wanted.

        Raises:
            AdapterError: If nothing was stored.
        """
        if self.hidden is None:
            raise AdapterError(
                "Expected a filled feature cache, got an empty one. Call `epoch_start` before training."
            )
        return self.hidden[index.cpu()].to(device)


def fill(
    cache: HiddenStateCache,
    towers: Towers,
    dataset: ImageClassificationDataset,
    *,
    start: int,
    batch_size: int,
    num_workers: int = 0,
) -> None:
    """Run the layers below the cut over a dataset, once, and store what enters layer `start`.

    Args:
        cache: Receives the states.
        towers: Towers of the model.
        dataset: Training images with their augmentation of this epoch.
        start: First tuned vision layer.
        batch_size: Images per forward pass; bounds the working memory.
        num_workers: Processes that decode images.
    """
    device = next(towers.model.parameters()).device
    loader = DataLoader(dataset, batch_size=batch_size, collate_fn=collate, num_workers=num_workers)
    for batch in tqdm(loader, desc=f"Caching layers below {start}", leave=False, disable=len(loader) < 2):
        with torch.no_grad():
            hidden = towers.embed_image(batch["pixel_values"].to(device))
            hidden = towers.run_vision(hidden, 0, start)
        cache.allocate((len(dataset), *hidden.shape[1:]), hidden.dtype)
        cache.write(batch["index"], hidden)


def text_hidden_states(
    towers: Towers, input_ids: Int[Tensor, "prompts tokens"], *, start: int, chunk_size: int = 256
) -> Float[Tensor, "prompts tokens width"]:
    """What enters text layer `start` for every class prompt; valid for the whole run, as nothing below it is trained.

    Args:
        towers: Towers of the model.
        input_ids: Tokenised class prompts.
        start: First tuned text layer.
        chunk_size: Prompts per forward pass.
    """
    with torch.no_grad():
        chunks = [towers.run_text(towers.embed_text(ids), 0, start) for ids in input_ids.split(chunk_size)]
    return torch.cat(chunks)


def initial_prototypes(
    model: nn.Module,
    towers: Towers,
    hidden: Float[Tensor, "prompts tokens width"],
    input_ids: Int[Tensor, "prompts tokens"],
    *,
    start: int,
    chunk_size: int = 256,
) -> Float[Tensor, "prompts dim"]:
    """Unit-norm text features of the untouched base model, from the cached states of its lower layers, in float32.

    Args:
        model: `PeftModel` whose adapter is switched off for this pass.
        towers: Its towers.
        hidden: Output of `text_hidden_states`.
        input_ids: Tokenised class prompts.
        start: First tuned text layer.
        chunk_size: Prompts per forward pass.
    """
    with torch.no_grad(), model.disable_adapter():
        chunks = [
            towers.finish_text(states, ids, start)
            for states, ids in zip(hidden.split(chunk_size), input_ids.split(chunk_size), strict=True)
        ]
    return nn.functional.normalize(torch.cat(chunks).float(), dim=-1)
