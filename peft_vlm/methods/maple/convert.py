"""Official MaPLe checkpoints to adapter folders and back, and MaPLe adapters to PromptSRC ones, which are smaller."""

from collections.abc import Mapping, Sequence
from dataclasses import fields
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import save_file
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peft_vlm.adapters.context import AttributeContextConfig
from peft_vlm.adapters.learned_tokens import LearnedTokens, TextContext
from peft_vlm.conversion.base_model import (
    ADAPTER_PREFIX,
    TEXT,
    VISION,
    load_base,
    prompted_weights,
    write_adapter,
)
from peft_vlm.conversion.class_texts import context_settings
from peft_vlm.conversion.export import OfficialCheckpoint, adapter_tensors, base_tensors, prompt_buffers
from peft_vlm.conversion.official_file import ConversionReport, OfficialFile
from peft_vlm.errors import AdapterError
from peft_vlm.files import WEIGHTS_NAME, new_folder
from peft_vlm.methods.maple.config import MaPLeConfig
from peft_vlm.methods.maple.model import MaPLeModel
from peft_vlm.registry import ADAPTERS, OfficialFormat
from peft_vlm.text.prompts import tokenizer_of

KIND = "MaPLe"
LEARNER = "prompt_learner."
PROJECTION = f"{LEARNER}compound_prompt_projections."


def _official_tensor_names(depth: int) -> dict[str, str]:
    """Official names of the trained tensors by those in the adapted CLIP.

    Args:
        depth: Layers with learned tokens.
    """
    prefix = MaPLeModel.prefix
    names = {f"{TEXT.module(0)}.{prefix}prompt": f"{LEARNER}ctx"}
    names |= {f"{VISION.module(0)}.{prefix}{part}": f"{LEARNER}proj.{part}" for part in ("weight", "bias")}
    for layer in range(1, depth):
        names[f"{TEXT.module(layer)}.{prefix}prompt"] = f"{LEARNER}compound_prompts_text.{layer - 1}"
        for part in ("weight", "bias"):
            names[f"{VISION.module(layer)}.{prefix}{part}"] = f"{PROJECTION}{layer - 1}.{part}"
    return names


def convert_checkpoint(
    source: str | Path | OfficialFile,
    folder: str | Path,
    *,
    base_model: str | Path,
    context_init: str | None = None,
    class_names: Sequence[str] | None = None,
) -> ConversionReport:
    """Write an adapter folder from `MultiModalPromptLearner/model.pth.tar-*` of MaPLe.

    Args:
        source: The official file.
        folder: New folder.
        base_model: Folder or id of the CLIP of the training.
        context_init: Words that the training started from (official `CTX_INIT`, `"a photo of a"`). Needed where they
            are more tokens than the context (`N_CTX`, 2): the rest stays in the prompts.
        class_names: Classes of the training; by default read off the file.

    Raises:
        AdapterError: If a tensor of a layer is missing.
    """
    file, base = OfficialFile.open(source), load_base(base_model)
    depth = 1 + len(file.names(rf"{LEARNER}compound_prompts_text\.\d+".replace(".compound", r"\.compound")))
    names = _official_tensor_names(depth)
    missing = [name for name in names.values() if name not in file.tensors]
    if missing:
        where = f"in {str(file.path)!r}, whose text tokens reach depth {depth}"
        raise AdapterError(f"Expected {missing[0]!r} {where}, got none. The file is not whole: get it again.")
    tensors = {own: file.take(official) for own, official in names.items()}
    settings = context_settings(
        file,
        f"{LEARNER}token",
        base=base,
        tokenizer=tokenizer_of(base),
        num_tokens=len(tensors[f"{TEXT.module(0)}.{MaPLeModel.prefix}prompt"]),
        context_init=context_init,
        class_names=class_names,
        words_go_on=True,
    )
    file.compare_frozen(prompted_weights(base.state_dict()), base_name=base.name_or_path)
    model = get_peft_model(base, MaPLeConfig(depth=depth, **settings))
    return write_adapter(model, tensors, folder, file=file, kind=KIND)


def to_official(model: PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> OfficialCheckpoint:
    """`MultiModalPromptLearner/model.pth.tar-*` of the official MaPLe.

    Args:
        model: Model with the active adapter.
        tokenizer: The base model's; with it the file also holds the class prompts, which official loaders drop.
    """
    config, own, base = model.active_peft_config, adapter_tensors(model), base_tensors(model)
    tensors = prompted_weights(base)
    tensors |= {official: own[name] for name, official in _official_tensor_names(config.depth).items()}
    tensors |= prompt_buffers(base, tokenizer, config=config, prefix=LEARNER)
    settings = {"N_CTX": config.num_text_tokens, "PROMPT_DEPTH": config.depth, "CTX_INIT": config.context_init or ""}
    return OfficialCheckpoint(tensors, settings)


def fold(model: PeftModel, folder: str | Path) -> None:
    """Write the active MaPLe adapter as a PromptSRC adapter, which gives the same outputs without projections.

    After training the vision tokens are constants. With ViT-B/16 the folded adapter has 23,040 parameters, MaPLe's
    3.6 million. It cannot be trained on as MaPLe: keep the MaPLe adapter for that.

    Args:
        model: Model with the active adapter.
        folder: New folder.

    Raises:
        AdapterError: If the active adapter is none of MaPLe, or trains further modules.
    """
    own = model.active_peft_config
    if not isinstance(own, MaPLeConfig) or own.modules_to_save:
        raise AdapterError(
            f"Expected a MaPLe adapter without `modules_to_save`, got {type(own).__name__} with "
            f"{own.modules_to_save!r}."
        )
    shared = {
        f.name: getattr(own, f.name) for f in fields(AttributeContextConfig) if f.init and f.name != "target_modules"
    }
    shared |= {"text_depth": own.depth, "vision_depth": own.depth, "num_vision_tokens": own.num_text_tokens}
    shared.pop("peft_type")
    config = ADAPTERS["promptsrc"].config(**shared)
    tensors = {}
    for name, layer in model.get_base_model().named_modules():
        if isinstance(layer, LearnedTokens):
            is_context = isinstance(layer, TextContext)  # attribute words are no part of the file
            tokens = layer.prompts[model.active_adapter] if is_context else layer.active_prompt(torch.empty(0))
            assert tokens is not None, "the adapter is active"
            place = name.replace(".base_layer", "")
            tensors[f"{ADAPTER_PREFIX}{place}.promptsrc_prompt"] = tokens.detach().cpu().contiguous()
    with new_folder(folder) as part:
        config.save_pretrained(str(part))
        save_file(tensors, part / WEIGHTS_NAME, metadata={"format": "pt"})


def _is_maple(tensors: Mapping[str, Tensor]) -> bool:
    """Recognise a file of MaPLe: vision tokens are projected from text tokens."""
    return f"{LEARNER}proj.weight" in tensors


OFFICIAL_FORMATS = (OfficialFormat(KIND, _is_maple, convert_checkpoint),)
