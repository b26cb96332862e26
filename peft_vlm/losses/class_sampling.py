"""POMP's class sampling: a softmax over a few of many classes, corrected for the classes that were left out.

Prompt Pre-Training with Twenty-Thousand Classes for Open-Vocabulary Visual Recognition (POMP), 2023, arXiv 2304.04704,
Sec. 3.2 (local contrast, local correction); masking and constants of the official code.
"""

import math

import torch
from jaxtyping import Bool, Float, Int
from torch import Tensor

CORRECTIONS = ("ln", "log10", "none")
REJECTED_LOGIT = -1e6
"""Logit of a rejected negative: zero probability in float32, and still finite (official code)."""


def sample_negatives(num_classes: int, count: int, *, generator: torch.Generator) -> Int[Tensor, " kept"]:
    """Different classes drawn uniformly from all classes; those of the batch's own images are not left out.

    Args:
        num_classes: Number of all classes N.
        count: How many to draw, K - 1 with K classes per step; all classes where there are no more.
        generator: Source of the draw, on the CPU.
    """
    return torch.randperm(num_classes, generator=generator)[:count]


def false_negatives(labels: Int[Tensor, " batch"], negatives: Int[Tensor, " kept"]) -> Bool[Tensor, "batch kept"]:
    """Which sampled classes are an image's own class, and therefore no negatives for it.

    Args:
        labels: Right class of each image.
        negatives: Sampled classes.
    """
    return labels[:, None] == negatives


def local_correction(
    rejected: Bool[Tensor, "batch kept"], *, num_classes: int, form: str = "ln"
) -> Float[Tensor, " batch"]:
    """What is added to the logits of an image's negatives, so that they stand for all wrong classes.

    Formula: log(N - 1) - log(valid negatives of the image). With the natural logarithm the sum over the sampled
        exponentials is an unbiased estimate of the sum over all wrong classes; the base-10 logarithm, in the official
        code since commit 871ef33, is not.

    Args:
        rejected: What `false_negatives` gave.
        num_classes: Number of all classes N.
        form: One of `CORRECTIONS`.

    Raises:
        ValueError: If the form is unknown.
    """
    if form not in CORRECTIONS:
        raise ValueError(f"Expected `correction` to be one of {CORRECTIONS!r}, got {form!r}.")
    valid = (~rejected).sum(dim=1).clamp(min=1).float()  # without a valid negative every column is masked anyway
    if form == "none":
        return torch.zeros_like(valid)
    natural = math.log(max(num_classes - 1, 1)) - valid.log()
    return natural if form == "ln" else natural / math.log(10.0)


def sampled_logits(
    positive: Float[Tensor, " batch"],
    negative: Float[Tensor, "batch kept"],
    rejected: Bool[Tensor, "batch kept"],
    correction: Float[Tensor, " batch"],
) -> Float[Tensor, "batch sampled"]:
    """Logits over an image's own class, in column 0, and the sampled ones, in float32; the target is column 0.

    Args:
        positive: Scaled logit of each image's own class.
        negative: Scaled logits of the sampled classes, the same for all images.
        rejected: What `false_negatives` gave.
        correction: What `local_correction` gave.
    """
    negative = (negative.float() + correction[:, None]).masked_fill(rejected, REJECTED_LOGIT)
    return torch.cat([positive.float()[:, None], negative], dim=1)
