"""Official CoOp checkpoints to adapter folders, and those of three methods that train CoOp's context otherwise.

KgCoOp pulls the class features towards those of a fixed template, POMP samples classes: losses, not other prompts. PRE
encodes the context by a network, which the conversion collapses.
"""

import re
from collections.abc import Mapping, Sequence
from functools import partial
from itertools import takewhile
from pathlib import Path

import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerBase

from peft_vlm.adapters.learned_tokens import NETWORKS
from peft_vlm.conversion.base_model import load_base, official_pixels, write_adapter
from peft_vlm.conversion.class_texts import context_settings, token_ids, training_class_names, word_ids
from peft_vlm.conversion.export import OfficialCheckpoint, adapter_tensors, base_tensors, prompt_buffers
from peft_vlm.conversion.official_file import ConversionReport, OfficialFile
from peft_vlm.errors import AdapterError
from peft_vlm.methods.coop.config import CoOpConfig
from peft_vlm.registry import OfficialFormat
from peft_vlm.text.prompts import tokenizer_of

CONTEXT = "text_model.embeddings.token_embedding.coop_prompt"
COOP_TENSORS = {"ctx", "token_prefix", "token_suffix"}


def convert_checkpoint(
    source: str | Path | OfficialFile,
    folder: str | Path,
    *,
    base_model: str | Path,
    class_position: str,
    context_init: str | None = None,
    class_names: Sequence[str] | None = None,
) -> ConversionReport:
    """Write an adapter folder from `prompt_learner/model.pth.tar-*` of CoOp, POMP or PRE.

    Args:
        source: The official file.
        folder: New folder.
        base_model: Folder or id of the CLIP of the training.
        class_position: `"end"`, `"middle"` or `"front"`: official `CLASS_TOKEN_POSITION`, which no file records.
        context_init: Words that the training started from (official `CTX_INIT`). The outputs do not depend on them;
            with them, templates that begin with these words give them up to the context.
        class_names: Classes of the training; by default read off the file.
    """
    file = OfficialFile.open(source)
    kind, prefix = _kind(file.tensors), "prompt_learner." if "prompt_learner.ctx" in file.tensors else ""
    base = load_base(base_model)
    context = _context(file, f"{prefix}ctx")
    if kind == "PRE":
        context = _encoded(file, context, prefix)
    settings = context_settings(
        file,
        f"{prefix}{'train_' if kind == 'POMP' else ''}token",
        base=base,
        tokenizer=tokenizer_of(base),
        num_tokens=context.shape[-2],
        context_init=context_init,
        class_names=class_names,
    )
    if class_position != "end":  # the words are no beginning of the template then
        settings["template"] = "{}."
    file.set_aside("test_token_(prefix|suffix)", "embeddings of the evaluation's class prompts, from the base model")
    file.set_aside(rf"{prefix}(bias_vectors|meta_net\..*)", "read by nothing in the official code")
    config = CoOpConfig(class_specific=context.ndim == 3, class_position=class_position, **settings)
    return write_adapter(get_peft_model(base, config), {CONTEXT: context}, folder, file=file, kind=kind)


def _convert_kgcoop(
    source: str | Path | OfficialFile,
    folder: str | Path,
    *,
    base_model: str | Path,
    context_init: str | None = None,
    class_names: Sequence[str] | None = None,
) -> ConversionReport:
    """Write a CoOp adapter from a file of KgCoOp, whose class names always stand behind the context.

    Args:
        source: The official file.
        folder: New folder.
        base_model: Folder or id of the CLIP of the training.
        context_init: As for CoOp.
        class_names: As for CoOp.
    """
    settings = {"base_model": base_model, "context_init": context_init, "class_names": class_names}
    return convert_checkpoint(source, folder, class_position="end", **settings)


def _convert_atprompt(
    source: str | Path | OfficialFile,
    folder: str | Path,
    *,
    base_model: str | Path,
    class_names: Sequence[str] | None = None,
) -> ConversionReport:
    """Write a CoOp adapter with attribute words from a file of ATPrompt's CoOp; the words are read off it.

    Args:
        source: The official file.
        folder: New folder.
        base_model: Folder or id of the CLIP of the training.
        class_names: As for CoOp.

    Raises:
        AdapterError: If the file does not hold the words.
    """
    file = OfficialFile.open(source)
    prefix = "prompt_learner." if "prompt_learner.ctx" in file.tensors else ""
    base = load_base(base_model)
    tokenizer = tokenizer_of(base)
    middles = sorted(file.names(rf"{re.escape(prefix)}token_middle\d"))
    if not middles:
        raise AdapterError(
            f"Expected the attribute words as 'token_middle1', ... in {str(file.path)!r}, got none. Get the file as "
            "ATPrompt has saved it."
        )
    words = [token_ids(file, name, base)[0].tolist() for name in middles]
    vectors = [file.take(f"{prefix}ctx_att{number}") for number in range(1, 1 + len(middles))]
    file.set_aside(rf"{re.escape(prefix)}token_middle\d", "embeddings of the attribute words, from the base model")
    context = _context(file, f"{prefix}ctx")
    file.set_aside(rf"{re.escape(prefix)}ctx_att[{1 + len(middles)}-9]", f"the prompts have {len(middles)} attributes")
    fillers = _fillers(file, f"{prefix}token_suffix", base, tokenizer)
    if fillers:
        file.note(f"An attribute has several tokens: {len(fillers)} fillers stand before class names, as in training.")
    settings = {"base": base, "tokenizer": tokenizer, "class_names": class_names, "words_before": fillers}
    config = CoOpConfig(
        num_text_tokens=len(context),
        attributes=None if tokenizer is None else [tokenizer.decode(word).strip() for word in words],
        attribute_ids=words,
        num_attribute_tokens=[len(rows) for rows in vectors],
        class_names=training_class_names(file, f"{prefix}token", **settings),
        template=f"{'X ' * len(fillers)}{{}}.",
        **official_pixels(base),
    )
    tensors = {CONTEXT: torch.cat([*vectors, context])}
    return write_adapter(get_peft_model(base, config), tensors, folder, file=file, kind="ATPrompt")


def _fillers(file: OfficialFile, suffix: str, base: CLIPModel, tokenizer: PreTrainedTokenizerBase | None) -> list[int]:
    """Fillers ("X") before all class names, one for each token of a word that ATPrompt's code has lost."""
    if tokenizer is None or suffix not in file.tensors:
        return []
    filler, ids = word_ids("X", tokenizer) or [], token_ids(file, suffix, base)
    columns = takewhile(lambda column: bool((ids[:, column] == filler[0]).all()), range(ids.shape[1]))
    return filler * len(list(columns))


@torch.no_grad()
def _encoded(file: OfficialFile, context: Tensor, prefix: str) -> Tensor:
    """The context E(v) + v of PRE."""
    encoder = f"{prefix}encoder_network."
    kind = "lstm" if f"{encoder}lstm_head.weight_ih_l0" in file.tensors else "mlp"
    network = NETWORKS[kind](context.shape[-1])
    named = {"lstm": lambda name: f"lstm_head.{name}", "mlp": lambda name: f"module.{_LAYERS[name[-1]]}.{name[:-1]}"}
    for name, parameter in network.named_parameters():
        tensor = file.take(f"{encoder}{named[kind](name)}")
        if tensor.shape != parameter.shape:
            raise AdapterError(
                f"Expected {encoder}{named[kind](name)!r} of shape {tuple(parameter.shape)}, got "
                f"{tuple(tensor.shape)} in {str(file.path)!r}. PRE's networks LSTM1 and MLP1 are known."
            )
        parameter.copy_(tensor)
    return context + network(context)


#: Places of the two linear layers in PRE's perceptron.
_LAYERS = {"1": 0, "2": 2}


def _context(file: OfficialFile, name: str) -> Tensor:
    """The context vectors, shared by all classes or of each."""
    shape = tuple(file.tensors[name].shape)
    if len(shape) not in (2, 3):
        raise AdapterError(
            f"Expected {name!r} of shape (tokens, width), or (classes, tokens, width), got {shape} in "
            f"{str(file.path)!r}."
        )
    return file.take(name)


def _kind(tensors: Mapping[str, Tensor]) -> str:
    """Which of the four methods wrote a file."""
    if "train_token_suffix" in tensors:
        return "POMP"
    if _is_pre(tensors):
        return "PRE"
    return "KgCoOp" if any(name.endswith("bias_vectors") for name in tensors) else "CoOp"


def to_official(model: PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> OfficialCheckpoint:
    """`prompt_learner/model.pth.tar-*` of the official CoOp.

    Args:
        model: Model with the active adapter.
        tokenizer: The base model's; with it the file also holds the class prompts, which official loaders drop.

    Raises:
        AdapterError: If the adapter still has a network.
    """
    config, base = model.active_peft_config, base_tensors(model)
    if config.network is not None:
        raise AdapterError(
            f"Expected a CoOp adapter without a network, got one with {config.network!r} of a PRE training that has "
            "not ended. CoOp's file has no place for it: train it to its end."
        )
    tensors = {"ctx": adapter_tensors(model)[CONTEXT]}
    tensors |= prompt_buffers(base, tokenizer, config=config)
    settings = {"N_CTX": config.num_text_tokens, "CTX_INIT": config.context_init or "", "CSC": config.class_specific}
    return OfficialCheckpoint(tensors, settings | {"CLASS_TOKEN_POSITION": config.class_position})


def _is_coop(tensors: Mapping[str, Tensor]) -> bool:
    """Recognise a file of CoOp: a context, and at most the buffers beside it."""
    names = {name.removeprefix("prompt_learner.") for name in tensors}
    return "ctx" in names <= COOP_TENSORS


def _is_kgcoop(tensors: Mapping[str, Tensor]) -> bool:
    """Recognise a file of KgCoOp: a context with vectors that nothing reads."""
    return "prompt_learner.bias_vectors" in tensors or {"ctx", "bias_vectors"} <= set(tensors)


def _is_pomp(tensors: Mapping[str, Tensor]) -> bool:
    """Recognise a file of POMP: a context with buffers for training and evaluation."""
    return {"ctx", "train_token_suffix"} <= set(tensors)


def _is_pre(tensors: Mapping[str, Tensor]) -> bool:
    """Recognise a file of PRE: a context with a network."""
    names = {name.removeprefix("prompt_learner.") for name in tensors}
    return "ctx" in names and any(name.startswith("encoder_network.") for name in names)


def _is_atprompt(tensors: Mapping[str, Tensor]) -> bool:
    """Recognise a file of ATPrompt's CoOp: a context, vectors of attributes, and no network or projections."""
    names = {name.removeprefix("prompt_learner.") for name in tensors}
    known = ("ctx", "token_")
    return {"ctx", "ctx_att1"} <= names and all(name.startswith(known) for name in names)


OFFICIAL_FORMATS = (
    OfficialFormat("ATPrompt", _is_atprompt, _convert_atprompt),
    OfficialFormat("CoOp", _is_coop, convert_checkpoint),
    OfficialFormat("KgCoOp", _is_kgcoop, _convert_kgcoop),
    OfficialFormat("POMP", _is_pomp, convert_checkpoint),
    # the official scripts set PRE's position where it does not read it, so that it is "end"
    OfficialFormat("PRE", _is_pre, partial(convert_checkpoint, class_position="end")),
)
