"""One prompt on several models at once: the same parameter, added to what each of them looks at."""

from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn

from peft_vlm.adapters.pixel_prompt import active_name, prompt_layer_of
from peft_vlm.methods.tvp.config import TVPConfig

KEPT_FIELDS = ("canvas_size", "border", "shape", "patch_size", "shrink", "clamp")
"""What makes a prompt what it is, on whatever model."""


def share_prompt(source: PeftModel, model: nn.Module, *, processor: Any = None) -> PeftModel:
    """Wrap another model with an adapter whose prompt is the very parameter of the source's active adapter.

    A step of an optimizer on one of them is a step on all, and their gradients add up. Save the source.

    Args:
        source: `PeftModel` with an active TVP adapter.
        model: Another model of any architecture, for example the CLIP of TSE or a second multimodal model; its own
            weights are frozen.
        processor: Its processor, for mean and standard deviation; by default what is stored beside the model.

    Returns:
        The wrapped model, whose adapter has the name of the source's.
    """
    layer = prompt_layer_of(source)
    name = active_name(layer)
    settings = {key: getattr(source.peft_config[name], key) for key in KEPT_FIELDS}
    config = TVPConfig(**settings) if processor is None else TVPConfig.for_processor(processor, **settings)
    shared = get_peft_model(model, config, adapter_name=name)
    prompt_layer_of(shared).prompts[name] = layer.prompts[name]
    return shared
