"""Answers that a model writes itself, in batches."""

from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.data import DataLoader
from tqdm.auto import tqdm

from peft_vlm.data.question_collator import QuestionCollator
from peft_vlm.data.questions import ImageQuestionDataset, RandomCrop
from peft_vlm.errors import DataError
from peft_vlm.models.towers import unwrap
from peft_vlm.text.class_features import evaluation_mode


def collator_of(dataset: ImageQuestionDataset) -> QuestionCollator:
    """The dataset's collator, for a dataset that fits an evaluation.

    Args:
        dataset: Questions with a `QuestionCollator`, and pictures that are not cropped at random.

    Raises:
        DataError: If there is none, or the pictures are those of training.
    """
    if isinstance(dataset.augmentation, RandomCrop):
        raise DataError(
            "Expected the pictures of evaluation, got random crops. Use `dataset.with_augmentation(None)`."
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
    """What a model answers to each question, in dataset order: the most likely token at each step, up to the end.

    Questions of a batch are padded on the left, so that every answer begins right behind its question.

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
    collator = collator_of(dataset)
    tokenizer = collator.tokenizer
    stops = _stops(model, collator)
    options = {"max_new_tokens": max_new_tokens, "do_sample": False, "num_beams": 1}
    options |= {"eos_token_id": stops or None, "pad_token_id": tokenizer.pad_token_id}
    device = next(model.parameters()).device
    loader = DataLoader(dataset, batch_size=batch_size, num_workers=num_workers, collate_fn=_LeftPadded(collator))
    texts: list[str] = []
    with evaluation_mode(model):
        for inputs in tqdm(loader, desc="answer", unit="batch", disable=not progress):
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
    """What was written behind the question; models with an encoder do not repeat the question."""
    width = questions.shape[1]
    repeats = written.shape[1] >= width and torch.equal(written[:, :width], questions)
    return written[:, width:] if repeats else written
