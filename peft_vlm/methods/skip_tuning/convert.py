"""Official Skip Tuning checkpoints to adapter folders."""

import re
from collections.abc import Mapping, Sequence
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peft_vlm.conversion.base_model import (
    load_base,
    official_names,
    official_pixels,
    official_weights,
    openai_name,
    write_adapter,
)
from peft_vlm.conversion.clip import to_hf_names
from peft_vlm.conversion.export import OfficialCheckpoint, adapter_tensors, base_tensors
from peft_vlm.conversion.official_file import ConversionReport, OfficialFile
from peft_vlm.errors import AdapterError
from peft_vlm.methods.skip_tuning.config import SkipTuningConfig
from peft_vlm.methods.skip_tuning.model import SkipTuningModel
from peft_vlm.registry import OfficialFormat

KIND = "Skip Tuning"
HEADS = r"text_encoder\.(ln_final\..*|text_projection)|image_encoder\.(ln_post\..*|proj)"
LAYER = re.compile(r"(text|image)_encoder\.transformer\.resblocks\.(\d+)\..*")


def convert_checkpoint(
    source: str | Path | OfficialFile,
    folder: str | Path,
    *,
    base_model: str | Path,
    template: str,
    class_names: Sequence[str] | None = None,
    start_layer: int | None = None,
) -> ConversionReport:
    """Write an adapter folder from `learnable_params/model.pth.tar-*` of Skip Tuning.

    Args:
        source: The official file; it holds the whole CLIP, tuned layers and frozen ones.
        folder: New folder.
        base_model: Folder or id of the CLIP of the training.
        template: Text around a class name, which no file records.
        class_names: Classes of the training, in label order; the file has none.
        start_layer: Official `START_LAYER`; None: the first layer of either tower that is not the base model's.
    """
    file = OfficialFile.open(source)
    base = load_base(base_model)
    frozen = {name: tensor for name, tensor in official_weights(base).items() if name != "logit_scale"}
    start = _start_layer(file, frozen, start_layer)
    tuned = [name for name in frozen if re.fullmatch(HEADS, name) or _layer(name) >= start]
    tensors = to_hf_names({openai_name(name): file.take(name) for name in tuned})
    rest = {name: tensor for name, tensor in frozen.items() if name not in tuned}
    file.compare_frozen(rest, base_name=base.name_or_path)
    file.missing["logit_scale"] = f"in no file of Skip Tuning; taken from {base.name_or_path}"
    if class_names is None:
        file.note("No class names: the file has none. Name them when predicting, or convert again with class names.")
    names = None if class_names is None else list(class_names)
    config = SkipTuningConfig(start_layer=start, class_names=names, template=template, **official_pixels(base))
    copies = {re.sub(r"\.(weight|bias)$", rf".{SkipTuningModel.prefix}\1", name): t for name, t in tensors.items()}
    return write_adapter(get_peft_model(base, config), copies, folder, file=file, kind=KIND)


def _layer(name: str) -> int:
    """Number of the layer that a tensor belongs to; -1 outside of layers."""
    found = LAYER.fullmatch(name)
    return int(found[2]) if found else -1


def _start_layer(file: OfficialFile, base: Mapping[str, Tensor], given: int | None) -> int:
    """The first tuned layer: the first one that differs from the base model, unless given."""
    changed = sorted(
        _layer(name)
        for name, tensor in base.items()
        if _layer(name) >= 0 and name in file.tensors and not _is_same(file.tensors[name], tensor)
    )
    if given is not None:
        if changed and changed[0] < given:
            raise AdapterError(
                f"Expected `start_layer` of at most {changed[0]}, the first layer of {str(file.path)!r} that differs "
                f"from the base model, got {given}. Leave it out to read it off, or pass the base model of "
                "the training."
            )
        return given
    if not changed:
        raise AdapterError(
            f"No layer of {str(file.path)!r} differs from the base model: nothing was tuned, or the base model is "
            "itself the tuned one. Pass the base model from before the training, or `start_layer`."
        )
    file.note(f"`start_layer`={changed[0]} was read off: the first layer that differs from the base model.")
    return changed[0]


def _is_same(tensor: Tensor, base: Tensor) -> bool:
    """Whether a tensor is the base model's in the precision of the file."""
    return torch.equal(tensor, base.to(tensor.dtype))


def to_official(model: PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> OfficialCheckpoint:
    """`learnable_params/model.pth.tar-*` of the official Skip Tuning: the whole CLIP, tuned layers in place.

    Args:
        model: Model with the active adapter.
        tokenizer: The base model's; the file holds no texts.
    """
    copies = {name.replace(f".{SkipTuningModel.prefix}", "."): t for name, t in adapter_tensors(model).items()}
    tensors = official_names(base_tensors(model) | copies)
    del tensors["logit_scale"]  # the official module does not have it
    return OfficialCheckpoint(tensors, {"START_LAYER": min(model.active_peft_config.start_layers)})


def _is_skip_tuning(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has both towers and no learned tokens."""
    towers = {found[1] for found in map(LAYER.fullmatch, tensors) if found}
    others = any("VPT" in name or name.startswith("prompt_learner.") for name in tensors)
    return towers == {"text", "image"} and not others


OFFICIAL_FORMATS = (OfficialFormat(KIND, _is_skip_tuning, convert_checkpoint),)
