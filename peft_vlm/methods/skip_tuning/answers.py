"""Skip Tuning of a multimodal model: the language model's loss on the answers, from stored hidden states upwards."""

import logging
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.data.question_collator import (
    answer_logits,
    answers_of,
    check_image_tokens,
    model_inputs,
    question_inputs,
)
from peft_vlm.data.questions import ImageQuestionDataset
from peft_vlm.errors import AdapterError
from peft_vlm.methods.skip_tuning.answer_states import STATES, AnswerStates
from peft_vlm.methods.skip_tuning.objective import PAPER
from peft_vlm.models.language_layers import language_layers_of
from peft_vlm.objective import ClassNames, Objective, ObjectiveOutput
from peft_vlm.shapes import Batch
from peft_vlm.text.answers import Candidates, candidate_scores

logger = logging.getLogger(__name__)

CACHES = ("ram", "none")


class SkipTuningAnswerObjective(Objective):
    """Cross-entropy of the answers' tokens; what lies below the tuned layers runs without autograd, once if it can.

    Formula: L = mean over all answer tokens of the batch of -log p(token | image, question, tokens before it).

    LSkip carries over: vision side and lower language layers are frozen, so their output is stored per row, once per
    run when the pictures stay the same, else once per epoch with that epoch's augmentation. CSkip does not: there are
    no class prompts to leave out.

    Args:
        candidates: Answers that stand for the classes (`tokenize_candidates`), for evaluation during training; None
            for free answers.
        state_cache: `"ram"`: stored states, tokens x width per row; `"none"`: the lower layers run per batch. The
            same result, except that stored states never have dropout (OPT has it in its layers).
        cache_batch_size: Rows per forward pass while caching.
        num_workers: Processes that decode images while caching.

    Requirements:
        An `ImageQuestionDataset` with answers and a `QuestionCollator`; a multimodal `PeftModel` with an active Skip
        Tuning adapter and nothing else that trains.

    Relations:
        With `start_layer=0` and no cache, fine-tuning of all language layers.

    Raises:
        ValueError: If the cache is unknown.

    References:
        arXiv 2412.11509, Sec. 4 (LSkip). Deviation: the paper tunes CLIPs; multimodal models are ours.
    """

    paper = PAPER
    labels_are_positions = False  # it learns the words of an answer

    def __init__(
        self,
        candidates: Candidates | None = None,
        *,
        state_cache: str = "ram",
        cache_batch_size: int = 16,
        num_workers: int = 0,
    ) -> None:
        if state_cache not in CACHES:
            raise ValueError(f"Expected `state_cache` to be one of {CACHES!r}, got {state_cache!r}.")
        self.candidates = candidates
        self.prompts = None if candidates is None else ClassNames(candidates.names)
        self.can_predict = candidates is not None
        self.state_cache, self.cache_batch_size, self.num_workers = state_cache, cache_batch_size, num_workers
        self.needs_pixels = state_cache == "none"
        self._states: AnswerStates | None = None

    def config_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {"state_cache": self.state_cache}

    def prepare(self, model: nn.Module, dataset: ImageQuestionDataset) -> None:
        """Compare image tokens with image features and stored states with whole passes, on the first row.

        Args:
            model: `PeftModel` with the active adapter.
            dataset: Questions with answers.

        Raises:
            ValueError: If the states cannot be stored: nothing lies below the tuned layers, or modules there train.
        """
        device = next(model.parameters()).device
        batch = {name: column.to(device) for name, column in dataset.collate([dataset[0]]).items()}
        answers_of(batch)
        check_image_tokens(model, batch)
        config = model.active_peft_config
        start = config.start_layers[1]
        self._states = AnswerStates(language_layers_of(model), start)
        if self.state_cache == "none":
            return
        if not start or config.modules_to_save:
            raise ValueError(
                "Expected a start layer of 1 or more and no `modules_to_save`, got "
                f"{start!r} and {config.modules_to_save!r}: what enters the tuned layers would change in training, or "
                "there is no layer to take it from. Use `state_cache='none'`."
            )
        self._states.check(model, batch)

    def epoch_start(self, model: nn.Module, dataset: ImageQuestionDataset, epoch: int) -> None:
        """Store the states of the epoch, unless the pictures are those of the epoch before.

        Args:
            model: `PeftModel` with the active adapter.
            dataset: Questions with answers; its epoch is already set.
            epoch: Number of the epoch, from 0.
        """
        states = self._states
        if states is None or self.state_cache == "none" or (states.rows and dataset.has_fixed_pixels):
            return
        states.fill(model, dataset, batch_size=self.cache_batch_size, num_workers=self.num_workers)
        logger.info("Stored states of %d questions: %.1f MB in RAM", len(states.rows), states.megabytes)

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Loss of a batch.

        Args:
            model: `PeftModel` with the active adapter.
            batch: `index` into the stored states, or the columns of `QuestionCollator`.

        Returns:
            The term `language`, and logits with one row per answer token.

        Raises:
            RuntimeError: If `prepare` was not called.
        """
        states = self._states
        if states is None:
            raise RuntimeError("Expected `prepare(model, dataset)` before the first batch; the trainer calls it.")
        if self.state_cache == "none":  # nothing below the tuned layers asks for a gradient, so autograd starts there
            logits, labels = answer_logits(model, model_inputs(batch), answers_of(batch))
        else:
            columns, language = states.read(batch), states.language
            inputs = language.text_inputs(model_inputs(columns))
            with language.entered_with(states.start, columns[STATES]):
                logits, labels = answer_logits(language.reader, inputs, answers_of(columns))
        return ObjectiveOutput({"language": nn.functional.cross_entropy(logits, labels)}, logits, labels)

    @torch.no_grad()
    def predict(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Mean log-probability of each candidate's tokens.

        Args:
            model: The model under evaluation.
            batch: Columns of `QuestionCollator`.

        Raises:
            AdapterError: If there are no candidates.
        """
        if self.candidates is None:
            raise AdapterError(
                "Expected candidate answers to choose from, got none: free answers have no scores. Pass "
                "`tokenize_candidates(tokenizer, class_names)` to the objective, or leave out `eval_dataset`."
            )
        return candidate_scores(model, question_inputs(batch), self.candidates)
