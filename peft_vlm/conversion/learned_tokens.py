"""Learned tokens of the official prompt learners (`ctx`, `VPT`, `VPT_shallow`) and their names in a CLIP."""

import re
from dataclasses import dataclass

from torch import Tensor

from peft_vlm.conversion.official_file import OfficialFile
from peft_vlm.errors import AdapterError


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
