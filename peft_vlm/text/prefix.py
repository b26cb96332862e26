"""Questions that a model has read, ready to be continued by several texts each: what it computed is kept and shared.

Caches of keys and values are grown in place by the models, so each continuation gets a copy of its own.
"""

import copy
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    PaliGemmaForConditionalGeneration,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from peft_vlm.errors import UnsupportedModelError
from peft_vlm.models.towers import unwrap

#: Models whose own forward pass always wants an image; what follows the question goes to their language model.
_QFORMER_MODELS = (Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration)
#: Models whose text positions behind an image are shifted by what they remember of it.
_SHIFTED_MODELS = (Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration)


def read_questions(model: nn.Module, inputs: Mapping[str, Tensor]) -> "DecoderQuestions | EncoderQuestions":
    """Run image and question through a model.

    Args:
        model: Image-text model in evaluation mode, with or without adapters.
        inputs: Model inputs, padded on the right.
    """
    base: Any = unwrap(model)
    if isinstance(base, _QFORMER_MODELS) and base.language_model.config.is_encoder_decoder:
        return EncoderQuestions(model, inputs)
    return DecoderQuestions(model, inputs)


class DecoderQuestions:
    """Questions in the cache of a language model without encoder.

    Args:
        model: Image-text model.
        inputs: Model inputs, padded on the right.

    Raises:
        UnsupportedModelError: If the model keeps no cache.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        base: Any = unwrap(model)
        self.mask = inputs["attention_mask"]
        self.lengths = self.mask.sum(dim=1)
        shortest = int(self.lengths.min())
        width = self.mask.shape[1]
        columns = dict(inputs)
        if isinstance(base, PaliGemmaForConditionalGeneration):
            # Type 0 is its prefix, all of which sees all of it; without types the mask depends on the padding.
            columns.setdefault("token_type_ids", torch.zeros_like(self.mask))
        output = model(**columns, use_cache=True, logits_to_keep=width - shortest + 1)
        if isinstance(base, _QFORMER_MODELS):
            output, self.reader = output.language_model_outputs, base.language_model
        else:
            self.reader = model
        self.cache = output.past_key_values
        if self.cache is None:
            raise UnsupportedModelError(
                f"`{type(base).__name__}` gave no cache of keys and values with `use_cache=True`, which scoring "
                "needs. Switch gradient checkpointing off while scoring, and use a decoder model of transformers."
            )
        windows = [layer.sliding_window for layer in self.cache.layers if layer.is_sliding]
        #: Longest sequence that padding inside may have: in a window that moves it would take the place of tokens.
        self.longest_padded = min(windows) if windows and shortest < width else None
        self.next_logits: Float[Tensor, "batch vocabulary"] = output.logits[
            torch.arange(len(self.mask), device=self.mask.device), self.lengths - shortest
        ]
        self.offset = _position_offset(base, self.lengths)
        self.axes = 3 if isinstance(base, _SHIFTED_MODELS) else 1

    @property
    def bytes_per_answer(self) -> int:
        """Memory of what is kept of one question, which every continuation copies."""
        kept = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in kept) // len(self.mask)

    def continue_with(self, tokens: Int[Tensor, "classes tokens"]) -> Float[Tensor, "batch classes tokens vocabulary"]:
        """Logits behind each token of each text, each text behind each question.

        Args:
            tokens: Token ids of the texts.

        Raises:
            UnsupportedModelError: If the model attends to a window of tokens, and padded questions do not fit into it.
        """
        number, length = tokens.shape
        batch, width = self.mask.shape
        if self.longest_padded is not None and width + length >= self.longest_padded:
            raise UnsupportedModelError(
                f"Expected questions of one length, or fewer than {self.longest_padded} tokens with the answer, got "
                f"up to {width + length}: layers of this model see a window of that size, which padding would shift."
            )
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_repeat_interleave(number)  # new tensors in the copied layers
        positions = self.offset.repeat_interleave(number)[:, None] + torch.arange(length, device=tokens.device)
        if self.axes > 1:
            positions = positions.expand(self.axes, -1, -1)
        mask = self.mask.repeat_interleave(number, dim=0)
        output = self.reader(
            input_ids=tokens.repeat(batch, 1),
            attention_mask=torch.cat([mask, mask.new_ones(batch * number, length)], dim=1),
            position_ids=positions,
            past_key_values=cache,
            use_cache=True,
        )
        return output.logits.unflatten(0, (batch, number))


class EncoderQuestions:
    """Questions in the encoder of a BLIP-2 or InstructBLIP with an encoder-decoder language model.

    Args:
        model: Image-text model.
        inputs: Model inputs, padded on the right.
    """

    def __init__(self, model: nn.Module, inputs: Mapping[str, Tensor]) -> None:
        base: Any = unwrap(model)
        self.reader = base.language_model
        self.mask = inputs["attention_mask"]
        self.start = self.reader.config.decoder_start_token_id
        start = self.mask.new_full((len(self.mask), 1), self.start)
        output = model(**inputs, decoder_input_ids=start, use_cache=False).language_model_outputs
        self.encoded = output.encoder_last_hidden_state
        self.next_logits: Float[Tensor, "batch vocabulary"] = output.logits[:, 0]

    @property
    def bytes_per_answer(self) -> int:
        """Memory of the encoded question, which every continuation copies."""
        return self.encoded[0].numel() * self.encoded.element_size()

    def continue_with(self, tokens: Int[Tensor, "classes tokens"]) -> Float[Tensor, "batch classes tokens vocabulary"]:
        """Logits behind each token of each text, each text behind each question.

        Args:
            tokens: Token ids of the texts.
        """
        number, batch = len(tokens), len(self.mask)
        started = torch.cat([tokens.new_full((number, 1), self.start), tokens], dim=1)
        output = self.reader(
            encoder_outputs=BaseModelOutput(last_hidden_state=self.encoded.repeat_interleave(number, dim=0)),
            attention_mask=self.mask.repeat_interleave(number, dim=0),
            decoder_input_ids=started.repeat(batch, 1),
            use_cache=False,
        )
        return output.logits[:, 1:].unflatten(0, (batch, number))


def _position_offset(base: Any, lengths: Int[Tensor, " batch"]) -> Int[Tensor, " batch"]:
    """Position of the first token behind each question, as the model counts positions."""
    if isinstance(base, _SHIFTED_MODELS):
        return lengths + base.model.rope_deltas.view(-1)
    return lengths + 1 if isinstance(base, PaliGemmaForConditionalGeneration) else lengths
