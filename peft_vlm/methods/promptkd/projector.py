"""The projector from the student's feature space into the teacher's, around the student's own visual projection."""

import copy
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.adapters.layer import PromptLayer
from peft_vlm.distributed import is_left_out, num_processes, sum_over_processes
from peft_vlm.methods.promptkd.config import MAX_PROJECTOR_DEPTH


class Projector(PromptLayer):
    """The visual projection followed by an adapter's Linear-Norm-ReLU-Linear.

    The projector's parameters are float32 whatever the base model is, and it computes in their type, under autocast
    too: BatchNorm over eight images in half precision is where official runs collapse. Its input is the un-normalised
    image feature.

    Args:
        base_layer: CLIP's visual projection.
        prefix: The method's parameter prefix.

    References:
        arXiv 2403.02781, Sec. 3.3 and Table 8 (depth 1 to 3). The official 1x1 convolutions on one position are
        linear layers.
    """

    def __init__(self, base_layer: nn.Module, *, prefix: str) -> None:
        super().__init__(base_layer)
        self._linear = [f"{prefix}linear{index}" for index in range(1, MAX_PROJECTOR_DEPTH + 1)]
        self._norm = [f"{prefix}norm{index}" for index in range(1, MAX_PROJECTOR_DEPTH)]
        self.adapter_layer_names = (*self._linear, *self._norm)
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ModuleDict())

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """A projector with random weights, fresh statistics and this layer's training mode.

        Args:
            adapter_name: Key of the new modules.
            config: A `PromptKDConfig`.
        """
        device, width = self.get_base_layer().weight.device, self.get_base_layer().out_features
        for depth in range(config.projector_depth):
            linear = nn.Linear(width, config.class_dim, device=device, dtype=torch.float32)
            getattr(self, self._linear[depth])[adapter_name] = linear
            width = config.class_dim
            if depth + 1 < config.projector_depth and config.projector_norm != "none":
                kind = nn.BatchNorm1d if config.projector_norm == "batchnorm" else nn.LayerNorm
                norm = kind(width, device=device, dtype=torch.float32).train(self.training)
                getattr(self, self._norm[depth])[adapter_name] = norm

    def forward(self, pooled: Float[Tensor, "batch width"]) -> Float[Tensor, "batch dim"]:
        """Image features in the teacher's space, not normalised; without an adapter the student's own.

        Args:
            pooled: The class token after the last norm.
        """
        features = self.base_layer(pooled)
        return features if self.current_adapter is None else self.project(features)

    def plain(self) -> nn.Module:
        """Projection and projector as one sequence."""
        name, layers = self.current_adapter, [copy.deepcopy(self.base_layer)]
        if name is not None:
            for depth, names in enumerate(self._linear):
                if name in getattr(self, names):
                    if depth:
                        norms = getattr(self, self._norm[depth - 1])
                        layers += [*([copy.deepcopy(norms[name])] if name in norms else []), nn.ReLU()]
                    layers.append(copy.deepcopy(getattr(self, names)[name]))
        return nn.Sequential(*layers)

    def project(self, features: Float[Tensor, "batch width"]) -> Float[Tensor, "batch dim"]:
        """The active adapter's projector alone.

        Args:
            features: The student's own image features, not normalised.
        """
        name = self.current_adapter
        assert name is not None, "the callers know that an adapter is active"
        linears = [getattr(self, names)[name] for names in self._linear if name in getattr(self, names)]
        with torch.autocast(features.device.type, enabled=False):
            hidden = features.to(linears[0].weight.dtype)
            for depth, linear in enumerate(linears):
                hidden = linear(hidden)
                if depth + 1 < len(linears):
                    norms = getattr(self, self._norm[depth])
                    hidden = normalise(norms[name], hidden).relu() if name in norms else hidden.relu()
        return hidden if torch.is_autocast_enabled(features.device.type) else hidden.to(features.dtype)


def normalise(norm: nn.Module, hidden: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """A norm layer; BatchNorm in training takes the statistics of the batches of all processes, and falls back to its
    running ones for a batch of one image.

    Args:
        norm: `BatchNorm1d` or `LayerNorm`.
        hidden: Its input.
    """
    if not isinstance(norm, nn.BatchNorm1d) or not norm.training:
        return norm(hidden)
    if num_processes() > 1:
        return normalise_together(norm, hidden)
    if len(hidden) == 1:
        return _by_running_statistics(norm, hidden)
    return norm(hidden)


def normalise_together(norm: nn.BatchNorm1d, hidden: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    """BatchNorm over the rows of all processes, gradients included; torch's `SyncBatchNorm` needs a GPU.

    Args:
        norm: In training mode.
        hidden: Rows of this process; all processes call this together.
    """
    from torch.distributed.nn.functional import all_reduce  # not there in builds of torch without distributed

    kept = hidden[: 0 if is_left_out() else None]
    count = float(sum_over_processes(torch.tensor(float(len(hidden)), device=hidden.device)))
    if count == 1:
        return _by_running_statistics(norm, hidden)
    mean = all_reduce(kept.sum(dim=0)) / count
    variance = all_reduce((kept - mean).square().sum(dim=0)) / count
    with torch.no_grad():
        for statistic, value in ((norm.running_mean, mean), (norm.running_var, variance * count / (count - 1))):
            statistic.lerp_(value, norm.momentum)
        norm.num_batches_tracked.add_(1)
    return (hidden - mean) * torch.rsqrt(variance + norm.eps) * norm.weight + norm.bias


def _by_running_statistics(norm: nn.BatchNorm1d, hidden: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch dim"]:
    statistics = norm.running_mean, norm.running_var
    return nn.functional.batch_norm(hidden, *statistics, norm.weight, norm.bias, False, 0.0, norm.eps)
