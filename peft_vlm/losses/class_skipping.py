"""CSkip: which classes take part in a step of Skip Tuning.

Skip Tuning: Pre-trained Vision-Language Models are Effective and Efficient Adapters Themselves, 2025, arXiv
2412.11509, Sec. 4 (class-wise skipping). Constants and edge cases follow the official code (`clip_skip_tuning`).
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

TAIL_RANGE = 5.0
"""The exponential density is taken on [0, 5] over the tail ranks (official code)."""


def num_top_classes(num_classes: int, *, top_ratio: float | int, max_top: int) -> int:
    """Number of most similar classes that are always kept.

    Args:
        num_classes: Number of classes C.
        top_ratio: A share of the classes up to 1, or above 1 an absolute number. Paper: r; official `TOP_RATIO`.
        max_top: Upper bound, official `MAX_TOP`. As in the official code, `top_ratio` = 1 ignores it.

    Raises:
        ValueError: If a value is not positive.
    """
    if top_ratio <= 0 or max_top < 1:
        raise ValueError(f"Expected `top_ratio` > 0 and `max_top` >= 1, got {top_ratio!r} and {max_top!r}.")
    if top_ratio == 1:
        return num_classes
    wanted = top_ratio * num_classes if top_ratio < 1 else min(top_ratio, num_classes)
    return min(math.ceil(wanted), max_top, num_classes)


def rank_keep_probability(num_classes: int, num_top: int, *, tail_scale: float) -> Float[Tensor, " classes"]:
    """Probability in [0, 1] that the class at each similarity rank is kept, rank 0 being the most similar.

    1 for the first `num_top` ranks; behind them an exponential density, min-max normalised, so that the first tail
    rank has probability 1 and the last 0.

    Args:
        num_classes: Number of classes C.
        num_top: Ranks that are always kept.
        tail_scale: Scale of the exponential distribution. Paper: lambda; official `LAMBDA`, default 0.3.

    Returns:
        Probabilities by rank, float32.

    Raises:
        ValueError: If `tail_scale` is not positive.

    Deviation: With a single tail rank the official normalisation divides 0 by 0 and never keeps the class; here it has
    probability 1, the value of the first tail rank.
    """
    if tail_scale <= 0:
        raise ValueError(f"Expected `tail_scale` > 0, got {tail_scale!r}.")
    num_tail = num_classes - num_top
    probability = torch.ones(num_classes, dtype=torch.float64)
    if num_tail > 1:
        density = torch.exp(-torch.linspace(0, TAIL_RANGE, num_tail, dtype=torch.float64) / tail_scale)
        probability[num_top:] = (density - density.min()) / (density.max() - density.min())
    return probability.float()


def rank_classes(
    image_features: Float[Tensor, "batch dim"], prototypes: Float[Tensor, "classes dim"], labels: Int[Tensor, " batch"]
) -> Int[Tensor, " classes"]:
    """Class ids by descending relevance to the batch: the highest cosine to any image, own labels first.

    Args:
        image_features: Current image features, unit-norm, float32.
        prototypes: Text features of the initial model, unit-norm, float32.
        labels: Right class of each image.
    """
    similarity = image_features @ prototypes.T
    similarity = similarity.scatter(1, labels[:, None], 1e4)  # the official constant; above every cosine
    return similarity.max(dim=0).values.argsort(descending=True)


def kept_classes(
    ranked: Int[Tensor, " classes"], keep_rank: Bool[Tensor, " classes"], labels: Int[Tensor, " batch"]
) -> Int[Tensor, " kept"]:
    """Ids of the classes that stay, ascending.

    Args:
        ranked: Class ids by rank.
        keep_rank: Which ranks stay.
        labels: Right class of each image; always kept.

    Deviation: The official code drops a label that lies beyond the kept ranks (more distinct labels in a batch than
        top
    ranks) and then trains that image towards class 0.
    """
    keep = torch.zeros_like(keep_rank)
    keep[ranked] = keep_rank
    keep[labels] = True
    return keep.nonzero().squeeze(1)
