"""Task semantics enhancement (TSE): how much a CLIP finds the right class in a prompted image.

Exploring the Transferability of Visual Prompting for Multimodal Large Language Models (TVP), 2024, arXiv 2404.11207,
Sec. 4.3; the scale is that of the official code.
"""

from jaxtyping import Float, Int
from torch import Tensor


def semantic_enhancement(logits: Float[Tensor, "batch classes"], labels: Int[Tensor, " batch"]) -> Float[Tensor, ""]:
    """Mean CLIP logit of the right class, in float32; maximised, so the objective subtracts it with its weight.

    Formula: (1 / batch) * sum_i exp(s) * cos(I(x_i), T(y_i)); there is no softmax over the classes.

    Args:
        logits: Cosines of image and class features, multiplied by the logit scale (about 100 for a trained CLIP, so a
            weight of 0.001 is 0.1 on the cosine).
        labels: Right class of each image.
    """
    return logits.float().gather(1, labels[:, None]).mean()
