"""Official CoCoOp checkpoints to adapter folders, and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peft_vlm.conversion.base_model import TEXT, load_base, official_pixels, write_adapter
from peft_vlm.conversion.class_texts import check_context_words, official_template, training_class_names
from peft_vlm.conversion.export import adapter_tensors, base_tensors, prompt_buffers, save_official
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

    Raises:
        AdapterError: If the words are not as many tokens as there are context vectors.
    """
    file = OfficialFile.open(source)
    base = load_base(base_model)
    tokenizer = tokenizer_of(base)
    tensors = {own: file.take(official) for own, official in NAMES.items()}
    count = len(tensors[f"{_LAYER}prompt"])
    check_context_words(context_init, tokenizer, count=count, file=file)
    file.set_aside("u", "the mask of a training by CPL, which nothing reads afterwards")
    names = training_class_names(file, "token", base=base, tokenizer=tokenizer, class_names=class_names)
    config = CoCoOpConfig(
        num_text_tokens=count,
        context_init=context_init,
        class_names=names,
        template=official_template(context_init),
        **official_pixels(base),
    )
    return write_adapter(get_peft_model(base, config), tensors, folder, file=file, kind=KIND)


def export_checkpoint(
    model: PeftModel, path: str | Path, *, tokenizer: PreTrainedTokenizerBase | None = None, epoch: int = 1
) -> dict[str, Any]:
    """Write `prompt_learner/model.pth.tar-*` of the official CoCoOp.

    Args:
        model: Model with the active adapter.
        path: The file.
        tokenizer: The base model's; with it the file also holds the class prompts, which official loaders drop.
        epoch: What the file says of its epoch.

    Returns:
        Official settings that belong to the file.
    """
    config, own, base = model.active_peft_config, adapter_tensors(model), base_tensors(model)
    tensors = {official: own[name] for name, official in NAMES.items()}
    tensors |= prompt_buffers(base, tokenizer, config=config)
    save_official(tensors, path, epoch=epoch)
    return {"N_CTX": config.num_text_tokens, "CTX_INIT": config.context_init or ""}


def _is_cocoop(tensors: Mapping[str, Tensor]) -> bool:
    """Recognise a file of CoCoOp: a context and a network that shifts it by the image."""
    return set(NAMES.values()) <= set(tensors)


OFFICIAL_FORMATS = (OfficialFormat(KIND, _is_cocoop, convert_checkpoint),)
