"""Trainable copy of a frozen layer: selective tuning as an adapter.

Instead of training a layer of the base model, its tensors are copied per adapter and used in its place. Switching the
adapter off gives the base model back bit for bit, several adapters can share a base, and merging is an exact copy.
"""

import copy
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from peft_vlm.adapters.config import DTYPES
from peft_vlm.adapters.layer import PromptLayer, replaced
from peft_vlm.errors import AdapterError, UnsupportedModelError


def is_rms_norm(layer: nn.Module) -> bool:
    """Whether a layer is one of transformers' RMS norms: no class is shared, but the name and the one weight are."""
    return type(layer).__name__.endswith("RMSNorm") and [name for name, _ in layer.named_parameters()] == ["weight"]


def _without_offload_hook(layer: nn.Module) -> nn.Module:
    """A layer with the same tensors that nothing fills: accelerate's hook would put the base weight over another."""
    if "_hf_hook" not in vars(layer):
        return layer
    bare = copy.copy(layer)
    for name in ("forward", "_hf_hook"):
        vars(bare).pop(name, None)
    return bare


class LayerCopy(PromptLayer):
    """A `Linear`, `LayerNorm` or RMS norm whose weight and bias are replaced by an adapter's own.

    Args:
        base_layer: The frozen layer.
        prefix: The method's parameter prefix; transformers' own adapter loader finds tensors by it.

    Raises:
        UnsupportedModelError: For other layer types, quantised ones included.
    """

    def __init__(self, base_layer: nn.Module, *, prefix: str) -> None:
        if type(base_layer) not in (nn.Linear, nn.LayerNorm) and not is_rms_norm(base_layer):
            raise UnsupportedModelError(
                f"Expected an `nn.Linear`, `nn.LayerNorm` or RMS norm to copy, got `{type(base_layer).__name__}`. "
                f"Selective tuning "
                "needs the weights themselves: load the base model unquantised."
            )
        super().__init__(base_layer)
        self.adapter_layer_names = (f"{prefix}weight", f"{prefix}bias")
        for name in self.adapter_layer_names:
            setattr(self, name, nn.ParameterDict())
        self._base_tensors: dict[str, Tensor] = {}

    @property
    def tuned_weight(self) -> nn.ParameterDict:
        """Weights by adapter name."""
        return getattr(self, self.adapter_layer_names[0])

    @property
    def tuned_bias(self) -> nn.ParameterDict:
        """Biases by adapter name; empty for layers without one."""
        return getattr(self, self.adapter_layer_names[1])

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Copy the base tensors for a new adapter.

        Args:
            adapter_name: Key under which the copies are kept.
            config: Configuration with `init_weights` and `adapter_dtype`.
        """
        dtype = DTYPES[config.adapter_dtype] if config.adapter_dtype else None
        layer = self.get_base_layer()
        self.tuned_weight[adapter_name] = replaced(layer.weight, init_weights=config.init_weights, dtype=dtype)
        if not is_rms_norm(layer) and layer.bias is not None:
            self.tuned_bias[adapter_name] = replaced(layer.bias, init_weights=config.init_weights, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """The layer's output with the active adapter's tensors, in the dtype of the input."""
        name = self.current_adapter
        if name is None:
            return self.base_layer(hidden)
        if is_rms_norm(self.base_layer):  # each family has its own formula: theirs runs, with our weight
            norm = _without_offload_hook(self.base_layer)
            return functional_call(norm, {"weight": self.tuned_weight[name]}, (hidden,)).to(hidden.dtype)
        weight = self.tuned_weight[name].to(hidden.dtype)
        bias = self.tuned_bias[name].to(hidden.dtype) if name in self.tuned_bias else None
        if isinstance(self.base_layer, nn.Linear):
            return nn.functional.linear(hidden, weight, bias)
        return nn.functional.layer_norm(hidden, self.base_layer.normalized_shape, weight, bias, self.base_layer.eps)

    def plain(self) -> nn.Module:
        """The base layer with the active adapter's tensors."""
        layer, name = copy.deepcopy(self.base_layer), self.current_adapter
        if name is not None:
            for key, tensors in (("weight", self.tuned_weight), ("bias", self.tuned_bias)):
                if name in tensors:
                    getattr(layer, key).data = tensors[name].detach().clone()
        return layer

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Copy the adapter's tensors into the base layer; exact, and undone exactly by `unmerge`.

        Args:
            safe_merge: True refuses tensors with non-finite values.
            adapter_names: The adapter to merge, the active one by default.

        Raises:
            AdapterError: If several adapters are given.
            ValueError: If `safe_merge` finds a non-finite value.
        """
        names = [name for name in check_adapters_to_merge(self, adapter_names) if name in self.tuned_weight]
        if not names:
            return
        if len(names) + len(self.merged_adapters) > 1:
            raise AdapterError(
                f"Expected one adapter to merge, got {self.merged_adapters + names!r}. Each replaces the "
                f"whole layer, so "
                "merging a second one would discard the first; call `unmerge_adapter()` before."
            )
        tuned = {"weight": self.tuned_weight[names[0]]}
        if names[0] in self.tuned_bias:
            tuned["bias"] = self.tuned_bias[names[0]]
        if safe_merge and not all(torch.isfinite(tensor).all() for tensor in tuned.values()):
            raise ValueError(f"NaNs detected in the merged weights. The adapter {names[0]!r} seems to be broken.")
        for key, tensor in tuned.items():
            parameter = getattr(self.base_layer, key)
            self._base_tensors[key] = parameter.data.clone()
            parameter.data.copy_(tensor.data)
        self.merged_adapters = names

    def unmerge(self) -> None:
        """Put the base tensors back."""
        if not self.merged_adapters:
            warnings.warn("Already unmerged. Nothing to do.", stacklevel=2)
            return
        for key, tensor in self._base_tensors.items():
            getattr(self.base_layer, key).data.copy_(tensor)
        self._base_tensors, self.merged_adapters = {}, []
