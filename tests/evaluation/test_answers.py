"""Answers in words: every figure by hand."""

import pytest

from peft_vlm.evaluation import (
    count_scores,
    exact_match,
    normalize_answer,
    parse_count,
    parse_yes_no,
    yes_no_scores,
)


@pytest.mark.parametrize(
    ("text", "expected"),
    [
        (" A Golden  Retriever. ", "golden retriever"),
        ("the cat's hat", "cats hat"),
        ("Three dogs!", "3 dogs"),
        ("1,000 and 1.5, minus -2", "1000 and 1.5 minus -2"),
        ("sea-lion", "sea lion"),
        ("snake_case", "snake case"),
        ("a", "a"),
        ("\uff32ed", "red"),
        ("", ""),
    ],
)
def test_answers_are_reduced_to_what_they_mean(text: str, expected: str) -> None:
    """Case, articles, punctuation and number words do not make an answer wrong; numbers keep their value."""
    assert normalize_answer(text) == expected


def test_exact_match_by_hand() -> None:
    """Two of four, one of them through the second accepted answer."""
    predictions = ["A cat.", "two", "dog house", "an"]
    assert exact_match(predictions, ["cat", ["2 pieces", "2"], "dog", "the"]) == 50.0
    with pytest.raises(ValueError, match="got 1 predictions and 2 answers"):
        exact_match(["a"], ["a", "b"])
    with pytest.raises(ValueError, match="at least one"):
        exact_match([], [])


def test_the_first_yes_or_no_counts() -> None:
    """A model that answers in a sentence is understood; one that does neither is not guessed at."""
    assert parse_yes_no("Yes, there is no doubt") is True
    assert parse_yes_no("No.") is False
    assert parse_yes_no("I know nothing") is None


def test_yes_no_scores_by_hand() -> None:
    """3 hits, 1 false alarm, 1 miss, 2 right denials, 1 unclear on a negative."""
    predictions = ["yes", "Yes.", "yes it is", "yes", "no", "no", "No", "maybe"]
    answers = ["yes", "yes", "yes", "no", "yes", "no", "no", "no"]
    scores = yes_no_scores(predictions, answers)
    assert scores.accuracy == pytest.approx(100 * 5 / 8)
    assert scores.precision == pytest.approx(75.0)
    assert scores.recall == pytest.approx(75.0)
    assert scores.f1 == pytest.approx(75.0)
    assert scores.yes_share == pytest.approx(50.0)
    assert scores.num_unclear == 1


def test_scores_without_any_yes_are_zero() -> None:
    """Not a division by zero."""
    scores = yes_no_scores(["no", "no"], ["yes", "no"])
    assert (scores.accuracy, scores.precision, scores.recall, scores.f1) == (50.0, 0.0, 0.0, 0.0)
    with pytest.raises(ValueError, match="'yes' or 'no', got 'blue'"):
        yes_no_scores(["yes"], ["blue"])


def test_counts_by_hand() -> None:
    """Digits and words; an answer without a number is wrong but has no distance."""
    assert parse_count("There are seven, maybe 8") == 7
    assert parse_count("about 1,200") == 1200
    assert parse_count("1.5") is None
    scores = count_scores(["3", "four", "none", "10"], ["3", "5", "2", "7"])
    assert scores.accuracy == 25.0
    assert scores.mean_absolute_error == pytest.approx((0 + 1 + 3) / 3)
    assert scores.num_unclear == 1
    assert count_scores(["many"], ["2"]).mean_absolute_error is None
    with pytest.raises(ValueError, match="with a number, got 'many'"):
        count_scores(["2"], ["many"])
