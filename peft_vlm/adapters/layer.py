"""Plumbing that every wrapper of this package shares on top of PEFT's `BaseTunerLayer`."""

import copy
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import nn

from peft_vlm.errors import AdapterError


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


def replaced(parameter: torch.Tensor, *, init_weights: bool, dtype: torch.dtype | None) -> nn.Parameter:
    """A trainable copy of a frozen tensor.

    Args:
        parameter: Tensor to copy.
        init_weights: False adds Gaussian noise of 2 % of the tensor's scale, so that the copy acts differently.
        dtype: dtype of the copy; None keeps the tensor's.
    """
    copy = parameter.detach().clone().to(dtype or parameter.dtype)
    if not init_weights:
        copy += 0.02 * (1.0 + copy.abs().mean()) * torch.randn_like(copy)
    return nn.Parameter(copy)
