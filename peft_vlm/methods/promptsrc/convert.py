"""Official PromptSRC and IVLP checkpoints, PromptKD's teachers among them, to adapter folders."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peft_vlm.conversion.base_model import (
    TEXT,
    VISION,
    load_base,
    prompted_weights,
    take_learned_tokens,
    write_adapter,
)
from peft_vlm.conversion.class_texts import context_settings
from peft_vlm.conversion.export import (
    OfficialCheckpoint,
    adapter_tensors,
    base_tensors,
    official_tokens,
    prompt_buffers,
)
from peft_vlm.conversion.official_file import ConversionReport, OfficialFile
from peft_vlm.errors import AdapterError
from peft_vlm.methods.promptsrc.config import PromptSRCConfig
from peft_vlm.methods.promptsrc.model import PromptSRCModel
from peft_vlm.registry import OfficialFormat
from peft_vlm.text.prompts import tokenizer_of

KIND = "PromptSRC or IVLP"
OTHERS = ("VPT_image_trans.", "prompt_learner.bias_vectors", "prompt_learner.proj.")
"""Tensors of PromptKD students, KgCoOp and MaPLe, which share some of the names."""


def convert_checkpoint(
    source: str | Path | OfficialFile,
    folder: str | Path,
    *,
    base_model: str | Path,
    context_init: str | None = None,
    template: str | None = None,
    class_names: Sequence[str] | None = None,
) -> ConversionReport:
    """Write an adapter folder from `VLPromptLearner/model.pth.tar-*` of PromptSRC or IVLP.

    Numbers of tokens and depths are read off the tensors. After PromptSRC's aggregation the frozen weights of the file
    are averages as well; the adapter runs on the base model's own.

    Args:
        source: The official file; a file of the learned tokens alone will do.
        folder: New folder.
        base_model: Folder or id of the CLIP of the training.
        context_init: Words that the training started from (official `CTX_INIT`, `"a photo of a"`). Needed where they
            are more tokens than the context (`N_CTX_TEXT`): the rest stays in the prompts. Otherwise the outputs do
            not depend on them; with them, templates that begin with these words give them up to the context.
        template: Text around a class name, for a file with vision tokens only (VPT); it does not hold one.
        class_names: Classes of the training; by default read off the file.

    Raises:
        AdapterError: If a template is missing, or given for a file with its own.
    """
    file, base = OfficialFile.open(source), load_base(base_model)
    text, num_text, text_depth = take_learned_tokens(file, TEXT, prefix=PromptSRCModel.prefix)
    vision, num_vision, vision_depth = take_learned_tokens(file, VISION, prefix=PromptSRCModel.prefix)
    if bool(text) == (template is not None):
        raise AdapterError(
            f"Expected `template` for a file without text context only, which does not say what its class prompts "
            f"were; got {template!r} for {str(file.path)!r} with {num_text} context tokens."
        )
    settings = context_settings(
        file,
        "prompt_learner.token",
        base=base,
        tokenizer=tokenizer_of(base),
        num_tokens=num_text,
        context_init=context_init,
        class_names=class_names,
        words_go_on=True,
    )
    settings |= {"text_depth": text_depth, "num_vision_tokens": num_vision, "vision_depth": vision_depth}
    if template is not None:
        settings["template"] = template
    file.set_aside(r"prompt_learner\.ZS_image_encoder\..*", "copy of the frozen vision tower, for the training's loss")
    file.compare_frozen(prompted_weights(base.state_dict()), base_name=base.name_or_path)
    model = get_peft_model(base, PromptSRCConfig(**settings))
    return write_adapter(model, text | vision, folder, file=file, kind=KIND)


def to_official(model: PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> OfficialCheckpoint:
    """`VLPromptLearner/model.pth.tar-*` of the official PromptSRC (which IVLP's trainer loads too).

    Args:
        model: Model with the active adapter.
        tokenizer: The base model's; with it the file also holds the class prompts, which official loaders drop.
    """
    config, own, base = model.active_peft_config, adapter_tensors(model), base_tensors(model)
    tensors = prompted_weights(base)
    vision = {name: t for name, t in tensors.items() if name.startswith("image_encoder.")}
    tensors |= {f"prompt_learner.ZS_{name}": tensor for name, tensor in vision.items()}
    for names in (TEXT, VISION):
        tensors |= official_tokens(own, names, prefix=PromptSRCModel.prefix)
    text_depth, vision_depth = config.depths
    if text_depth:
        tensors |= prompt_buffers(base, tokenizer, config=config, prefix="prompt_learner.")
    settings = {"N_CTX_TEXT": config.num_text_tokens, "N_CTX_VISION": config.num_vision_tokens}
    settings |= {"PROMPT_DEPTH_TEXT": text_depth, "PROMPT_DEPTH_VISION": vision_depth}
    return OfficialCheckpoint(tensors, settings | {"CTX_INIT": config.context_init or ""})


def _is_promptsrc(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has learned tokens in one or two towers and nothing else that is trained."""
    learned = TEXT.shallow in tensors or VISION.shallow in tensors
    towers = any(name.startswith(("image_encoder.", "text_encoder.")) for name in tensors)
    return learned and towers and not any(name.startswith(OTHERS) for name in tensors)


OFFICIAL_FORMATS = (OfficialFormat(KIND, _is_promptsrc, convert_checkpoint),)
