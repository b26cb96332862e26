"""Official CoCoOp checkpoints to adapter folders, and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peft_vlm.conversion.base_model import TEXT, load_base, write_adapter
from peft_vlm.conversion.class_texts import context_settings
from peft_vlm.conversion.export import OfficialCheckpoint, adapter_tensors, base_tensors, prompt_buffers
from peft_vlm.conversion.official_file import ConversionReport, OfficialFile
from peft_vlm.methods.cocoop.config import CoCoOpConfig
from peft_vlm.methods.cocoop.model import CoCoOpModel
from peft_vlm.registry import OfficialFormat
from peft_vlm.text.prompts import tokenizer_of

KIND = "CoCoOp"
_LAYER = f"{TEXT.module(0)}.{CoCoOpModel.prefix}"
#: Our names and the official ones.
NAMES = {f"{_LAYER}prompt": "ctx"} | {
    f"{_LAYER}{part}{number}": f"meta_net.linear{number}.{part}" for number in (1, 2) for part in ("weight", "bias")
}


def convert_checkpoint(
    source: str | Path | OfficialFile,
    folder: str | Path,
    *,
    base_model: str | Path,
    context_init: str | None = None,
    class_names: Sequence[str] | None = None,
) -> ConversionReport:
    """Write an adapter folder from `prompt_learner/model.pth.tar-*` of CoCoOp or CPL.

    Args:
        source: The official file.
        folder: New folder.
        base_model: Folder or id of the CLIP of the training.
        context_init: Words that the training started from (official `CTX_INIT`). The outputs do not depend on them;
            with them, templates that begin with these words give them up to the context.
        class_names: Classes of the training; by default read off the file.
    """
    file, base = OfficialFile.open(source), load_base(base_model)
    tensors = {own: file.take(official) for own, official in NAMES.items()}
    file.set_aside("u", "the mask of a training by CPL, which nothing reads afterwards")
    settings = context_settings(
        file,
        "token",
        base=base,
        tokenizer=tokenizer_of(base),
        num_tokens=len(tensors[f"{_LAYER}prompt"]),
        context_init=context_init,
        class_names=class_names,
    )
    model = get_peft_model(base, CoCoOpConfig(**settings))
    return write_adapter(model, tensors, folder, file=file, kind=KIND)


def to_official(model: PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> OfficialCheckpoint:
    """`prompt_learner/model.pth.tar-*` of the official CoCoOp.

    Args:
        model: Model with the active adapter.
        tokenizer: The base model's; with it the file also holds the class prompts, which official loaders drop.
    """
    config, own, base = model.active_peft_config, adapter_tensors(model), base_tensors(model)
    tensors = {official: own[name] for name, official in NAMES.items()}
    tensors |= prompt_buffers(base, tokenizer, config=config)
    return OfficialCheckpoint(tensors, {"N_CTX": config.num_text_tokens, "CTX_INIT": config.context_init or ""})


def _is_cocoop(tensors: Mapping[str, Tensor]) -> bool:
    """Recognise a file of CoCoOp: a context and a network that shifts it by the image."""
    return set(NAMES.values()) <= set(tensors)


OFFICIAL_FORMATS = (OfficialFormat(KIND, _is_cocoop, convert_checkpoint),)
