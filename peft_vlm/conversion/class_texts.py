"""Read class names from the token embeddings that official prompt learners store as buffers.

A prompt learner stores, for each class of its training, the embeddings of the start token (`token_prefix`) and of all
that follows the context (`token_suffix`): class name, full stop, end token, padding. Looked up in the base model's
embedding table they give the token ids back, hence the names, and they show whether the base model is the right one.
"""

import re
import warnings
from collections.abc import Sequence
from itertools import takewhile
from typing import Any

import torch
from jaxtyping import Int
from torch import Tensor
from transformers import CLIPModel, PreTrainedTokenizerBase

from peft_vlm.conversion.base_model import official_pixels
from peft_vlm.conversion.official_file import FROZEN_TOLERANCE, OfficialFile
from peft_vlm.errors import AdapterError, ClassNameError, PeftVLMWarning, check_list
from peft_vlm.models.towers import towers_of

ROWS_AT_A_TIME = 512


def training_class_names(
    file: OfficialFile,
    buffers: str,
    *,
    base: CLIPModel,
    tokenizer: PreTrainedTokenizerBase | None,
    class_names: Sequence[str] | None,
    words_before: Sequence[int] = (),
) -> list[str] | None:
    """Names of the classes of a training, in label order; None where neither file nor caller has them.

    Args:
        file: File with prompt-learner buffers, or without.
        buffers: Name of the prompt learner's buffers, without `_prefix` and `_suffix`; they are set aside.
        base: The base model.
        tokenizer: Its tokenizer.
        class_names: Names given by the caller; checked against the file.
        words_before: Token ids between the context and the class name.

    Raises:
        ClassNameError: If the names given are not those of the file, or cannot be read off it and none are given.
    """
    check_list("class_names", class_names)
    suffix = f"{buffers}_suffix"
    file.set_aside(
        rf"{re.escape(buffers)}_(prefix|suffix)", "embeddings of the training's class prompts, from the base model"
    )
    if suffix not in file.tensors or tokenizer is None:
        if class_names is None:
            why = "no tokenizer beside the base model" if suffix in file.tensors else f"no {suffix!r} in the file"
            file.note(f"No class names: {why}. Name them when predicting, or convert again with class names.")
        return None if class_names is None else list(class_names)
    rows = _texts(token_ids(file, suffix, base), towers_of(base).end_token_id, words_before, file)
    if class_names is None:
        return _decoded(rows, tokenizer, file)
    given = [_tokens(name, tokenizer) for name in class_names]
    if len(given) != len(rows):
        raise ClassNameError(
            f"Expected the {len(rows)} class names of the training, got {len(given)}. Leave them out to read them off "
            f"{str(file.path)!r}; an adapter with learned context can be used with other classes whatever it records."
        )
    wrong = [index for index, (own, theirs) in enumerate(zip(given, rows, strict=True)) if own != theirs]
    if wrong:
        raise ClassNameError(
            f"Expected the class names of the training in its order, got {class_names[wrong[0]]!r} for class "
            f"{wrong[0]}, where {str(file.path)!r} has {tokenizer.decode(rows[wrong[0]])!r} ({len(wrong)} of "
            f"{len(rows)} differ). Leave them out to read them off the file."
        )
    return list(class_names)


def word_ids(words: str | None, tokenizer: PreTrainedTokenizerBase | None) -> list[int] | None:
    """Token ids of the words that a context started from; None without words or tokenizer.

    Args:
        words: Official `CTX_INIT`.
        tokenizer: The base model's.
    """
    return None if words is None or tokenizer is None else tokenizer(words, add_special_tokens=False)["input_ids"]


def context_settings(
    file: OfficialFile,
    buffers: str,
    *,
    base: CLIPModel,
    tokenizer: PreTrainedTokenizerBase | None,
    num_tokens: int,
    context_init: str | None,
    class_names: Sequence[str] | None,
    words_go_on: bool = False,
) -> dict[str, Any]:
    """Fields of a configuration that all prompt learners with a text context share.

    Args:
        file: The official file.
        buffers: As for `training_class_names`.
        base: The base model.
        tokenizer: Its tokenizer; without one nothing is compared.
        num_tokens: Context vectors in the file.
        context_init: Words that the training started from (official `CTX_INIT`).
        class_names: As for `training_class_names`.
        words_go_on: Whether there may be more words than vectors; the rest then stays in the prompts.

    Raises:
        AdapterError: If the words are not as many tokens as there are vectors.
    """
    words = word_ids(context_init, tokenizer)
    if words is not None and len(words) != num_tokens and not words_go_on:
        raise AdapterError(
            f"Expected `context_init` of {num_tokens} tokens, as many as {str(file.path)!r} has context vectors, got "
            f"{context_init!r} with {len(words)}. Leave it out where the training started from random vectors."
        )
    left = (words or [])[num_tokens:]
    given = {"tokenizer": tokenizer, "class_names": class_names, "words_before": left}
    return {
        "num_text_tokens": num_tokens,
        "context_init": context_init,
        **({"context_init_ids": words} if words_go_on else {}),
        "class_names": training_class_names(file, buffers, base=base, **given),
        # words that the context took the place of, class name, full stop
        "template": f"{context_init} {{}}." if context_init else "{}.",
        **official_pixels(base),
    }


def token_ids(file: OfficialFile, name: str, base: CLIPModel) -> Int[Tensor, "classes tokens"]:
    """Token ids whose embeddings a file stores.

    Args:
        file: File with them.
        name: Name of a tensor of shape (classes, tokens, width).
        base: Model whose embedding table they come from.

    Raises:
        AdapterError: If they are not rows of that table.
    """
    embeddings = file.tensors[name]
    table = base.text_model.embeddings.token_embedding.weight.detach()
    if embeddings.ndim != 3 or embeddings.shape[-1] != table.shape[-1]:
        raise AdapterError(
            f"Expected {name!r} of shape (classes, tokens, {table.shape[-1]}), got {tuple(embeddings.shape)}. "
            f"{str(file.path)!r} was made on another CLIP than {base.name_or_path!r}."
        )
    distinct, which = embeddings.flatten(0, 1).unique(dim=0, return_inverse=True)
    found = torch.empty(len(distinct), dtype=torch.long)
    rounded = table.to(embeddings.dtype).float()
    for start in range(0, len(distinct), ROWS_AT_A_TIME):
        chunk = distinct[start : start + ROWS_AT_A_TIME].float()
        distances, nearest = torch.cdist(chunk, rounded).min(dim=1)
        if bool((distances > FROZEN_TOLERANCE * chunk.norm(dim=1)).any()):
            raise AdapterError(
                f"{str(file.path)!r} was made on another CLIP than {base.name_or_path!r}: its class prompts are not "
                "made of that model's token embeddings. Pass the base model of the training."
            )
        found[start : start + len(chunk)] = nearest
    return found[which].view(embeddings.shape[:2])


def _texts(ids: Tensor, end: int, words_before: Sequence[int], file: OfficialFile) -> list[list[int]]:
    """Token ids of each class name with its full stop."""
    rows = [list(takewhile(lambda token: token != end, row)) for row in ids.tolist()]
    count = len(words_before)
    if any(row[:count] != list(words_before) for row in rows):
        raise AdapterError(
            f"Expected class prompts that continue with the rest of `context_init` after the context, got others in "
            f"{str(file.path)!r}. Pass the words that the training started from (official `CTX_INIT`)."
        )
    return [row[count:] for row in rows]


def _tokens(name: str, tokenizer: PreTrainedTokenizerBase) -> list[int]:
    """Token ids of a class name as the official prompts have it: underscores as spaces, and a full stop at the end."""
    return tokenizer(f"{name.replace('_', ' ')}.", add_special_tokens=False)["input_ids"]


def _decoded(rows: list[list[int]], tokenizer: PreTrainedTokenizerBase, file: OfficialFile) -> list[str]:
    """Names that give the same tokens again."""
    names: list[str] = []
    for row in rows:
        text = tokenizer.decode(row)
        same = [name for name in _spellings(text) if _tokens(name, tokenizer) == row]
        if not same:
            raise ClassNameError(
                f"The class names of {str(file.path)!r} cannot be read off it: {text!r} gives other tokens than the "
                "file has. Pass the class names of the training."
            )
        names.append(same[0])
    guessed = [name for name in names if re.search(r"[^a-z ]", name)]
    file.note(f"{len(names)} class names were read off the file, in lower case.")
    if guessed:
        warnings.warn(
            f"Class names were read off {str(file.path)!r}, which does not hold capitals and the spaces around digits "
            f"and punctuation: {len(guessed)} of {len(names)} may be spelled otherwise, such as {guessed[0]!r}. Pass "
            "the class names of the training for their own spelling.",
            PeftVLMWarning,
            stacklevel=2,
        )
    return names


def _spellings(text: str) -> list[str]:
    """Spellings of decoded tokens, the most likely first.

    CLIP's tokenizer splits off every digit and all punctuation, so that a file holds neither capitals nor the spaces
    around them.

    Args:
        text: Tokens with a space between any two, and the full stop of the prompt at the end.
    """
    plain = text.strip().removesuffix(".").strip()
    joined = re.sub(r"(?<=\d) (?=\d)", "", re.sub(r"\s*([-'/]+)\s*", r"\1", plain))  # 7 4 7 - 4 0 0: 747-400
    closed = re.sub(r"\s+([.,:;!?)\]%]+)", r"\1", joined)  # dr . no !: dr. no!
    closed = re.sub(r"([(\[#$]+)\s+", r"\1", re.sub(r"(?<=\d\.) (?=\d)", "", closed))
    letters = re.sub(r"(?<=\d) (?=[a-z](\b|\d))", "", re.sub(r"\b([a-z]) (?=\d)", r"\1", closed))  # a 300 b 4: a300b4
    return [letters, closed, joined, plain]
