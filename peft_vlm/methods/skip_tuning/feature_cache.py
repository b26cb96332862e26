"""LSkip's store: the hidden states that enter the first tuned layer, computed in large batches without autograd."""

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.feature_store import RowStore, divided_pass
from peft_vlm.distributed import divided
from peft_vlm.models.towers import Towers


def fill(
    cache: RowStore,
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
    loader = divided_pass(dataset, batch_size=batch_size, num_workers=num_workers)
    for batch in tqdm(loader, desc=f"Caching layers below {start}", leave=False, disable=len(loader) < 2):
        with torch.no_grad():
            hidden = towers.embed_image(batch["pixel_values"].to(device))
            hidden = towers.run_vision(hidden, 0, start)
        cache.allocate((len(dataset), *hidden.shape[1:]), hidden.dtype)
        cache.write(batch["index"], hidden)
        del batch, hidden  # or they would live on beside the next batch
    cache.complete()


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

    def states_of(rows: Int[Tensor, " rows"]) -> Tensor:
        return towers.run_text(towers.embed_text(input_ids[rows]), 0, start)

    with torch.no_grad():
        return divided(len(input_ids), states_of, chunk_size=chunk_size)


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

    def features_of(rows: Int[Tensor, " rows"]) -> Tensor:
        return towers.finish_text(hidden[rows], input_ids[rows], start)

    with torch.no_grad(), model.disable_adapter():
        features = divided(len(hidden), features_of, chunk_size=chunk_size)
    return nn.functional.normalize(features.float(), dim=-1)
