"""Bayesian prompts as a PEFT tuner: a context shifted by samples of a learned normal distribution."""

import math
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.adapters.context import ContextTuner
from peft_vlm.adapters.layer import PromptLayer, own_module
from peft_vlm.adapters.learned_tokens import INIT_STD, ShiftedContext
from peft_vlm.methods.bayesian.config import BayesianConfig
from peft_vlm.models.towers import towers_of


class _Network(nn.Module):
    """Three linear layers with ELU between them; flat, as PEFT strips adapter names from two levels only."""

    def __init__(self, dim: int, width: int) -> None:
        super().__init__()
        sizes = (dim, max(1, dim // 2), max(1, dim // 2), width)
        for number in (1, 2, 3):
            layer = nn.Linear(sizes[number - 1], sizes[number])
            self.register_parameter(f"weight{number}", layer.weight)
            self.register_parameter(f"bias{number}", layer.bias)

    def forward(self, features: Float[Tensor, "images dim"]) -> Float[Tensor, "images width"]:
        """A vector of text width for each image."""
        hidden = nn.functional.elu(nn.functional.linear(features, self.weight1, self.bias1))
        hidden = nn.functional.elu(nn.functional.linear(hidden, self.weight2, self.bias2))
        return nn.functional.linear(hidden, self.weight3, self.bias3)


@dataclass(frozen=True)
class Sampling:
    """How an adapter samples its context.

    Args:
        noise: Standard normal vectors that predictions use, the same for all images.
        conditional: Whether the distribution depends on the image.
    """

    noise: Float[Tensor, "samples width"]
    conditional: bool

    @classmethod
    def of(cls, config: BayesianConfig, width: int) -> "Sampling":
        """Draw the noise of an adapter.

        Args:
            config: Its configuration.
            width: Width of the text tower.
        """
        # numpy promises the same stream of this generator in all releases; torch and newer generators do not.
        noise = np.random.RandomState(config.noise_seed).standard_normal((config.num_samples, width))
        return cls(torch.from_numpy(noise.astype(np.float32)), config.conditional)


class SampledContext(ShiftedContext):
    """CLIP's token embedding whose reserved slots are filled with context vectors plus a sample of a distribution.

    Args:
        base_layer: `nn.Embedding` of the text tower.
        prefix: The method's parameter prefix.
        dim: Numbers of an image feature.
    """

    without_shift = (
        "Class prompts of a Bayesian adapter are several sets, whose drawn contexts may also depend on the image, so "
        "there is no one text feature per prompt. Classify with `PromptedClassifier`, or `conditioned_logits(model, "
        "prompts, image_features)` of `peft_vlm.text`; an export is not possible."
    )

    def __init__(self, base_layer: nn.Module, *, prefix: str, dim: int) -> None:
        super().__init__(base_layer, prefix=prefix)
        vectors, networks = (f"{prefix}mean", f"{prefix}log_variance"), (f"{prefix}mean_network",)
        networks += (f"{prefix}log_variance_network",)
        self.adapter_layer_names = (f"{prefix}prompt", *vectors, *networks)
        for name in vectors:
            setattr(self, name, nn.ParameterDict())
        for name in networks:
            setattr(self, name, nn.ModuleDict())
        self._vectors, self._networks, self.dim = vectors, networks, dim
        self.sampling: dict[str, Sampling] = {}
        self.other_param_names = (*self.other_param_names, "sampling")

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """The context, and a distribution around zero.

        Args:
            adapter_name: Key of the new tensors.
            config: A `BayesianConfig`, completed by `complete_whole_context`.
        """
        super().add_adapter(adapter_name, config)
        like = self.prompts[adapter_name]
        self.sampling[adapter_name] = Sampling.of(config, like.shape[-1])
        log_variance = None if config.residual_std is None else 2 * math.log(config.residual_std)
        if config.conditional:
            networks = [_Network(self.dim, like.shape[-1]) for _ in self._networks]
            if log_variance is not None:  # the last bias moves the variance of every image alike
                networks[1].get_parameter("bias3").data += log_variance
            for name, network in zip(self._networks, networks, strict=True):
                own_module(self, name)[adapter_name] = network if like.is_meta else network.to(like)
            return
        mean = torch.zeros(like.shape[-1]) if config.init_weights else INIT_STD * torch.randn(like.shape[-1])
        start = torch.rand(like.shape[-1]) if log_variance is None else torch.full((like.shape[-1],), log_variance)
        for name, vector in zip(self._vectors, (mean, start), strict=True):
            own_module(self, name)[adapter_name] = nn.Parameter(vector if like.is_meta else vector.to(like))

    @property
    def sees_image(self) -> bool:
        """Whether the active adapter's distribution depends on the image."""
        return self.sampling[self.current_adapter or ""].conditional

    def posterior(
        self, image_features: Float[Tensor, "images dim"] | None
    ) -> tuple[Float[Tensor, "shifted width"], Float[Tensor, "shifted width"]]:
        """Mean and log-variance of the vector, in float32: of each image, or a single row for all of them.

        Args:
            image_features: Features of the images, not normalised; not read where the distribution does not see them.
        """
        name = self.current_adapter
        if not self.sees_image:
            # (1, width): one row for all images
            mean, log_variance = (own_module(self, part)[name][None].float() for part in self._vectors)
            return mean, log_variance
        assert image_features is not None, "its context sees the image"
        with torch.autocast(image_features.device.type, enabled=False):  # `shifts` takes the exponential of it
            unit = nn.functional.normalize(image_features.float(), dim=-1)
            networks = (own_module(self, part)[name] for part in self._networks)
            mean, log_variance = (network(unit.to(network.weight1.dtype)).float() for network in networks)
        return mean, log_variance

    def shifts(self, image_features: Float[Tensor, "images dim"] | None) -> Float[Tensor, "shifted samples width"]:
        """Samples of the distribution: with new noise in training, with the adapter's own in evaluation.

        The draws of a step are the same for all its images, so that the images of two processes meet the same ones.

        Args:
            image_features: As for `posterior`.
        """
        mean, log_variance = self.posterior(image_features)
        noise = self.sampling[self.current_adapter or ""].noise
        if self.training:
            noise = torch.randn(noise.shape)  # on the CPU: a seed gives the same draws on every device
        # m + eps * exp(v / 2): (shifted, 1, width) and (samples, width) give (shifted, samples, width)
        return mean[:, None] + noise.to(mean) * (0.5 * log_variance).exp()[:, None]


class BayesianModel(ContextTuner):
    """The tuner behind `get_peft_model(clip, BayesianConfig(...))`."""

    prefix = "bayesian_"

    def wrap(self, target: nn.Module) -> PromptLayer:
        """The token embedding with a sampled context.

        Args:
            target: `nn.Embedding` of the text tower.
        """
        return SampledContext(target, prefix=self.prefix, dim=towers_of(self.model).model.config.projection_dim)
