"""`VLMTuner`: PEFT's `BaseTuner` with what all methods of this package need. Overrides of PEFT internals live here."""

from abc import abstractmethod
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.tuners_utils import BaseTuner, BaseTunerLayer
from peft.utils import ModulesToSaveWrapper
from torch import Tensor, nn

from peft_vlm.adapters.config import VLMConfig, architecture_of, base_digest, check_architecture, check_digest
from peft_vlm.adapters.layer import PromptLayer
from peft_vlm.errors import AdapterError, shown
from peft_vlm.models.towers import filled, missing_weights


class VLMTuner(BaseTuner):
    """Injects a method's layers into a model.

    A method defines `target_pattern` (which modules) and `wrap` (by what). Its parameter prefix, the registered name
    plus an underscore, is the class attribute `prefix`.
    """

    tuner_layer_cls = PromptLayer
    target_module_mapping: dict[str, list[str]] = {}

    @abstractmethod
    def target_pattern(self, config: Any) -> str:
        """Check the configuration against the base model and name the modules to wrap.

        Args:
            config: The method's configuration.

        Returns:
            Regular expression that the full names of the wrapped modules match.
        """

    @abstractmethod
    def wrap(self, target: nn.Module) -> PromptLayer:
        """The method's layer around one matched module.

        Args:
            target: Module of the base model.
        """

    def _pre_injection_hook(self, model: nn.Module, config: Any, adapter_name: str) -> None:
        """Refuse adapter names that PEFT would confuse with module names, which loses tensors on saving."""
        components = {part for name, _ in model.named_modules() for part in name.split(".")}
        if adapter_name in components:
            raise AdapterError(
                f"Expected an adapter name that is no part of a module name, got {adapter_name!r}. PEFT strips "
                "adapter names from keys and would lose tensors; choose another name."
            )

    def inject_adapter(self, model: nn.Module, adapter_name: str, *args: Any, **kwargs: Any) -> None:
        """PEFT's injection, with the adapter-name check for adapters added later, into a model with weights."""
        self._pre_injection_hook(model, self.peft_config[adapter_name], adapter_name)
        if missing := missing_weights(model):
            raise AdapterError(
                f"Expected a model with weights, got {len(missing)} of its tensors on `meta`, where nothing fills "
                f"them: {_some(missing)}. Load the model with `from_pretrained` (offloading by accelerate works), or "
                "give it weights before it gets an adapter."
            )
        super().inject_adapter(model, adapter_name, *args, **kwargs)

    def _prepare_adapter_config(self, peft_config: Any, model_config: dict[str, Any]) -> VLMConfig:
        """Fill `target_modules` and record, or check, what the base model is made of."""
        is_new = peft_config.base_architecture is None
        check_architecture(peft_config, model_config)
        facts = architecture_of(model_config)
        layers = {side: facts.get(f"{side}_num_hidden_layers") for side in ("text", "vision")}
        known = {side: count for side, count in layers.items() if count is not None}
        peft_config.fit(known, facts.get("text_max_position_embeddings"))
        pattern = self.target_pattern(peft_config)
        if peft_config.target_modules not in (None, pattern):
            raise ValueError(
                f"Expected `target_modules` to be left out, got {peft_config.target_modules!r}. The method "
                "chooses its modules from its own settings."
            )
        peft_config.target_modules = pattern
        peft_config.base_architecture = facts
        digest = self._base_digest(peft_config)
        if is_new:
            peft_config.base_digest = digest
        check_digest(peft_config, digest)
        return peft_config

    def _base_digest(self, own: Any) -> str | None:
        """Digest of the base model; with adapters in it, what the first one has recorded."""
        others = [config.base_digest for config in self.peft_config.values() if config is not own]
        is_wrapped = any(isinstance(module, BaseTunerLayer) for module in self.model.modules())
        return next(iter(others), None) if is_wrapped else base_digest(self.model)

    def _create_and_replace(
        self,
        peft_config: Any,
        adapter_name: str,
        target: nn.Module,
        target_name: str,
        parent: nn.Module,
        current_key: str,
        parameter_name: str | None = None,
    ) -> None:
        """Wrap a module, or add the adapter's tensors to the wrapper that another adapter has put there."""
        with filled(*target.modules()):  # an adapter's tensors start from the base weights, and lie beside them
            layer = target if isinstance(target, PromptLayer) else self.wrap(target)
            if layer is not target:  # so that the first adapter of a new layer is the one it applies
                layer._active_adapter = [adapter_name]
            layer.add_adapter(adapter_name, peft_config)
        layer.set_adapter(layer.active_adapters)
        if layer is not target:
            if adapter_name not in self.active_adapters:  # another adapter trains; this one only lies beside it
                layer.requires_grad_(False)
            self._replace_module(parent, target_name, layer, target)

    def _replace_module(self, parent: nn.Module, child_name: str, new_module: nn.Module, child: nn.Module) -> None:
        """Put a module in place. PEFT's version copies `.weight`, which composite layers do not have."""
        if isinstance(new_module, PromptLayer):
            new_module.train(child.training)
        elif isinstance(child, PromptLayer):
            child.release()
        setattr(parent, child_name, new_module)

    def _cast_adapter_dtype(self, adapter_name: str, autocast_adapter_dtype: bool = True) -> None:
        """Keep the dtype that the configuration asks for; PEFT's default is to raise half precision to float32."""
        if not getattr(self.peft_config[adapter_name], "adapter_dtype", None):
            super()._cast_adapter_dtype(adapter_name, autocast_adapter_dtype=autocast_adapter_dtype)

    @contextmanager
    def _enable_peft_forward_hooks(self, *args: Any, **kwargs: Any) -> Iterator[None]:
        """Refuse mixed batches, which PEFT would otherwise run silently with the active adapter."""
        if kwargs.get("adapter_names") is not None:
            raise AdapterError(
                "Expected no `adapter_names`: one forward pass uses one adapter, because these methods "
                "replace tensors that the whole batch shares. Call `set_adapter(name)` and run a batch per adapter."
            )
        yield

    @classmethod
    def _remap_adapter_state_dict_for_load(
        cls, model: nn.Module, config: Any, adapter_name: str, state_dict: dict[str, Tensor]
    ) -> dict[str, Tensor]:
        """Map file keys to model keys, and refuse a file with missing, unknown or misshapen tensors.

        PEFT itself only warns about missing keys and continues with initial values.
        """
        mapped = super()._remap_adapter_state_dict_for_load(model, config, adapter_name, state_dict)
        own = cls._own_tensors(model, adapter_name) | cls._saved_modules(model, adapter_name, config)
        unknown = [key for key in mapped if key not in own]
        missing = [key for key in own if key not in mapped]
        misshapen = [
            f"{key}: model {tuple(own[key].shape)}, file {tuple(mapped[key].shape)}"
            for key in own
            if key in mapped and own[key].shape != mapped[key].shape
        ]
        if missing or unknown or misshapen:
            raise AdapterError(
                f"Expected the {len(own)} tensors of this adapter, got {len(state_dict)}: missing {_some(missing)}; "
                f"unknown {_some(unknown)}; other shape {_some(misshapen)}. The weights file does not belong to this "
                "adapter_config.json, or the base model is another one."
            )
        for key, tensor in mapped.items():
            if tensor.is_floating_point() != own[key].is_floating_point() or tensor.is_complex():
                raise AdapterError(
                    f"Expected numbers of type {own[key].dtype} in the tensor {shown(key)}, got {tensor.dtype}. The "
                    "weights file is no adapter of this kind: get the original."
                )
            if not bool(torch.isfinite(tensor).all()):
                raise AdapterError(
                    f"Expected finite numbers in the tensor {shown(key)}, got NaN or infinity. The file is "
                    "damaged, or the training failed: use another checkpoint."
                )
        return mapped

    @staticmethod
    def _saved_modules(model: nn.Module, adapter_name: str, config: Any) -> dict[str, Tensor]:
        """Tensors of the modules that `modules_to_save` names, under their names in the model."""
        wrappers = {name: m for name, m in model.named_modules() if isinstance(m, ModulesToSaveWrapper)}
        for wanted in config.modules_to_save or ():
            if not any(f".{name}".endswith(f".{wanted}") for name in wrappers):
                raise AdapterError(
                    f"Expected names of modules in `modules_to_save`, got {shown(wanted)}, which is no module of "
                    f"{type(model).__name__} that can be stored whole. Leave it out."
                )
        return {
            f"{name}.modules_to_save.{adapter_name}.{key}": tensor
            for name, wrapper in wrappers.items()
            if adapter_name in wrapper.modules_to_save
            for key, tensor in wrapper.modules_to_save[adapter_name].state_dict().items()
        }

    @staticmethod
    def _own_tensors(model: nn.Module, adapter_name: str) -> dict[str, Tensor]:
        """Tensors of one adapter under their names in the model."""
        own: dict[str, Tensor] = {}
        for name, module in model.named_modules():
            if not isinstance(module, PromptLayer):
                continue
            for container in module.adapter_layer_names + module.other_param_names:
                entries = getattr(module, container)
                entry = entries[adapter_name] if adapter_name in entries else None
                path = ".".join(filter(None, (name, container, adapter_name)))
                if isinstance(entry, torch.Tensor):
                    own[path] = entry
                elif isinstance(entry, nn.Module):
                    own |= {f"{path}.{key}": tensor for key, tensor in entry.state_dict().items()}
        return own


def _some(items: list[str], limit: int = 3) -> str:
    """The first few items of a list for a message."""
    first = ", ".join(shown(item) for item in items[:limit]) or "none"
    return first + (f" and {len(items) - limit} more" if len(items) > limit else "")
