"""Image features of a whole dataset, computed once and kept."""

import torch
from jaxtyping import Float
from torch import Tensor, nn
from torch.utils.data import DataLoader, Subset
from tqdm.auto import tqdm

from peft_vlm.data.dataset import ImageClassificationDataset, collate
from peft_vlm.distributed import gather_rows, num_processes, part_of, process_index
from peft_vlm.models.towers import image_features


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
    device = next(model.parameters()).device
    part = part_of(len(dataset), index=process_index(), parts=num_processes()) if divide else range(len(dataset))
    loader = DataLoader(
        Subset(dataset, part or range(1)), batch_size=batch_size, collate_fn=collate, num_workers=num_workers
    )
    progress = tqdm(loader, desc="Image features", leave=False, disable=len(loader) < 10)
    chunks = [image_features(model, batch["pixel_values"].to(device)).float() for batch in progress]
    features = torch.cat(chunks)[: len(part)]
    return (gather_rows(features) if divide else features).cpu()
