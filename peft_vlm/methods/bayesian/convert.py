"""Official checkpoints of Bayesian prompts to adapter folders, and back."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peft_vlm.conversion.base_model import TEXT, load_base, write_adapter
from peft_vlm.conversion.class_texts import context_settings
from peft_vlm.conversion.export import OfficialCheckpoint, adapter_tensors, base_tensors, prompt_buffers
from peft_vlm.conversion.official_file import ConversionReport, OfficialFile
from peft_vlm.methods.bayesian.config import BayesianConfig
from peft_vlm.methods.bayesian.model import BayesianModel
from peft_vlm.registry import OfficialFormat
from peft_vlm.text.prompts import tokenizer_of

KIND = "Bayesian prompts"
_LAYER = f"{TEXT.module(0)}.{BayesianModel.prefix}"
#: Our names and the official ones; `std_posterior` holds the log-variance.
VECTORS = {f"{_LAYER}mean": "mean_posterior", f"{_LAYER}log_variance": "std_posterior"}
NETWORKS = {
    f"{_LAYER}{ours}_network.{part}{number}": f"meta_net.{official}.module.{2 * (number - 1)}.{part}"
    for ours, official in (("mean", "weight_mean"), ("log_variance", "weight_log_variance"))
    for number in (1, 2, 3)
    for part in ("weight", "bias")
}


def convert_checkpoint(
    source: str | Path | OfficialFile,
    folder: str | Path,
    *,
    base_model: str | Path,
    num_samples: int = 20,
    context_init: str | None = None,
    class_names: Sequence[str] | None = None,
) -> ConversionReport:
    """Write an adapter folder from `prompt_learner/model.pth.tar-*` of Bayesian prompt learning.

    Args:
        source: The official file.
        folder: New folder.
        base_model: Folder or id of the CLIP of the training.
        num_samples: Vectors that predictions are averaged over; official `L`, which no file records.
        context_init: Words that the training started from (official `CTX_INIT`). The outputs do not depend on them;
            with them, templates that begin with these words give them up to the context.
        class_names: Classes of the training; by default read off the file.
    """
    file, base = OfficialFile.open(source), load_base(base_model)
    conditional = "mean_posterior" not in file.tensors
    context = file.take("ctx")
    tensors = {f"{_LAYER}prompt": context}
    for own, official in (NETWORKS if conditional else VECTORS).items():
        taken = file.take(official)
        tensors[own] = taken if conditional else taken.flatten()  # official vectors are (1, width)
    settings = context_settings(
        file,
        "token",
        base=base,
        tokenizer=tokenizer_of(base),
        num_tokens=len(context),
        context_init=context_init,
        class_names=class_names,
    )
    config = BayesianConfig(num_samples=num_samples, conditional=conditional, **settings)
    return write_adapter(get_peft_model(base, config), tensors, folder, file=file, kind=KIND)


def to_official(model: PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> OfficialCheckpoint:
    """`prompt_learner/model.pth.tar-*` of the official code.

    Args:
        model: Model with the active adapter.
        tokenizer: The base model's; with it the file also holds the class prompts, which official loaders drop.
    """
    config, own, base = model.active_peft_config, adapter_tensors(model), base_tensors(model)
    tensors = {"ctx": own[f"{_LAYER}prompt"]}
    for name, official in (NETWORKS if config.conditional else VECTORS).items():
        tensors[official] = own[name] if config.conditional else own[name][None]
    tensors |= prompt_buffers(base, tokenizer, config=config)
    kind = "cocoopvpt" if config.conditional else "coopvpt"
    return OfficialCheckpoint(tensors, {"VPT_TYPE": kind, "L": config.num_samples, "N_CTX": len(tensors["ctx"])})


def _is_bayesian(tensors: Mapping[str, Tensor]) -> bool:
    """Recognise a file: a context, and a distribution as vectors or networks."""
    return "ctx" in tensors and any(set(names.values()) <= set(tensors) for names in (VECTORS, NETWORKS))


OFFICIAL_FORMATS = (OfficialFormat(KIND, _is_bayesian, convert_checkpoint),)
