"""Skip Tuning of a multimodal model: the language model's loss on the answers, from stored hidden states upwards."""

import logging
from collections.abc import Mapping
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.data.feature_store import RowStore, check_room, divided_pass
from peft_vlm.data.question_collator import (
    IGNORED,
    TOKEN_COLUMNS,
    answer_logits,
    answers_of,
    check_image_tokens,
    model_inputs,
    question_inputs,
)
from peft_vlm.data.questions import ImageQuestionDataset
from peft_vlm.distributed import from_all, local_place, part_of, progress_bar
from peft_vlm.errors import AdapterError, UnsupportedModelError, check_choice
from peft_vlm.methods.skip_tuning.objective import PAPER
from peft_vlm.models.language_layers import LanguageLayers, language_layers_of
from peft_vlm.models.towers import device_of
from peft_vlm.objective import Batch, ClassNames, Objective, ObjectiveOutput, prepared
from peft_vlm.text.answers import Candidates, candidate_scores
from peft_vlm.text.class_features import evaluation_mode

STATES = "hidden_states"
TOLERANCE = 1e-3
"""Largest difference of logits, as a share of the largest logit, up to which stored states stand for the images."""


class AnswerStates:
    """States of questions with answers, in memory, each cut to its own length.

    Args:
        language: Layers of the model.
        start: First tuned layer.
    """

    def __init__(self, language: LanguageLayers, start: int) -> None:
        self.language, self.start = language, start
        self.rows: dict[int, dict[str, Tensor]] = {}
        self._store: RowStore | None = None  # holds the memory of the rows

    @property
    def megabytes(self) -> float:
        """Size of what is stored."""
        return sum(t.numel() * t.element_size() for row in self.rows.values() for t in row.values()) / 2**20

    def enter(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Tensor:
        """What enters the first tuned layer, without autograd.

        Args:
            model: Multimodal model.
            batch: Columns of `QuestionCollator`.
        """
        with evaluation_mode(model):
            return self.language.states_entering(self.start, lambda: model(**model_inputs(batch), use_cache=False))

    def fill(self, model: nn.Module, dataset: ImageQuestionDataset, *, batch_size: int, num_workers: int = 0) -> None:
        """Run vision side and lower layers over a dataset, once.

        Args:
            model: Multimodal model.
            dataset: Questions with answers and a collator; its epoch is set.
            batch_size: Rows per forward pass.
            num_workers: Processes that decode images.

        Raises:
            DataError: If all rows, as long as those of the first batch, would not fit into memory.
        """
        self.rows.clear()
        device = device_of(model)
        loader = divided_pass(dataset, batch_size=batch_size, num_workers=num_workers)
        for batch in progress_bar(
            loader, desc=f"Caching layers below {self.start}", leave=False, disable=len(loader) < 2
        ):
            hidden = self.enter(model, {name: column.to(device) for name, column in batch.items()}).cpu()
            if not self.rows:
                size = hidden.element_size() * hidden[0].numel() * len(dataset)
                check_room(size, "ram", name="hidden states of questions")
            for row, index in enumerate(batch["index"].tolist()):
                length = int(batch["attention_mask"][row].sum())  # the collator pads on the right
                kept = {STATES: hidden[row, :length].clone()}
                kept |= {name: batch[name][row, :length] for name in (*TOKEN_COLUMNS, "token_labels") if name in batch}
                if "image_grid_thw" in batch:
                    kept["image_grid_thw"] = batch["image_grid_thw"][row]
                self.rows[index] = kept
        if local_place()[1] > 1:
            self._share(len(dataset))

    def _share(self, total: int) -> None:
        """Put the states of all rows, of which each process of this machine has a part, where all of them can read."""
        index, parts = local_place()
        own = part_of(total, index=index, parts=parts)
        mine = {row: columns for row, columns in self.rows.items() if row in own}
        columns: dict[int, dict[str, Tensor]] = {}
        for part in from_all({row: {k: v for k, v in c.items() if k != STATES} for row, c in mine.items()}):
            columns |= part  # of further machines too, which hold the same
        # one table with the tokens of all questions one below another, of which each process writes its own rows
        lengths = torch.tensor([len(columns[row]["input_ids"]) for row in range(total)])
        ends = lengths.cumsum(0).tolist()
        starts = [0, *ends[:-1]]
        example = next(iter(self.rows.values()))[STATES]
        store = RowStore("ram", name="hidden states of questions")
        store.allocate((ends[-1], example.shape[-1]), example.dtype)
        for row, kept in mine.items():
            store.write(torch.arange(starts[row], ends[row]), kept[STATES])
        store.complete()
        self._store, rows = store, store.rows
        assert rows is not None
        self.rows = {row: {STATES: rows[starts[row] : ends[row]], **columns[row]} for row in range(total)}

    def read(self, batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """The token columns and states of some rows, padded on the right, on the device of the batch.

        Args:
            batch: `index`.

        Raises:
            AdapterError: If a row was not stored.
        """
        missing = sorted(set(batch["index"].tolist()) - set(self.rows))
        if missing:
            raise AdapterError(
                f"Expected stored states of every row, got none of rows {missing[:5]!r}: an empty cache. Call "
                "`epoch_start` before training."
            )
        rows = [self.rows[index] for index in batch["index"].tolist()]
        device = batch["index"].device
        return {name: _padded([row[name] for row in rows], name).to(device) for name in rows[0]}

    @torch.no_grad()
    def check(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Compare the upper layers' logits on stored states with those of a whole forward pass.

        Args:
            model: Multimodal model.
            batch: A whole batch on the model's device.

        Raises:
            UnsupportedModelError: If they differ: the model hands images to its upper layers too.
        """
        inputs, hidden = model_inputs(batch), self.enter(model, batch)
        with evaluation_mode(model):
            expected = model(**inputs, use_cache=False).logits
            with self.language.entered_with(self.start, hidden):
                actual = self.language.reader(**self.language.text_inputs(inputs), use_cache=False).logits
        told = batch["attention_mask"].bool()  # (batch, tokens): nobody reads what stands behind a question
        difference = (actual - expected)[told].abs().max() / expected[told].abs().max()
        if not difference <= TOLERANCE:
            raise UnsupportedModelError(
                f"Expected the language layers from {self.start} on to need nothing but their input, got "
                f"logits that differ by {float(difference):.1%} of the largest: `{type(model).__name__}` hands images "
                "to them too. Use `state_cache='none'`."
            )


def _padded(rows: list[Tensor], name: str) -> Tensor:
    """Rows of different length below each other; what fills them up is masked."""
    if name == "image_grid_thw":
        return torch.stack(rows)
    fill = IGNORED if name == "token_labels" else 0
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)


logger = logging.getLogger(__name__)

CACHES = ("ram", "none")


class SkipTuningAnswerObjective(Objective):
    """Cross-entropy of the answers' tokens; what lies below the tuned layers runs without autograd, once if it can.

    Formula: L = mean over all answer tokens of the batch of -log p(token | image, question, tokens before it).

    LSkip carries over: vision side and lower language layers are frozen, so their output is stored per row, once per
    run when the images stay the same, else once per epoch with that epoch's augmentation. CSkip does not: there are
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
        check_choice("state_cache", state_cache, CACHES)
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
        super().prepare(model, dataset)
        device = device_of(model)
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
        """Store the states of the epoch, unless the images are those of the epoch before.

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
        states = prepared(self._states)
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
