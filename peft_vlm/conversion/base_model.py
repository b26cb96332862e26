"""The CLIP that an official checkpoint was made on, its weights and learned tokens under official names, and the
adapter that goes onto it.
"""

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from peft.utils import set_peft_model_state_dict
from torch import Tensor
from transformers import AutoModel, CLIPModel
from transformers.image_utils import OPENAI_CLIP_MEAN, OPENAI_CLIP_STD

from peft_vlm.conversion.clip import to_openai_names
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


def prompted_weights(tensors: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """What the files of prompt learners hold of a `CLIPModel`, under official names: all but the token table, from
    which their class prompts were made.

    Args:
        tensors: State dict of a `CLIPModel`.
    """
    return {name: tensor for name, tensor in official_names(tensors).items() if "token_embedding" not in name}


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
    model: PeftModel,
    tensors: Mapping[str, Tensor],
    folder: str | Path,
    *,
    file: OfficialFile,
    kind: str,
    facts: Any = None,
    beside: Callable[[Path], None] | None = None,
) -> ConversionReport:
    """Put tensors into a new adapter and write its folder with the report.

    Args:
        model: The base model with the new adapter.
        tensors: All of the adapter's tensors by their names in the base model.
        folder: New folder.
        file: The account of the official file.
        kind: Kind of the file.
        facts: What the report says of classes, where an adapter's own configuration does not.
        beside: Writes what an adapter of PEFT's own types has beside its configuration, into its folder.
    """
    set_peft_model_state_dict(model, {f"{ADAPTER_PREFIX}{name}": tensor for name, tensor in tensors.items()})
    report = file.report(kind, facts or model.active_peft_config)
    with new_folder(folder) as part:
        model.save_pretrained(part)
        if beside is not None:
            beside(part)
        write_json(part / CONVERSION_NAME, report.to_dict())
    return report


@dataclass(frozen=True)
class TowerNames:
    """Places of the learned tokens in one tower.

    Args:
        tower: Name in configurations.
        shallow: Official name of the tokens at the entrance.
        encoder: Official name of the tower.
        entrance: Module of `CLIPModel` that carries the tokens at the entrance.
        layers: Its transformer layers.
    """

    tower: str
    shallow: str
    encoder: str
    entrance: str
    layers: str

    def deep(self, layer: int) -> str:
        """Official name of the tokens at the input of a layer above the first.

        Args:
            layer: Number of the layer.
        """
        return f"{self.encoder}.transformer.resblocks.{layer}.VPT_shallow"

    def module(self, layer: int) -> str:
        """Module that carries the tokens of a layer.

        Args:
            layer: Number of the layer; 0 is the entrance.
        """
        return f"{self.layers}.{layer}" if layer else self.entrance


TEXT = TowerNames(
    "text", "prompt_learner.ctx", "text_encoder", "text_model.embeddings.token_embedding", "text_model.encoder.layers"
)
VISION = TowerNames(
    "vision", "image_encoder.VPT", "image_encoder", "vision_model.embeddings", "vision_model.encoder.layers"
)


def take_learned_tokens(file: OfficialFile, names: TowerNames, *, prefix: str) -> tuple[dict[str, Tensor], int, int]:
    """The learned tokens of one tower.

    Args:
        file: The official file.
        names: The tower.
        prefix: Parameter prefix of the method, such as `"promptsrc_"`.

    Returns:
        Tensors by their names in the adapted CLIP, number of tokens, and depth; nothing, 0 and 0 without tokens.

    Raises:
        AdapterError: If layers are left out, or numbers of tokens differ between layers.
    """
    numbers = re.compile(rf"{names.encoder}\.transformer\.resblocks\.(\d+)\.VPT_shallow")
    layers = sorted(int(found[1]) for found in map(numbers.fullmatch, file.tensors) if found)
    if names.shallow not in file.tensors and not layers:
        return {}, 0, 0
    if layers != list(range(1, len(layers) + 1)):
        raise AdapterError(
            f"Expected learned tokens in {names.tower} layers 1, 2, ... without a gap, got layers {layers} in "
            f"{str(file.path)!r}."
        )
    official = [names.shallow, *(names.deep(layer) for layer in layers)]
    taken = [file.take(name) for name in official]
    shapes = {tuple(tensor.shape) for tensor in taken}
    if len(shapes) > 1 or taken[0].ndim != 2:
        raise AdapterError(f"Expected one shape (tokens, width) of {official!r}, got {sorted(shapes)}.")
    tensors = {f"{names.module(layer)}.{prefix}prompt": tensor for layer, tensor in enumerate(taken)}
    return tensors, len(taken[0]), len(taken)
