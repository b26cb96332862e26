"""Accuracy of image-text models, and the effect of a pixel prompt on it.

A prompt is always compared with two baselines: the base model on images at full size, and the same model on images
that are shrunk as the adapter shrinks them, without the prompt. The first shows whether the adapter helps,
the second how much of that is the prompt.

Written answers are scored by normalised exact match, as yes/no, or as counts; all in percent.
"""

import random
import re
import unicodedata
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import DataLoader

from peft_vlm.adapters.pixel_prompt import active_name, prompt_layer_of, without_prompt
from peft_vlm.data.corruptions import CORRUPTIONS, LEVELS, Corruption
from peft_vlm.data.question_collator import QuestionCollator, check_shrinking, question_inputs
from peft_vlm.data.questions import Collator, ImageQuestionDataset
from peft_vlm.data.transforms import RandomCrop
from peft_vlm.distributed import progress_bar
from peft_vlm.errors import ClassNameError, DataError, check_list
from peft_vlm.evaluation.classify import EvalResult
from peft_vlm.models.towers import device_of, unwrap
from peft_vlm.text.answers import Candidates, candidate_scores
from peft_vlm.text.class_features import evaluation_mode

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


#: Model and questions -> a figure in percent, the higher the better.
Score = Callable[[nn.Module, ImageQuestionDataset], float]


@torch.no_grad()
def classify_answers(
    model: nn.Module,
    dataset: ImageQuestionDataset,
    *,
    candidates: Candidates | None = None,
    include_end: bool = False,
    batch_size: int = 32,
    chunk_size: int | None = None,
    num_workers: int = 0,
    progress: bool = False,
) -> EvalResult:
    """The most likely answer out of the class names for each question.

    Args:
        model: Image-text model, with or without adapters.
        dataset: Questions with labels, class names and a collator of this model.
        candidates: Tokenised class names; None: tokenised as the dataset's collator tokenises answers.
        include_end: Count the end token; used when `candidates` is None.
        batch_size: Questions per batch.
        chunk_size: Answers per forward pass; None: as many as fit into about 1 GB.
        num_workers: Processes that read images.
        progress: Show a progress bar.

    Returns:
        Labels, predictions, and as confidence the softmax over the scores of all candidates.

    Raises:
        DataError: If questions have no label.
        ClassNameError: If the candidates are not the dataset's class names.
    """
    collator = _collator_of(dataset)
    if not dataset.labels or min(dataset.labels) < 0:
        raise DataError("Expected questions with labels, got some without. Pass `class_names` and labels or answers.")
    if candidates is None:
        candidates = collator.candidates(dataset.class_names, include_end=include_end)
    if candidates.names != dataset.class_names:
        raise ClassNameError(
            f"Expected candidates for the dataset's {len(dataset.class_names)} class names, beginning "
            f"{list(dataset.class_names[:3])!r}, got {len(candidates.names)}, beginning "
            f"{list(candidates.names[:3])!r}. Tokenise `dataset.class_names`."
        )
    device = device_of(model)
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=collator)
    labels, predicted, confidence = [], [], []
    for batch in progress_bar(loader, desc="score answers", unit="batch", leave=False, disable=not progress):
        inputs = {name: column.to(device) for name, column in question_inputs(batch).items()}
        best = candidate_scores(model, inputs, candidates, chunk_size=chunk_size).softmax(dim=-1).max(dim=-1)
        labels.append(batch["labels"])
        predicted.append(best.indices.cpu())
        confidence.append(best.values.cpu())
    return EvalResult(dataset.class_names, torch.cat(labels), torch.cat(predicted), torch.cat(confidence))


def likelihood_accuracy(model: nn.Module, dataset: ImageQuestionDataset, **options: Any) -> float:
    """Accuracy of `classify_answers` in percent.

    Args:
        model: Image-text model, with or without adapters.
        dataset: Questions with labels and class names.
        **options: Passed on.
    """
    return classify_answers(model, dataset, **options).accuracy


def generation_accuracy(model: nn.Module, dataset: ImageQuestionDataset, **options: Any) -> float:
    """Share of generated answers that match the expected ones after normalisation, in percent.

    Args:
        model: Image-text model, with or without adapters.
        dataset: Questions with answers.
        **options: Passed to `generate_answers`.

    Raises:
        DataError: If a question has no answer.
    """
    answers = [dataset.answer(index) for index in range(len(dataset))]
    known = [answer for answer in answers if answer is not None]
    if len(known) < len(answers):
        raise DataError(f"Expected questions with answers, got none for question {answers.index(None)}.")
    return exact_match(generate_answers(model, dataset, **options), known)


@dataclass(frozen=True)
class PromptEffect:
    """A score of one model under three conditions, in percent.

    Args:
        full_size: Base model, images at full size.
        shrunken: Images shrunk as the adapter does it, without prompt.
        prompted: With the prompt.
    """

    full_size: float
    shrunken: float
    prompted: float

    @property
    def gain(self) -> float:
        """Gain of the prompt over the same shrunken images."""
        return self.prompted - self.shrunken

    @property
    def gain_over_full_size(self) -> float:
        """Gain of the adapter, shrinking included, over the base model."""
        return self.prompted - self.full_size


def evaluate_prompt(
    model: PeftModel,
    dataset: ImageQuestionDataset,
    *,
    score: Score = likelihood_accuracy,
    shrinking_collator: Collator | None = None,
) -> PromptEffect:
    """One model under the three conditions.

    Args:
        model: `PeftModel` with an active pixel prompt.
        dataset: Questions with a collator of this model at full size.
        score: Function that measures a score.
        shrinking_collator: For adapters with `shrink="processor"`: the collator around a `ShrinkingProcessor`, used
            for the two conditions with the adapter. None: the model shrinks.

    Raises:
        DataError: If a collator shrinks images where it must not, or does not where it must.
    """
    shrunken = dataset if shrinking_collator is None else dataset.with_collator(shrinking_collator)
    layer = prompt_layer_of(model)
    settings = layer.settings[active_name(layer)]
    check_shrinking(shrunken.collator, settings)
    check_shrinking(dataset.collator, replace(settings, shrink="model"))  # the base model sees full images
    with model.disable_adapter():
        full_size = score(model, dataset)
    with without_prompt(model):
        without = score(model, shrunken)
    return PromptEffect(full_size, without, score(model, shrunken))


def corruption_robustness(
    model: PeftModel,
    dataset: ImageQuestionDataset,
    *,
    kinds: Sequence[str] = tuple(CORRUPTIONS),
    levels: Sequence[int] = LEVELS,
    **options: Any,
) -> dict[str, dict[int, PromptEffect]]:
    """The three conditions on corrupted images, the same ones for all models.

    Args:
        model: `PeftModel` with an active pixel prompt.
        dataset: Questions with a collator of this model; its augmentation is replaced by the damage.
        kinds: Keys of `CORRUPTIONS`.
        levels: From 1 to 5.
        **options: Passed to `evaluate_prompt`.

    Returns:
        `{kind: {level: effect}}`.
    """
    check_list("kinds", kinds)
    damaged = {kind: {level: dataset.with_augmentation(Corruption(kind, level)) for level in levels} for kind in kinds}
    return {
        kind: {level: evaluate_prompt(model, questions, **options) for level, questions in by_level.items()}
        for kind, by_level in damaged.items()
    }


def mean_effect(effects: Sequence[PromptEffect]) -> PromptEffect:
    """Mean of each condition, for example over kinds of corruption or over seeds.

    Args:
        effects: At least one.

    Raises:
        DataError: If there is none.
    """
    if not effects:
        raise DataError("Expected at least one effect to average, got none.")
    columns = zip(*((e.full_size, e.shrunken, e.prompted) for e in effects), strict=True)
    return PromptEffect(*(sum(column) / len(column) for column in columns))


def data_scale_curve(
    train: Callable[[ImageQuestionDataset], Mapping[str, PromptEffect]],
    dataset: ImageQuestionDataset,
    sizes: Sequence[int],
    *,
    seed: int = 0,
) -> dict[int, dict[str, PromptEffect]]:
    """The effect by number of training questions. Smaller sets are part of larger ones.

    Args:
        train: Trains a prompt on questions and evaluates it, per model.
        dataset: Training questions.
        sizes: Numbers of questions, each up to that of the dataset.
        seed: Of the choice.

    Returns:
        `{size: {model: effect}}`.

    Raises:
        DataError: If a size is out of range.
    """
    wrong = [size for size in sizes if not 0 < size <= len(dataset)]
    if wrong:
        raise DataError(f"Expected sizes from 1 to {len(dataset)}, the questions there are, got {wrong!r}.")
    order = random.Random(seed).sample(range(len(dataset)), len(dataset))
    return {size: dict(train(dataset.select(sorted(order[:size])))) for size in sizes}


def _collator_of(dataset: ImageQuestionDataset) -> QuestionCollator:
    """The dataset's collator, for a dataset that fits an evaluation.

    Args:
        dataset: Questions with a `QuestionCollator`, and images that are not cropped at random.

    Raises:
        DataError: If there is none, or its images are cropped at random.
    """
    if isinstance(dataset.augmentation, RandomCrop):
        raise DataError(
            "Expected images without random crops, got an augmentation. Use `dataset.with_augmentation(None)`."
        )
    if not isinstance(dataset.collator, QuestionCollator):
        raise DataError(
            f"Expected a dataset with a `QuestionCollator`, got {type(dataset.collator).__name__}. Set "
            "`dataset.collator = QuestionCollator(processor)`."
        )
    return dataset.collator


@torch.no_grad()
def generate_answers(
    model: nn.Module,
    dataset: ImageQuestionDataset,
    *,
    max_new_tokens: int = 16,
    batch_size: int = 16,
    num_workers: int = 0,
    progress: bool = False,
) -> list[str]:
    """Generate an answer to each question, in dataset order: the most likely token at each step, up to the end.

    Questions of a batch are padded on the left, so that every answer begins right after its question.

    Args:
        model: Image-text model with `generate`, with or without adapters.
        dataset: Questions with a collator of this model.
        max_new_tokens: Longest answer.
        batch_size: Questions per batch.
        num_workers: Processes that read images.
        progress: Show a progress bar.

    Returns:
        Texts without the question, the end token and spaces around.
    """
    collator = _collator_of(dataset)
    tokenizer = collator.tokenizer
    stops = _stops(model, collator)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    options |= {"eos_token_id": stops or None, "pad_token_id": tokenizer.pad_token_id}
    device = device_of(model)
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=_LeftPadded(collator))
    texts: list[str] = []
    with evaluation_mode(model):
        for inputs in progress_bar(loader, desc="answer", unit="batch", leave=False, disable=not progress):
            inputs = {name: column.to(device) for name, column in inputs.items()}
            written = _new_tokens(model.generate(**inputs, **options), inputs["input_ids"])
            texts += tokenizer.batch_decode(written, skip_special_tokens=True)
    if collator.end_token and collator.end_token != tokenizer.eos_token:
        texts = [text.split(collator.end_token)[0] if text.strip() else text for text in texts]
    return [text.strip() for text in texts]


def _stops(model: nn.Module, collator: QuestionCollator) -> list[int]:
    """Tokens that end an answer: the tokenizer's end, the model's own (Gemma 3 ends a turn), and the collator's."""
    tokenizer: Any = collator.tokenizer
    own: Any = getattr(getattr(unwrap(model), "generation_config", None), "eos_token_id", None)
    stops = [tokenizer.eos_token_id, *(own if isinstance(own, list | tuple) else [own])]
    end = tokenizer(collator.end_token, add_special_tokens=False)["input_ids"] if collator.end_token else []
    stops += end if len(end) == 1 else []
    return [stop for stop in dict.fromkeys(stops) if stop is not None]


class _LeftPadded:
    """Questions without answers; a class, so that worker processes can receive it."""

    def __init__(self, collator: QuestionCollator) -> None:
        self.collator = collator

    def __call__(self, items: list) -> dict[str, Tensor]:
        return self.collator.encode_questions(items, padding_side="left")


def _new_tokens(written: Tensor, questions: Tensor) -> Tensor:
    """Tokens generated after the question; models with an encoder do not repeat the question."""
    width = questions.shape[1]
    repeats = written.shape[1] >= width and torch.equal(written[:, :width], questions)
    return written[:, width:] if repeats else written
