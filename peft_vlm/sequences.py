"""Token sequences of questions and answers: the ids of an answer, the same in training and scoring, and padding."""

from collections.abc import Sequence

from jaxtyping import Int
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peft_vlm.errors import DataError


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
