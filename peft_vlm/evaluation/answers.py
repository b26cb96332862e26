"""Scores of written answers: normalised exact match, yes/no, counts. Shares are in percent."""

import re
import unicodedata
from collections.abc import Sequence
from dataclasses import dataclass

from peft_vlm.errors import check_list

ARTICLES = frozenset({"a", "an", "the"})
_WORDS = (
    "zero one two three four five six seven eight nine ten eleven twelve thirteen fourteen fifteen sixteen seventeen "
    "eighteen nineteen twenty"
)
NUMBERS = {word: str(number) for number, word in enumerate(_WORDS.split())}


def normalize_answer(text: str) -> str:
    """Normalise an answer: remove case, punctuation and articles, and write small numbers as digits.

    Points and signs inside numbers stay ("1.5"), commas between thousands go ("1,000" is "1000").

    Args:
        text: Answer of a model, or an expected one.
    """
    text = unicodedata.normalize("NFKC", text).casefold()
    text = re.sub(r"(?<=\d),(?=\d{3}\b)", "", text)
    text = re.sub("['`\u2019]", "", text)
    text = re.sub(r"(?<!\d)\.|\.(?!\d)|[^\w\s.-]|_|-(?!\d)|(?<=\w)-", " ", text)
    words = [NUMBERS.get(word, word) for word in text.split()]
    return " ".join([word for word in words if word not in ARTICLES] or words)


def exact_match(predictions: Sequence[str], answers: Sequence[str | Sequence[str]]) -> float:
    """Share of predictions that equal an accepted answer after `normalize_answer`, in percent.

    Args:
        predictions: Answers of a model.
        answers: Per prediction the expected answer, or several accepted ones.

    Raises:
        ValueError: If the numbers differ or there is none.
    """
    _check_lengths(predictions, answers)
    right = 0
    for prediction, accepted in zip(predictions, answers, strict=True):
        known = (accepted,) if isinstance(accepted, str) else accepted
        right += normalize_answer(prediction) in {normalize_answer(answer) for answer in known}
    return 100.0 * right / len(predictions)


def parse_yes_no(text: str) -> bool | None:
    """The first yes (True) or no (False) in a text; None without either.

    Args:
        text: Answer of a model.
    """
    for word in normalize_answer(text).split():
        if word in ("yes", "no"):
            return word == "yes"
    return None


@dataclass(frozen=True)
class YesNoScores:
    """Yes/no answers against the truth, in percent; an answer that is neither is wrong.

    Args:
        accuracy: Share of right answers.
        precision: Of the answers "yes", those that are right; 0 without any.
        recall: Of the questions to affirm, those affirmed; 0 without any.
        f1: Harmonic mean of both; 0 when either is 0.
        yes_share: Share of the answers "yes", which shows a model that always affirms.
        num_unclear: Answers that are neither.
    """

    accuracy: float
    precision: float
    recall: float
    f1: float
    yes_share: float
    num_unclear: int


def yes_no_scores(predictions: Sequence[str], answers: Sequence[str]) -> YesNoScores:
    """Accuracy and F1 of yes/no questions, as for the POPE benchmark with "yes" as the positive answer.

    Args:
        predictions: Answers of a model.
        answers: Expected, each "yes" or "no".

    Raises:
        ValueError: If the numbers differ, there is none, or an expected answer is neither yes nor no.
    """
    _check_lengths(predictions, answers)
    expected = [parse_yes_no(answer) for answer in answers]
    if None in expected:
        raise ValueError(f"Expected answers 'yes' or 'no', got {answers[expected.index(None)]!r}.")
    said = [parse_yes_no(prediction) for prediction in predictions]
    pairs = list(zip(said, expected, strict=True))
    hits = pairs.count((True, True))
    precision = hits / said.count(True) if hits else 0.0
    recall = hits / expected.count(True) if hits else 0.0
    return YesNoScores(
        accuracy=100.0 * sum(answer == truth for answer, truth in pairs) / len(pairs),
        precision=100.0 * precision,
        recall=100.0 * recall,
        f1=100.0 * 2 * precision * recall / (precision + recall) if hits else 0.0,
        yes_share=100.0 * said.count(True) / len(pairs),
        num_unclear=said.count(None),
    )


def parse_count(text: str) -> int | None:
    """The first integer in a text, in digits or as a word up to twenty; None when there is none.

    Args:
        text: Answer of a model.
    """
    for word in normalize_answer(text).split():
        if re.fullmatch(r"-?\d+", word):
            return int(word)
    return None


@dataclass(frozen=True)
class CountScores:
    """Counted numbers against the truth; an answer without a number is wrong.

    Args:
        accuracy: Share of right numbers, in percent.
        mean_absolute_error: Mean distance of the numbers given, over answers with a number; None without any.
        num_unclear: Answers without a number.
    """

    accuracy: float
    mean_absolute_error: float | None
    num_unclear: int


def count_scores(predictions: Sequence[str], answers: Sequence[str]) -> CountScores:
    """Accuracy and error of counting questions.

    Args:
        predictions: Answers of a model.
        answers: Expected, each with a number.

    Raises:
        ValueError: If the numbers of texts differ, there is none, or an expected answer has no number.
    """
    _check_lengths(predictions, answers)
    expected = [parse_count(answer) for answer in answers]
    if None in expected:
        raise ValueError(f"Expected answers with a number, got {answers[expected.index(None)]!r}.")
    said = [parse_count(prediction) for prediction in predictions]
    errors = [abs(a - b) for a, b in zip(said, expected, strict=True) if a is not None and b is not None]
    return CountScores(
        accuracy=100.0 * errors.count(0) / len(said),
        mean_absolute_error=sum(errors) / len(errors) if errors else None,
        num_unclear=said.count(None),
    )


def _check_lengths(predictions: Sequence[str], answers: Sequence[object]) -> None:
    check_list("predictions", predictions)
    check_list("answers", answers)
    if len(predictions) != len(answers) or not len(predictions):
        raise ValueError(
            f"Expected one answer per prediction, at least one, got {len(predictions)} predictions and "
            f"{len(answers)} answers."
        )
