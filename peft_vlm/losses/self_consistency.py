"""Self-consistency: how far prompted features have moved from those of the frozen model.

Self-regulating Prompts: Foundational Model Adaptation without Forgetting (PromptSRC), 2023, arXiv 2307.06948.
"""

from jaxtyping import Float
from torch import Tensor, nn


def feature_distance(
    features: Float[Tensor, "batch dim"], frozen_features: Float[Tensor, "rows dim"]
) -> Float[Tensor, ""]:
    """Mean absolute difference of unit-norm features, over images or classes and dimensions, in float32 (Eq. 3).

    Args:
        features: Of the prompted model; normalised here.
        frozen_features: Of the frozen model, same rows; normalised here.
    """
    features = nn.functional.normalize(features.float(), dim=-1)
    return nn.functional.l1_loss(features, nn.functional.normalize(frozen_features.float(), dim=-1))
