"""Token sequences of questions and answers: the ids of an answer, the same in training and scoring, and padding."""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    Blip2ForConditionalGeneration,
    InstructBlipForConditionalGeneration,
    PaliGemmaForConditionalGeneration,
    PreTrainedTokenizerBase,
    Qwen2_5_VLForConditionalGeneration,
    Qwen2VLForConditionalGeneration,
)
from transformers.modeling_outputs import BaseModelOutput

from peft_vlm.distributed import divided, from_all
from peft_vlm.errors import ClassNameError, DataError, UnsupportedModelError, check_list
from peft_vlm.models.sharding import has_sharded_layers
from peft_vlm.models.towers import CACHE_NAME, unwrap
from peft_vlm.text.class_features import evaluation_mode


def resolve_end_token(tokenizer: PreTrainedTokenizerBase, end_token: str | None) -> str:
    """The text that ends an answer.

    Args:
        tokenizer: Tokenizer of the language model.
        end_token: Any text, also an empty one; None: the tokenizer's end token.

    Raises:
        DataError: If None is given and the tokenizer has no end token.
    """
    if end_token is not None:
        return end_token
    if tokenizer.eos_token is None:
        raise DataError(
            f"`{type(tokenizer).__name__}` has no end token (`eos_token`). Say what ends an answer, for example with "
            "`end_token='\\n'`."
        )
    return str(tokenizer.eos_token)


def answer_token_ids(
    tokenizer: PreTrainedTokenizerBase, answers: Sequence[str], *, answer_format: str = "{}", end_token: str = ""
) -> list[list[int]]:
    """Token ids of answers, without the special tokens a tokenizer puts around a text.

    An end that is a text (as the newline of the official TVP code) is tokenised together with the answer; the
    tokenizer's own end token is appended as one id.

    Args:
        tokenizer: Tokenizer of the language model.
        answers: Texts, not empty.
        answer_format: Text around an answer with one `{}`; `" {}"` for byte-level tokenizers when the question ends
            without a space.
        end_token: What follows each answer; an empty text for nothing.

    Raises:
        DataError: If the format has no `{}`, or an answer is empty or has no tokens.
    """
    check_list("answers", answers)
    if answer_format.count("{}") != 1:
        raise DataError(f"Expected `answer_format` with one '{{}}' for the answer, got {answer_format!r}.")
    appended: list[int] = []
    if end_token and end_token == tokenizer.eos_token:
        assert isinstance(tokenizer.eos_token_id, int)
        appended, end_token = [tokenizer.eos_token_id], ""
    rows = []
    for position, answer in enumerate(answers):
        if not answer.strip():
            raise DataError(f"Answer {position} is empty: got {answer!r}. Give every answer a text.")
        ids = tokenizer(answer_format.replace("{}", answer) + end_token, add_special_tokens=False)["input_ids"]
        if not ids:
            raise DataError(f"Answer {position}, {answer!r}, has no tokens in this tokenizer's vocabulary.")
        rows.append([*ids, *appended])
    return rows


def check_right_padding(attention_mask: Int[Tensor, "batch tokens"]) -> None:
    """Refuse sequences with padding before or between their tokens.

    Args:
        attention_mask: 1 for tokens, 0 for padding.

    Raises:
        DataError: If there is such padding.
    """
    if bool((attention_mask[:, 0] == 0).any()) or bool((attention_mask[:, 1:] > attention_mask[:, :-1]).any()):
        raise DataError(
            "Expected sequences padded on the right, got padding before a token. Call the processor with "
            "`padding_side='right'`."
        )


def last_positions(attention_mask: Int[Tensor, "batch tokens"]) -> Int[Tensor, " batch"]:
    """Position of the last token of each sequence, whatever the padding.

    Args:
        attention_mask: 1 for tokens, 0 for padding.
    """
    return attention_mask.shape[1] - 1 - attention_mask.flip(1).argmax(dim=1)


#: Models whose own forward pass always wants an image; what follows the question goes to their language model.
_QFORMER_MODELS = (Blip2ForConditionalGeneration, InstructBlipForConditionalGeneration)
#: Models whose text positions after an image are shifted by what they remember of it.
_SHIFTED_MODELS = (Qwen2VLForConditionalGeneration, Qwen2_5_VLForConditionalGeneration)


def _read_questions(model: nn.Module, inputs: Mapping[str, Tensor]) -> "_DecoderQuestions | _EncoderQuestions":
    """Run image and question through a model.

    Args:
        model: Image-text model in evaluation mode, with or without adapters.
        inputs: Model inputs, padded on the right.
    """
    base: Any = unwrap(model)
    if isinstance(base, _QFORMER_MODELS) and base.language_model.config.is_encoder_decoder:
        return _EncoderQuestions(model, inputs)
    return _DecoderQuestions(model, inputs)


class _DecoderQuestions:
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
        self.cache = getattr(output, CACHE_NAME)
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
        """Memory of what stays of one question, which every continuation copies."""
        stored = [tensor for layer in self.cache.layers for tensor in (layer.keys, layer.values)]
        return sum(tensor.numel() * tensor.element_size() for tensor in stored) // len(self.mask)

    def continue_with(self, tokens: Int[Tensor, "classes tokens"]) -> Float[Tensor, "batch classes tokens vocabulary"]:
        """Logits after each token of each text, each text after each question.

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
        # Answers of a question share its keys and values: the cache is repeated, never computed again.
        cache = copy.copy(self.cache)
        cache.layers = [copy.copy(layer) for layer in cache.layers]
        cache.batch_repeat_interleave(number)  # new tensors in the copied layers
        positions = self.offset.repeat_interleave(number)[:, None] + torch.arange(length, device=tokens.device)
        if self.axes > 1:  # (3, rows, tokens): text has the same position on all axes
            positions = positions.expand(self.axes, -1, -1)
        mask = self.mask.repeat_interleave(number, dim=0)
        output = self.reader(
            input_ids=tokens.repeat(batch, 1),
            attention_mask=torch.cat([mask, mask.new_ones(batch * number, length)], dim=1),
            position_ids=positions,
            use_cache=True,
            **{CACHE_NAME: cache},
        )
        return output.logits.unflatten(0, (batch, number))


class _EncoderQuestions:
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
        """Logits after each token of each text, each text after each question.

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
    """Position of the first token after each question, as the model counts positions."""
    if isinstance(base, _SHIFTED_MODELS):
        return lengths + base.model.rope_deltas.view(-1)
    return lengths + 1 if isinstance(base, PaliGemmaForConditionalGeneration) else lengths


#: Bytes that the answers of one forward pass may take when nothing else is asked for.
MEMORY = 2**30
#: Bytes per logit: as the model gives it, and in float32 with its logarithm.
LOGIT_BYTES = 12


@dataclass(frozen=True)
class Candidates:
    """Answers to choose from, as tokens.

    Args:
        names: Answers; column `c` of the scores belongs to answer `c`.
        token_ids: Tokens of each answer, with those of the end when `include_end`.
        include_end: Whether the end token counts.
    """

    names: tuple[str, ...]
    token_ids: tuple[tuple[int, ...], ...]
    include_end: bool


def tokenize_candidates(
    tokenizer: PreTrainedTokenizerBase,
    names: Sequence[str],
    *,
    answer_format: str = "{}",
    include_end: bool = False,
    end_token: str | None = None,
) -> Candidates:
    """Tokenise answers as `QuestionCollator` does with the same settings.

    Args:
        tokenizer: Tokenizer of the language model.
        names: Answers, such as class names.
        answer_format: Text around an answer with one `{}`.
        include_end: Count the end token too, so that an answer that continues is told from one that ends.
        end_token: What ends an answer; None: the tokenizer's end token. Used when `include_end`.

    Raises:
        ClassNameError: If there is no answer, one is empty, two have the same tokens, or one is the beginning of
            another while the end does not count.
    """
    if isinstance(names, str) or not len(names):
        raise ClassNameError(f"Expected a list of at least one candidate answer, got {names!r}.")
    end = resolve_end_token(tokenizer, end_token) if include_end else ""
    try:
        ids = answer_token_ids(tokenizer, names, answer_format=answer_format, end_token=end)
    except DataError as error:
        raise ClassNameError(f"Candidate answers cannot be scored. {error}") from error
    rows = tuple(tuple(row) for row in ids)
    _check_distinct(tuple(names), rows, include_end)
    return Candidates(tuple(names), rows, include_end)


def _check_distinct(names: tuple[str, ...], rows: tuple[tuple[int, ...], ...], include_end: bool) -> None:
    first = {}
    for name, row in zip(names, rows, strict=True):
        if row in first:
            raise ClassNameError(
                f"The candidates {first[row]!r} and {name!r} have the same tokens, so that no score can tell them "
                "apart. Rename or remove one."
            )
        first[row] = name
    for name, row in zip(names, rows, strict=True):
        for length in range(1, len(row)):
            if not include_end and row[:length] in first:
                raise ClassNameError(
                    f"The candidate {first[row[:length]]!r} is the beginning of {name!r}, and nothing says where an "
                    "answer ends. Pass `include_end=True`, or rename one."
                )


@torch.no_grad()
def candidate_scores(
    model: nn.Module,
    inputs: Mapping[str, Tensor],
    candidates: Candidates | Sequence[str],
    tokenizer: PreTrainedTokenizerBase | None = None,
    *,
    include_end: bool = False,
    answer_format: str = "{}",
    end_token: str | None = None,
    chunk_size: int | None = None,
    divide: bool = False,
) -> Float[Tensor, "batch classes"]:
    """Mean log-probability of the tokens of each candidate after each question; natural logarithm, at most 0.

    Image and question run through the model once; what its attention layers keep of them is shared by all candidates,
    of which only the own tokens are computed. The result is that of one plain forward pass per candidate, up to
    rounding. Runs in evaluation mode without autograd and computes in float32.

    Args:
        model: Image-text model, with or without adapters: a language model with a cache of keys and values, or BLIP-2
            and InstructBLIP with an encoder-decoder one.
        inputs: Model inputs up to the answer, padded on the right (`question_inputs` of a batch).
        candidates: What `tokenize_candidates` gave, or answers, which are tokenised on every call.
        tokenizer: Tokenizer of the language model; needed for answers as texts.
        include_end: See `tokenize_candidates`, as for the two below.
        answer_format: Text around an answer.
        end_token: What ends an answer.
        chunk_size: Answers (questions times candidates) in one forward pass, each with its own copy of what the model
            keeps of the question; None: as many as fit into about 1 GB, at least one candidate for all questions.
        divide: Divide the candidates among the processes of the training, which must all call this with the same
            questions; all get all scores, those of one process up to rounding.

    Raises:
        DataError: If the inputs hold answers, are padded elsewhere, or no tokenizer was given for texts.
    """
    if "token_labels" in inputs or "labels" in inputs:
        raise DataError(
            "Expected inputs that end with the question, got a batch with answers. Pass `question_inputs(batch)`."
        )
    if not isinstance(candidates, Candidates):
        if tokenizer is None:
            raise DataError("Expected a tokenizer for candidates given as texts, got none.")
        candidates = tokenize_candidates(
            tokenizer, candidates, answer_format=answer_format, include_end=include_end, end_token=end_token
        )
    check_right_padding(inputs["attention_mask"])
    with evaluation_mode(model):
        question = _read_questions(model, inputs)
        if chunk_size is None:
            longest = max(map(len, candidates.token_ids))
            vocabulary = question.next_logits.shape[1]
            chunk_size = MEMORY // (question.bytes_per_answer + longest * vocabulary * LOGIT_BYTES)
        rows, per_pass = candidates.token_ids, max(1, chunk_size // len(question.next_logits))
        if has_sharded_layers(model):
            if divide:
                raise DataError(
                    "Expected `divide=False` for a model whose layers are divided among the processes, got "
                    "True: each must call a layer as often as the others, and parts may need more or fewer calls."
                )
            per_pass = min(from_all(per_pass))  # equally many passes everywhere, whatever the questions' lengths
        if not divide:
            return _scores(question, rows, per_pass=per_pass)

        def scores_of(part: Int[Tensor, " part"]) -> Float[Tensor, "part batch"]:
            return _scores(question, [rows[position] for position in part.tolist()], per_pass=per_pass).mT

        # A process's whole part at once, so that answers of one length still share a pass.
        return divided(len(rows), scores_of, chunk_size=len(rows)).mT


def _scores(
    question: _DecoderQuestions | _EncoderQuestions, rows: Sequence[Sequence[int]], *, per_pass: int
) -> Float[Tensor, "batch classes"]:
    first = question.next_logits.float().log_softmax(dim=-1)
    # Answers of similar length share a pass, so that little padding is computed.
    order = sorted(range(len(rows)), key=lambda position: len(rows[position]))
    columns: dict[int, Tensor] = {}
    for start in range(0, len(order), per_pass):
        chunk = order[start : start + per_pass]
        tokens, lengths = _padded([rows[position] for position in chunk], first.device)
        scores = first[:, tokens[:, 0]]
        if tokens.shape[1] > 1:
            logits = question.continue_with(tokens[:, :-1])
            # A score of the first token comes from the question alone, those of the others from the answer.
            scores = scores + _log_probabilities(logits, tokens[:, 1:], lengths - 1)
        columns |= dict(zip(chunk, (scores / lengths).unbind(dim=1), strict=True))
    return torch.stack([columns[position] for position in range(len(order))], dim=1)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = [len(row) for row in rows]
    # The filling is never read: positions after a row's length do not count, and earlier ones do not see them.
    padded = [[*row, *[row[-1]] * (max(lengths) - len(row))] for row in rows]
    return torch.tensor(padded, device=device), torch.tensor(lengths, device=device)


def _log_probabilities(
    logits: Float[Tensor, "batch classes tokens vocabulary"],
    tokens: Int[Tensor, "classes tokens"],
    lengths: Int[Tensor, " classes"],
) -> Float[Tensor, "batch classes"]:
    """Summed log-probabilities of the first `lengths` tokens of each candidate."""
    targets = tokens.expand(len(logits), -1, -1).unsqueeze(-1)  # (batch, classes, tokens, 1)
    values = logits.gather(-1, targets).squeeze(-1).float() - logits.float().logsumexp(dim=-1)
    counted = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
    return values.masked_fill(~counted, 0.0).sum(dim=-1)
