"""The transformer layers of the language model inside a multimodal model, and how to run the upper ones alone.

The model's own forward computes masks and positions from the token columns, whatever the architecture. To run it from
layer `start` on, the layers below give the stored hidden states instead of their own; without `pixel_values` nothing
of the vision side runs.
"""

import inspect
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.errors import UnsupportedModelError
from peft_vlm.models.towers import unwrap

VISION_COLUMNS = ("pixel_values", "pixel_attention_mask", "image_sizes")
"""Inputs that only the vision side reads. `image_grid_thw` is not among them: Qwen2-VL's positions come from it."""


class _ReachedError(Exception):
    """Ends a forward pass at a layer."""


@dataclass(frozen=True)
class LanguageLayers:
    """Layers of a decoder-only language model.

    Args:
        name: Full name of the layer list in the Hugging Face model.
        layers: The layers, first to last.
        norm_name: Full name of the norm after the last layer; None where there is none.
        reader: The part of the model that turns token columns alone into logits: the model itself, or the language
            model inside it where the model's own forward insists on an image.
    """

    name: str
    layers: nn.ModuleList
    norm_name: str | None
    reader: nn.Module

    @torch.no_grad()
    def states_entering(self, start: int, run: Callable[[], Any]) -> Float[Tensor, "batch tokens width"]:
        """Hidden states that enter a layer in a forward pass, which ends there; no autograd.

        Args:
            start: Number of the layer.
            run: Calls the model.
        """
        found: list[Tensor] = []

        def reached(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            found.append(args[0] if args else kwargs["hidden_states"])
            raise _ReachedError

        # The pass ends by an exception, so that neither the layers above nor the output head are computed.
        handle = self.layers[start].register_forward_pre_hook(reached, with_kwargs=True, prepend=True)
        try:
            run()
        except _ReachedError:
            pass
        finally:
            handle.remove()
        return found[0]

    @contextmanager
    def entered_with(self, start: int, hidden: Float[Tensor, "batch tokens width"]) -> Iterator[None]:
        """Inside, forward passes skip the layers below `start`, which gets the given states.

        Args:
            start: Number of the layer, 1 or more.
            hidden: What `states_entering` gave for the rows of the batch.
        """

        below = list(self.layers)[:start]
        try:
            for layer in below:  # on the object, and deleted below: the class keeps its own
                layer.forward = lambda *args, **kwargs: hidden
            yield
        finally:
            for layer in below:
                del layer.forward

    def text_inputs(self, inputs: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """Of a model's inputs those that the reader takes: none of the vision side.

        Args:
            inputs: Columns the model takes.
        """
        taken = inspect.signature(self.reader.forward).parameters
        return {name: column for name, column in inputs.items() if name in taken and name not in VISION_COLUMNS}

    def leaves(self, start: int) -> list[str]:
        """Full names of the modules with weights from a layer on, the final norm included.

        Args:
            start: Number of the first layer.
        """
        names = [f"{self.name}.{i}.{leaf}" for i in range(start, len(self.layers)) for leaf in _leaves(self.layers[i])]
        return names + ([self.norm_name] if self.norm_name else [])


def _leaves(module: nn.Module, prefix: str = "") -> Iterator[str]:
    """Names of the modules that hold parameters themselves; an adapter's layer counts as the one it wraps."""
    wraps = "base_layer" in dict(module.named_children())
    if wraps or (next(module.parameters(recurse=False), None) is not None):
        yield prefix
        return
    for name, child in module.named_children():
        yield from _leaves(child, f"{prefix}.{name}" if prefix else name)


def language_layers_of(model: nn.Module) -> LanguageLayers:
    """The language layers of a multimodal model.

    Args:
        model: Image-text-to-text model, with or without a `PeftModel` around it.

    Raises:
        UnsupportedModelError: If it has no language model that is a decoder alone.
    """
    base: Any = unwrap(model)
    if not is_multimodal(base):
        raise UnsupportedModelError(
            f"Expected a model that reads images and writes text, got `{type(base).__name__}`."
        )
    if base.config.get_text_config().is_encoder_decoder:
        raise UnsupportedModelError(
            f"Expected a language model that is a decoder alone, got `{type(base).__name__}` with an encoder: which "
            "of its layers come first is not defined. Use a checkpoint with a decoder-only language model."
        )
    decoder = base.get_decoder()  # of the multimodal model; its own decoder may lie one or two levels deeper
    while decoder.get_decoder() is not decoder:
        decoder = decoder.get_decoder()
    names = {id(module): name for name, module in base.named_modules()}
    norms = [child for name, child in decoder.named_children() if name in ("norm", "final_layer_norm")]
    takes_text_alone = inspect.signature(base.forward).parameters["pixel_values"].default is None
    return LanguageLayers(
        name=names[id(decoder.layers)],
        layers=decoder.layers,
        norm_name=names[id(norms[0])] if norms else None,
        reader=base if takes_text_alone else base.language_model,
    )


def is_multimodal(model: nn.Module) -> bool:
    """Return whether a Hugging Face model reads images and generates text."""
    base: Any = unwrap(model)
    return "pixel_values" in inspect.signature(base.forward).parameters and base.can_generate()
