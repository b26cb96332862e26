"""How likely a model finds each of several answers: the question is read once, the answers go behind it together.

The score of an answer is the mean log-probability of its tokens, as in the official TVP code.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import PreTrainedTokenizerBase

from peft_vlm.errors import ClassNameError, DataError
from peft_vlm.sequences import answer_token_ids, check_right_padding, resolve_end_token
from peft_vlm.text.class_features import evaluation_mode
from peft_vlm.text.prefix import DecoderQuestions, EncoderQuestions, read_questions

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
        include_end: Count the end token too, so that an answer that goes on is told from one that ends.
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
) -> Float[Tensor, "batch classes"]:
    """Mean log-probability of the tokens of each candidate behind each question; natural logarithm, at most 0.

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
        question = read_questions(model, inputs)
        if chunk_size is None:
            longest = max(map(len, candidates.token_ids))
            vocabulary = question.next_logits.shape[1]
            chunk_size = MEMORY // (question.bytes_per_answer + longest * vocabulary * LOGIT_BYTES)
        return _scores(question, candidates.token_ids, per_pass=max(1, chunk_size // len(question.next_logits)))


def _scores(
    question: DecoderQuestions | EncoderQuestions, rows: Sequence[Sequence[int]], *, per_pass: int
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
            scores = scores + _log_probabilities(logits, tokens[:, 1:], lengths - 1)
        columns |= dict(zip(chunk, (scores / lengths).unbind(dim=1), strict=True))
    return torch.stack([columns[position] for position in range(len(order))], dim=1)


def _padded(rows: Sequence[Sequence[int]], device: torch.device) -> tuple[Tensor, Tensor]:
    lengths = [len(row) for row in rows]
    # The filling is never read: positions behind a row's length do not count, and earlier ones do not see them.
    padded = [[*row, *[row[-1]] * (max(lengths) - len(row))] for row in rows]
    return torch.tensor(padded, device=device), torch.tensor(lengths, device=device)


def _log_probabilities(
    logits: Float[Tensor, "batch classes tokens vocabulary"],
    tokens: Int[Tensor, "classes tokens"],
    lengths: Int[Tensor, " classes"],
) -> Float[Tensor, "batch classes"]:
    """Summed log-probabilities of the first `lengths` tokens of each candidate."""
    targets = tokens.expand(len(logits), -1, -1).unsqueeze(-1)
    values = logits.gather(-1, targets).squeeze(-1).float() - logits.float().logsumexp(dim=-1)
    counted = torch.arange(tokens.shape[1], device=tokens.device) < lengths.unsqueeze(1)
    return values.masked_fill(~counted, 0.0).sum(dim=-1)
