"""Feature consistency alignment (FCA): how far a pixel prompt has moved what the language model sees of an image.

Exploring the Transferability of Visual Prompting for Multimodal Large Language Models (TVP), 2024, arXiv 2404.11207,
Sec. 4.2; the distance is that of the official code.
"""

import torch
from jaxtyping import Float
from torch import Tensor


def feature_consistency(
    prompted: Float[Tensor, "tokens width"], clean: Float[Tensor, "tokens width"]
) -> Float[Tensor, ""]:
    """Mean Euclidean distance of visual tokens, in float32; minimised, with a weight that is the objective's.

    Formula: (1 / n) * sum_j ||f_j - f'_j||_2 over the n visual tokens of all images of the batch, the norm over the
        width. Not squared, so it is independent of the width's scale only up to that of the features. Where both are
        equal (an untrained prompt) loss and gradient are 0.

    Args:
        prompted: Visual tokens as they enter the language model, from images with the prompt.
        clean: The same tokens from the same (shrunken) images without it; they receive no gradient.
    """
    difference = prompted.float() - clean.detach().float()
    return torch.linalg.vector_norm(difference, dim=-1).mean()
