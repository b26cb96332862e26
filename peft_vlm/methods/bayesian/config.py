"""Configuration of a Bayesian adapter."""

from dataclasses import dataclass, field
from typing import no_type_check

from peft import PeftType

from peft_vlm.adapters.adapter_files import Shape
from peft_vlm.adapters.context import TextContextConfig, check_count
from peft_vlm.errors import shown
from peft_vlm.registry import extend_peft_type

extend_peft_type("BAYESIAN")

MAX_SAMPLES = 1000
"""Text passes over all classes that one prediction may cost; official settings have 5 to 40."""


@no_type_check  # wrong types get the messages of `__post_init__`, in tests too
@dataclass
class BayesianConfig(TextContextConfig):
    """Context vectors to which a random vector of a learned normal distribution is added; probabilities are averaged.

    Args:
        num_text_tokens: Context vectors per prompt; official `N_CTX`, 4. With `context_init` it becomes the number of
            the words' tokens, as in the official code.
        num_samples: Vectors drawn per step and per prediction. Paper: L; official `L`, 5 to 40 by dataset.
        conditional: Whether mean and variance of the vector are networks of the image (official `cocoopvpt`), not
            vectors themselves (`coopvpt`).
        residual_std: Standard deviation of the vector at the start of a training. None: the official start, whose
            log-variance is uniform on [0, 1), or what a new network gives; both are 50 times wider than embeddings.
        noise_seed: Seed of the vectors that predictions are averaged over, so that an adapter gives everybody the same
            numbers. Training draws new ones in every step.

    References:
        Bayesian Prompt Learning for Image-Language Model Generalization, 2022, arXiv 2210.02390.
    """

    num_text_tokens: int = field(default=4)
    num_samples: int = field(default=20)
    conditional: bool = field(default=False)
    residual_std: float | None = field(default=None)
    noise_seed: int = field(default=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        self.peft_type = PeftType["BAYESIAN"]
        check_count(self, "num_text_tokens", minimum=1)
        for name, least, most in (("num_samples", 1, MAX_SAMPLES), ("noise_seed", 0, 2**32 - 1)):
            check_count(self, name, minimum=least)
            if getattr(self, name) > most:
                raise ValueError(f"Expected `{name}` from {least} to {most}, got {shown(getattr(self, name))}.")
        if self.residual_std is not None and not self.residual_std > 0:
            raise ValueError(f"Expected `residual_std` above 0 or None, got {shown(self.residual_std)}.")

    def file_shapes(self) -> dict[str, Shape]:
        """The shape of the context; the base model decides those of the distribution."""
        layer = r".*\btext_model\..*bayesian_"
        shapes: dict[str, Shape] = {f"{layer}prompt": (self.num_text_tokens, None)}
        if self.conditional:
            network = rf"{layer}\w+_network\."
            return shapes | {f"{network}weight[123]": (None, None), f"{network}bias[123]": (None,)}
        return shapes | {f"{layer}(mean|log_variance)": (None,)}
