"""Captions of the pretraining images, and the byte-pair tokenizer that is trained on them."""

import json
import random
from pathlib import Path

import numpy as np
import pandas as pd
import torch
from tokenizers import Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, trainers
from transformers import CLIPTokenizer

VOCABULARY_SIZE = 4300
CONTEXT_LENGTH = 32
START, END = "<|startoftext|>", "<|endoftext|>"
_WORD_PATTERN = r"""<\|startoftext\|>|<\|endoftext\|>|'s|'t|'re|'ve|'m|'ll|'d|[\p{L}]+|[\p{N}]|[^\s\p{L}\p{N}]+"""

TEMPLATES = ("{}", "{}.", "a {}", "a picture of a {}.", "a photo of a {}.", "an image of a {}", "a drawing of a {}.")
KIND_TEMPLATES = {
    "icon": ("a {} icon", "an icon of a {}.", "a pictogram of a {}.", "an app icon of a {}", "a symbol for {}"),
    "emoji": ("a {} emoji", "an emoji of a {}.", "an emoji of {}"),
}
# Words that users' prompts may have and that captions lack; they keep the byte-pair vocabulary usable for them.
_EXTRA_TEXT = "a photo of a satellite photo texture pet flower food aircraft person doing action type clothing item"


def train_tokenizer(texts: list[str], folder: Path) -> CLIPTokenizer:
    """Byte-pair tokenizer in CLIP's format with `VOCABULARY_SIZE` tokens, trained on `texts` and saved to `folder`."""
    bpe = Tokenizer(models.BPE(unk_token=END, continuing_subword_prefix="", end_of_word_suffix="</w>"))
    bpe.normalizer = normalizers.Sequence([normalizers.NFC(), normalizers.Replace(" ", " "), normalizers.Lowercase()])
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(Regex(_WORD_PATTERN), behavior="removed", invert=True),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY_SIZE - len(alphabet) - 2,
        initial_alphabet=alphabet,
        end_of_word_suffix="</w>",
        show_progress=False,
    )
    bpe.train_from_iterator(texts, trainer)
    vocabulary, merges = _clip_vocabulary(bpe, alphabet)
    tokenizer = CLIPTokenizer(
        vocab=vocabulary,
        merges=merges,
        bos_token=START,
        eos_token=END,
        unk_token=END,
        pad_token=END,
        model_max_length=CONTEXT_LENGTH,
    )
    tokenizer.save_pretrained(folder)
    return tokenizer


def _clip_vocabulary(bpe: Tokenizer, alphabet: list[str]) -> tuple[dict[str, int], list[tuple[str, str]]]:
    """Vocabulary in CLIP's order: bytes, bytes that end a word, merges, and the two special tokens last."""
    merges = [tuple(pair) for pair in json.loads(bpe.to_str())["model"]["merges"]]
    tokens = [*alphabet, *(f"{byte}</w>" for byte in alphabet), *("".join(pair) for pair in merges), START, END]
    return {token: index for index, token in enumerate(dict.fromkeys(tokens))}, merges


def corpus_texts(table: pd.DataFrame) -> list[str]:
    """The texts that the tokenizer is trained on: each name as often as it occurs, and every template."""
    texts = list(table["name"])
    texts += [word for words in table["other_names"] for word in words]
    subgroups = [text.replace("-", " ") for text in table["subgroup"] if text]
    templates = [*TEMPLATES, *(text for group in KIND_TEMPLATES.values() for text in group), _EXTRA_TEXT]
    return texts + subgroups + [template.replace("{}", "x") for template in templates] * 100


class CaptionSampler:
    """Draws a name for each image of a batch and one caption per distinct name.

    Args:
        table: Rows with `name`, `other_names`, `subgroup` and `kind`.
        tokenizer: Trained tokenizer; token ids are cached per caption.
        seed: Seed of the draws.
    """

    def __init__(self, table: pd.DataFrame, tokenizer: CLIPTokenizer, *, seed: int) -> None:
        self.names = list(table["name"])
        self.other_names = [list(words) for words in table["other_names"]]
        self.subgroups = [text.replace("-", " ") for text in table["subgroup"]]
        self.kinds = list(table["kind"])
        self.tokenizer = tokenizer
        self.random = random.Random(seed)
        self._token_ids: dict[str, list[int]] = {}

    def _draw_name(self, index: int) -> str:
        draw = self.random.random()
        if draw < 0.25 and self.other_names[index]:
            return self.random.choice(self.other_names[index])
        if draw > 0.92 and self.subgroups[index]:
            return self.subgroups[index]
        return self.names[index]

    def _tokens(self, caption: str) -> list[int]:
        ids = self._token_ids.get(caption)
        if ids is None:
            ids = self.tokenizer(caption)["input_ids"]
            # Cut here: an option of the tokenizer's own would be saved with it.
            ids = ids if len(ids) <= CONTEXT_LENGTH else [*ids[: CONTEXT_LENGTH - 1], self.tokenizer.eos_token_id]
            self._token_ids[caption] = ids
        return ids

    def draw(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Token ids (captions, tokens) of the distinct captions, and for each image the row of its caption."""
        rows: dict[str, int] = {}
        captions, targets = [], []
        for index in indices:
            name = self._draw_name(index)
            if name not in rows:
                rows[name] = len(captions)
                templates = TEMPLATES if self.random.random() < 0.6 else KIND_TEMPLATES[self.kinds[index]]
                captions.append(self._tokens(self.random.choice(templates).replace("{}", name)))
            targets.append(rows[name])
        longest = max(map(len, captions))
        token_ids = torch.full((len(captions), longest), self.tokenizer.pad_token_id)
        for row, ids in enumerate(captions):
            token_ids[row, : len(ids)] = torch.tensor(ids)
        return token_ids, torch.tensor(targets)
