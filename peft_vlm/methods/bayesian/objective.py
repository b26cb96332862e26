"""The objective of Bayesian prompts: the negative log of the averaged probability, and a pull towards N(0, I).

Bayesian Prompt Learning for Image-Language Model Generalization, 2022, arXiv 2210.02390.
"""

from typing import Any

from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.classification import ClassificationObjective
from peft_vlm.errors import AdapterError, check_choice, check_number
from peft_vlm.methods.bayesian.model import SampledContext
from peft_vlm.models.towers import towers_of
from peft_vlm.objective import Batch, ObjectiveOutput, Paper
from peft_vlm.registry import Preset, RunSize, sgd_training
from peft_vlm.text.class_features import conditioned_logits
from peft_vlm.text.prompts import ClassPrompts

PAPER = Paper(
    title="Bayesian Prompt Learning for Image-Language Model Generalization",
    year=2022,
    arxiv_id="2210.02390",
    venue="ICCV 2023",
    bibtex="""@inproceedings{derakhshani2023bayesian,
  title     = {Bayesian Prompt Learning for Image-Language Model Generalization},
  author    = {Derakhshani, Mohammad Mahdi and Sanchez, Enrique and Bulat, Adrian and da Costa, Victor Guilherme
               Turrisi and Snoek, Cees G. M. and Tzimiropoulos, Georgios and Martinez, Brais},
  booktitle = {Proceedings of the IEEE/CVF International Conference on Computer Vision},
  year      = {2023}
}""",
)


def standard_normal_kl(
    mean: Float[Tensor, "rows width"], log_variance: Float[Tensor, "rows width"]
) -> Float[Tensor, ""]:
    """Divergence of diagonal normal distributions from N(0, I): a mean over rows and over the width.

    Formula: 1/2 (exp(v) + m^2 - 1 - v), m: mean, v: log-variance

    Args:
        mean: Means.
        log_variance: Logarithms of the variances.
    """
    return 0.5 * (log_variance.exp() + mean.square() - 1 - log_variance).mean()


class BayesianObjective(ClassificationObjective):
    """Cross-entropy of the class probabilities averaged over drawn contexts, and the divergence of what draws them.

    Formula: L = -mean_i log( 1/L sum_s p_s(y_i | x_i) ) + kl_weight * KL(N(m, exp(v)) || N(0, I)) / width

    The text passes are recomputed in the backward pass one by one, so that memory grows neither with the samples nor
    with the batch.

    Args:
        prompts: As for `ClassificationObjective`.
        kl_weight: Weight of the divergence, which is a mean over the width; 0.001 in the official code.
        image_cache: As for `ClassificationObjective`.
        num_views: As there.
        cache_batch_size: As there.
        num_workers: As there.

    Requirements:
        A `PeftModel` with an active Bayesian adapter; the rest as for its base.

    Relations:
        CoOp at one sample without variance and weight 0; CoCoOp with another network where it is conditional.

    Deviation: The evidence lower bound has the mean of log-probabilities; the official code, and this, the logarithm
        of their mean.

    Raises:
        ValueError: If the weight is negative.

    References:
        arXiv 2210.02390.
    """

    paper = PAPER

    def __init__(
        self,
        prompts: ClassPrompts,
        *,
        kl_weight: float | int = 0.001,
        image_cache: str = "auto",
        num_views: int | None = None,
        cache_batch_size: int = 64,
        num_workers: int = 0,
    ) -> None:
        check_number("kl_weight", kl_weight, least=0)
        super().__init__(
            prompts,
            image_cache=image_cache,
            num_views=num_views,
            cache_batch_size=cache_batch_size,
            num_workers=num_workers,
        )
        self.kl_weight = kl_weight

    def config_dict(self) -> dict[str, Any]:
        """Return the settings as JSON values."""
        return {"kl_weight": self.kl_weight, **super().config_dict()}

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Compute the loss over all classes.

        Args:
            model: `PeftModel` with the active adapter.
            batch: `labels`, and `index` into the stored features or `pixel_values`.

        Returns:
            `cross_entropy` and `kl`, and the logarithms of the averaged probabilities as logits.

        Raises:
            AdapterError: If the active adapter is of another type.
        """
        layer = towers_of(model).token_embedding
        if not isinstance(layer, SampledContext):
            raise AdapterError("Expected an active Bayesian adapter, got none. Wrap the model with `BayesianConfig`.")
        features = self._image_features(model, batch)
        # (batch, classes): logarithms of probabilities that are averaged over the samples
        logits = conditioned_logits(model, self.prompts, features)
        terms = {
            "cross_entropy": nn.functional.cross_entropy(logits, batch["labels"]),
            # of each image's distribution, or of the one that all images share
            "kl": self.kl_weight * standard_normal_kl(*layer.posterior(features)),
        }
        return ObjectiveOutput(terms, logits, batch["labels"])


# Hyper-parameters of the official runs (saic-fi/Bayesian-Prompt-Learning, commit 8a73fff).
def preset_for(protocol: str = "base_to_new", *, samples: int = 20, epochs: int = 20) -> Preset:
    """Return the official preset: four vectors from "a photo of a", SGD at 0.002, batch 1.

    Args:
        protocol: `"base_to_new"`, 16 shots.
        samples: Official `L`, from 5 to 40 by dataset.
        epochs: From 10 to 60 by dataset; `examples/train_bayesian.py` lists both.
    """
    check_choice("protocol", protocol, ("base_to_new",))
    training = sgd_training(learning_rate=0.002, batch=1, epochs=epochs)
    config = {"num_text_tokens": 4, "context_init": "a photo of a", "num_samples": samples}
    return Preset(config=config, training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the official ones; on a small model its own rate, width and samples.

    Args:
        run: Size of the run.
    """
    small = {"context_init": "a photo of a", "num_samples": 5, "residual_std": 0.1}
    return run.recommend(preset_for(), rate=0.05, config=small)
