"""Layers that every wrapper of this package builds on, and the trainable copy of a frozen layer.

Instead of training a layer of the base model, `LayerCopy` copies its tensors per adapter and uses them in its place.
Switching the adapter off gives the base model back bit for bit, several adapters can share a base, and merging is an
exact copy.
"""

import copy
import warnings
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer, check_adapters_to_merge
from torch import Tensor, nn
from torch.func import functional_call

from peft_vlm.adapters.config import DTYPES
from peft_vlm.errors import AdapterError, UnsupportedModelError


class PromptLayer(nn.Module, BaseTunerLayer):
    """A wrapped layer that holds the tensors of any number of adapters, one of which may be active.

    Subclasses name their `ParameterDict`s, keyed by adapter name, in `adapter_layer_names` and fill them in
    `add_adapter`. Deeper nesting is avoided on purpose: PEFT strips an adapter name from a key only in the last two
    positions, and a name that stays in the file makes the adapter load as random values under any other name.

    Args:
        base_layer: The frozen layer that is wrapped.
    """

    def __init__(self, base_layer: nn.Module) -> None:
        super().__init__()
        self.base_layer = base_layer
        self._disable_adapters = False
        self._active_adapter: str | list[str] = []
        self.merged_adapters: list[str] = []

    @property
    def base_layer(self) -> nn.Module:
        """The frozen layer; found without `__getattr__`, as every step asks for it."""
        return own_module(self, "base_layer")

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Create the tensors of a new adapter.

        Args:
            adapter_name: Key of the tensors.
            config: The method's configuration.

        Raises:
            NotImplementedError: In this base class.
        """
        raise NotImplementedError(f"`{type(self).__name__}` does not define `add_adapter`.")

    def release(self) -> None:
        """Undo what the layer has changed inside its base layer; called when it is taken out of the model."""

    @property
    def current_adapter(self) -> str | None:
        """Name of the adapter this layer applies now; None when it must act as the base layer.

        A layer without tensors of the active adapter (another adapter reaches fewer layers) acts as the base layer.
        """
        # Merged weights act already, so the base layer is right then too.
        if self._disable_adapters or self.merged_adapters or not self.active_adapters:
            return None
        name = self.active_adapters[0]
        for container in (*self.adapter_layer_names, *self.other_param_names):
            own: Any = self._modules.get(container)
            if name in (getattr(self, container) if own is None else own):
                return name
        return None

    def set_adapter(self, adapter_names: str | list[str], inference_mode: bool = False) -> None:
        """Activate one adapter.

        Args:
            adapter_names: A name, or a list with at most one.
            inference_mode: True freezes the adapter.

        Raises:
            AdapterError: If several adapters are given: these methods replace tensors, which cannot be stacked.
        """
        names = [adapter_names] if isinstance(adapter_names, str) else list(adapter_names)
        if len(names) > 1:
            raise AdapterError(
                f"Expected one active adapter, got {names!r}. Adapters of this kind replace tensors of the model and "
                "cannot be active together; activate one with `set_adapter(name)`."
            )
        super().set_adapter(names, inference_mode=inference_mode)

    def plain(self) -> nn.Module:
        """An ordinary torch module with copies of the tensors in use, for an export without PEFT.

        Raises:
            AdapterError: If the active adapter adds something that no such module of its own does.
        """
        if self.current_adapter is not None:
            raise AdapterError(f"`{type(self).__name__}` has no form outside PEFT.")
        return copy.deepcopy(self.base_layer)

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refuse to merge; layers that can override it.

        Args:
            safe_merge: Ignored.
            adapter_names: Ignored.

        Raises:
            AdapterError: Always.
        """
        raise AdapterError(
            f"`{type(self).__name__}` adds tensors that no weight of the base model can hold, so it cannot be merged. "
            "Keep the PeftModel, or call `unload()` to get the base model back."
        )


def own_module(module: nn.Module, name: str) -> Any:
    """A submodule by its name, without the detour over `__getattr__` that torch makes for submodules.

    Args:
        module: Module that has it.
        name: Its name.

    Raises:
        AttributeError: If it has none yet, so that `hasattr` answers.
    """
    try:
        return module.__dict__["_modules"][name]
    except KeyError as error:
        raise AttributeError(name) from error


class DelegatingLayer(PromptLayer):
    """A layer that others may ask for anything the layer it wraps has: unknown attributes are those of that layer.

    Its own submodules are read by `own_module`: a step asks for them often, and each would come by here.
    """

    def __getattr__(self, name: str) -> Any:
        try:
            return super().__getattr__(name)
        except AttributeError:
            if name == "base_layer" or name.startswith("__"):
                raise
            return getattr(super().__getattr__("base_layer"), name)


class LearnedPrompt(DelegatingLayer):
    """A layer with one learned tensor per adapter.

    Args:
        base_layer: The frozen layer.
        prefix: The method's parameter prefix.
    """

    def __init__(self, base_layer: nn.Module, *, prefix: str) -> None:
        super().__init__(base_layer)
        self.adapter_layer_names = (f"{prefix}prompt",)
        setattr(self, f"{prefix}prompt", nn.ParameterDict())

    @property
    def prompts(self) -> nn.ParameterDict:
        """Learned tensors by adapter name."""
        return own_module(self, self.adapter_layer_names[0])


def _trainable_copy(parameter: torch.Tensor, *, init_weights: bool, dtype: torch.dtype | None) -> nn.Parameter:
    """A trainable copy of a frozen tensor.

    Args:
        parameter: Tensor to copy.
        init_weights: False adds Gaussian noise of 2 % of the tensor's scale, so that the copy acts differently.
        dtype: dtype of the copy; None keeps the tensor's.
    """
    copy = parameter.detach().clone().to(dtype or parameter.dtype)
    if not init_weights:  # 1 beside the mean, so that a bias of zeros changes too
        copy += 0.02 * (1.0 + copy.abs().mean()) * torch.randn_like(copy)
    return nn.Parameter(copy)


def _is_rms_norm(layer: nn.Module) -> bool:
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
        if type(base_layer) not in (nn.Linear, nn.LayerNorm) and not _is_rms_norm(base_layer):
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
        self.tuned_weight[adapter_name] = _trainable_copy(layer.weight, init_weights=config.init_weights, dtype=dtype)
        if not _is_rms_norm(layer) and layer.bias is not None:
            self.tuned_bias[adapter_name] = _trainable_copy(layer.bias, init_weights=config.init_weights, dtype=dtype)

    def forward(self, hidden: Tensor) -> Tensor:
        """The layer's output with the active adapter's tensors, in the dtype of the input."""
        name = self.current_adapter
        if name is None:
            return self.base_layer(hidden)
        if _is_rms_norm(self.base_layer):  # each family has its own formula: theirs runs, with our weight
            norm = _without_offload_hook(self.base_layer)
            return functional_call(norm, {"weight": self.tuned_weight[name]}, (hidden,)).to(hidden.dtype)
        weight = self.tuned_weight[name].to(hidden.dtype)  # the copy may be stored in another type than it runs in
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
            # Kept, because base + (tuned - base) and back would round
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
