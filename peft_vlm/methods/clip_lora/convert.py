"""Official CLIP-LoRA files to adapters of PEFT's LoRA."""

import math
import re
from collections.abc import Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

from peft import LoraConfig, get_peft_model
from torch import Tensor
from transformers import CLIPModel

from peft_vlm.adapters.config import VLMConfig, architecture_of, write_facts
from peft_vlm.conversion.base_model import TEXT, VISION, TowerNames, load_base, official_pixels, write_adapter
from peft_vlm.conversion.official_file import ConversionReport, OfficialFile
from peft_vlm.errors import AdapterError, shown
from peft_vlm.methods.clip_lora.objective import CONFIG
from peft_vlm.registry import OfficialFormat

KIND = "CLIP-LoRA"
_NAME = re.compile(r"layer_(\d{1,4})\.(q_proj|k_proj|v_proj|proj)\.w_lora_([AB])")
#: Layers by the official `position`, the same in both towers; "all" is what the file has.
_POSITIONS: dict[str, tuple[int, ...]] = {
    **{"top": (11,), "top1": (11,), "top2": (10, 11), "top3": (9, 10, 11)},
    **{"bottom": tuple(range(4)), "mid": tuple(range(4, 8)), "up": tuple(range(8, 12))},
    **{"half-bottom": tuple(range(6)), "half-up": tuple(range(6, 12))},
}


def convert_checkpoint(
    source: str | Path | OfficialFile,
    folder: str | Path,
    *,
    base_model: str | Path,
    class_names: Sequence[str] | None = None,
) -> ConversionReport:
    """Write an adapter of PEFT's LoRA from what CLIP-LoRA saves with `--save_path`.

    Args:
        source: The official file.
        folder: New folder.
        base_model: Folder or id of the CLIP of the training.
        class_names: Classes of the training, which the file does not hold.

    Raises:
        AdapterError: If the file does not say how its matrices are scaled and placed, or they do not fit the model.
    """
    file = OfficialFile.open(source)
    base = load_base(base_model)
    rank, alpha = (file.metadata.get(name) for name in ("r", "alpha"))
    if type(rank) is not int or rank < 1 or type(alpha) not in (int, float) or not math.isfinite(alpha):
        raise AdapterError(
            f"Expected numbers `r` and `alpha` in the metadata of {str(file.path)!r}, got {shown(rank)} and "
            f"{shown(alpha)}. Get the file as CLIP-LoRA has saved it."
        )
    tensors: dict[str, Tensor] = {}
    places = _places(file, base)
    for name in file.tensors:
        layer, projection, matrix = _match(name)
        tower, number = places[layer]
        part = "out_proj" if projection == "proj" else projection
        tensor = file.take(name)
        width = getattr(base.config, f"{tower.tower}_config").hidden_size
        if tuple(tensor.shape) != ((rank, width) if matrix == "A" else (width, rank)):
            raise AdapterError(
                f"Expected {name!r} of rank {rank} and width {width}, got shape {tuple(tensor.shape)}. "
                f"{str(file.path)!r} was made on another CLIP than {base.name_or_path!r}."
            )
        tensors[f"{tower.layers}.{number}.self_attn.{part}.lora_{matrix}.weight"] = tensor
    modules = sorted({name.rpartition(".lora_")[0] for name in tensors})
    parts = sorted({name.rpartition(".")[2] for name in modules})
    if len(tensors) != 2 * len(places) * len(parts):
        raise AdapterError(
            f"Expected matrices A and B of {parts!r} in each of {len(places)} layers of {str(file.path)!r}, got "
            f"{len(tensors)} matrices. The file is not whole: get it again."
        )
    whole = sorted(name for name, _ in base.named_modules() if name.rpartition(".")[2] in parts)
    settings = {"r": rank, "lora_alpha": alpha, "target_modules": parts if whole == modules else modules}
    config = LoraConfig(**(CONFIG | settings))
    model = get_peft_model(base, config)
    if class_names is None:
        file.note("No class names: the file has none. Name them when predicting, or convert again with class names.")
    file.note(f"The dropout of a further training is not in the file: {CONFIG['lora_dropout']}, the official default.")
    facts = VLMConfig(
        peft_type=config.peft_type,
        base_model_name_or_path=base.name_or_path,
        class_names=None if class_names is None else list(class_names),
        template="a photo of a {}.",  # the only one of the official code, for all data sets
        base_architecture=architecture_of(base.config.to_dict()),
        **official_pixels(base),
    )
    beside = partial(write_facts, facts, model.active_peft_config)
    return write_adapter(model, tensors, folder, file=file, kind=KIND, facts=facts, beside=beside)


def _match(name: str) -> tuple[int, str, str]:
    """Layer, projection and matrix of a tensor."""
    found = _NAME.fullmatch(name)
    if found is None:
        raise AdapterError(f"Expected names such as 'layer_0.q_proj.w_lora_A', got {shown(name)}.")
    return int(found[1]), found[2], found[3]


def _places(file: OfficialFile, base: CLIPModel) -> list[tuple[TowerNames, int]]:
    """Tower and layer of each adapted layer in the order of the file: text layers first, then vision layers."""
    count = 1 + max(_match(name)[0] for name in file.tensors)
    encoder, position = (file.metadata.get(name) for name in ("encoder", "position"))
    towers = {"text": (TEXT,), "vision": (VISION,), "both": (TEXT, VISION)}.get(str(encoder), ())
    depths: dict[str, Any] = {tower.tower: len(base.get_submodule(tower.layers)) for tower in (TEXT, VISION)}
    places: list[tuple[TowerNames, int]] = []
    for tower in towers:
        rest = count - len(places) if tower is towers[-1] else depths[tower.tower]  # "all" of ViT-L/14 is 21 of 24
        layers = tuple(range(rest)) if position == "all" else _POSITIONS.get(str(position), ())
        places += [(tower, layer) for layer in layers]
    if len(places) != count or any(layer >= depths[tower.tower] for tower, layer in places):
        raise AdapterError(
            f"Expected {count} adapted layers of {base.name_or_path!r} by `encoder` and `position` in the metadata of "
            f"{str(file.path)!r}, got {shown(encoder)} and {shown(position)}, which are {len(places)}. Pass the base "
            "model of the training."
        )
    return places


def _is_clip_lora(tensors: Mapping[str, Tensor]) -> bool:
    """Recognise a file of CLIP-LoRA: pairs of matrices by layer and projection."""
    return any(_NAME.fullmatch(name) for name in tensors)


OFFICIAL_FORMATS = (OfficialFormat(KIND, _is_clip_lora, convert_checkpoint),)
