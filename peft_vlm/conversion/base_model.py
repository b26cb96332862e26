"""The base CLIP of an official checkpoint under its official names, and the adapter for it."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModel, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from peft_vlm.conversion.clip_names import to_openai_names
from peft_vlm.conversion.official_file import ConversionReport, OfficialFile
from peft_vlm.errors import AdapterError, UnsupportedModelError
from peft_vlm.files import CONVERSION_NAME, new_folder, write_json
from peft_vlm.models.repository import hub_options

ADAPTER_PREFIX = "base_model.model."
"""Prefix of every name in a weights file of PEFT."""


def load_base(base_model: str | Path) -> CLIPModel:
    """The CLIP of a training.

    Args:
        base_model: Folder or id.

    Raises:
        AdapterError: If there is no such model.
        UnsupportedModelError: If it is no `CLIPModel`.
    """
    try:
        model = AutoModel.from_pretrained(str(base_model), dtype=torch.float32, **hub_options(base_model))
    except (OSError, ValueError) as error:
        raise AdapterError(
            f"The base model {str(base_model)!r} could not be loaded: {error}. Pass the folder or id of the CLIP of "
            "the training; `convert_clip` makes such a folder of OpenAI's or open_clip's weights."
        ) from error
    if not isinstance(model, CLIPModel):
        raise UnsupportedModelError(
            f"Expected a `CLIPModel` as base model, got `{type(model).__name__}` from {str(base_model)!r}. The "
            "official codes know no other family."
        )
    return model.eval()


def official_pixels(model: CLIPModel) -> dict[str, Any]:
    """Image preparation of the official codes as fields of a configuration, the same for every CLIP.

    Args:
        model: The base model.
    """
    size = model.config.vision_config.image_size
    return {
        "image_mean": list(OPENAI_CLIP_MEAN),
        "image_std": list(OPENAI_CLIP_STD),
        "image_size": [size, size],
    }


def official_weights(model: CLIPModel) -> dict[str, Tensor]:
    """The weights of a CLIP under the names of the official trainers.

    Args:
        model: A plain `CLIPModel`.
    """
    return official_names({name: tensor.detach() for name, tensor in model.state_dict().items()})


def official_names(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """Tensors of a `CLIPModel` under the names of the official trainers.

    Args:
        tensors: State dict of a `CLIPModel`.
    """
    return {official_name(name): tensor for name, tensor in to_openai_names(tensors).items()}


def official_name(openai: str) -> str:
    """Name of a CLIP tensor in a trainer's model: `image_encoder.*`, `text_encoder.*`, `logit_scale`.

    Args:
        openai: OpenAI's name.
    """
    if openai.startswith("visual."):
        return openai.replace("visual.", "image_encoder.", 1)
    return openai if openai == "logit_scale" else f"text_encoder.{openai}"


def openai_name(official: str) -> str:
    """The inverse of `official_name`.

    Args:
        official: Name in a trainer's model.
    """
    if official.startswith("image_encoder."):
        return official.replace("image_encoder.", "visual.", 1)
    return official.removeprefix("text_encoder.")


def write_adapter(
    model: PeftModel, tensors: Mapping[str, Tensor], folder: str | Path, *, file: OfficialFile, kind: str
) -> ConversionReport:
    """Put tensors into a new adapter and write its folder with the report.

    Args:
        model: The base model with the new adapter.
        tensors: All of the adapter's tensors by their names in the base model.
        folder: New folder.
        file: The account of the official file.
        kind: Kind of the file.
    """
    set_peft_model_state_dict(model, {f"{ADAPTER_PREFIX}{name}": tensor for name, tensor in tensors.items()})
    report = file.report(kind, model.active_peft_config)
    with new_folder(folder) as part:
        model.save_pretrained(part)
        write_json(part / CONVERSION_NAME, report.to_dict())
    return report
