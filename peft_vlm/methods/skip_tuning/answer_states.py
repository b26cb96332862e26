"""LSkip's store for questions: per training row its token columns and what enters the first tuned language layer."""

from collections.abc import Mapping

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_vlm.data.feature_store import RowStore, check_room, divided_pass
from peft_vlm.data.question_collator import IGNORED, TOKEN_COLUMNS, model_inputs
from peft_vlm.data.questions import ImageQuestionDataset
from peft_vlm.distributed import from_all, local_place, part_of
from peft_vlm.errors import AdapterError, UnsupportedModelError
from peft_vlm.models.language_layers import LanguageLayers
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
        device = next(model.parameters()).device
        loader = divided_pass(dataset, batch_size=batch_size, num_workers=num_workers)
        for batch in tqdm(loader, desc=f"Caching layers below {self.start}", leave=False, disable=len(loader) < 2):
            hidden = self.enter(model, {name: column.to(device) for name, column in batch.items()}).cpu()
            if not self.rows:
                size = hidden.element_size() * hidden[0].numel() * len(dataset)
                check_room(size, "ram", name="hidden states of questions")
            for row, index in enumerate(batch["index"].tolist()):
                length = int(batch["attention_mask"][row].sum())
                kept = {STATES: hidden[row, :length].clone()}
                kept |= {name: batch[name][row, :length] for name in _token_columns(batch)}
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
        told = batch["attention_mask"].bool()
        difference = (actual - expected)[told].abs().max() / expected[told].abs().max()
        if not difference <= TOLERANCE:
            raise UnsupportedModelError(
                f"Expected the language layers from {self.start} on to need nothing but their input, got "
                f"logits that differ by {float(difference):.1%} of the largest: `{type(model).__name__}` hands images "
                "to them too. Use `state_cache='none'`."
            )


def _token_columns(batch: Mapping[str, Tensor]) -> list[str]:
    return [name for name in (*TOKEN_COLUMNS, "token_labels") if name in batch]


def _padded(rows: list[Tensor], name: str) -> Tensor:
    """Rows of different length below each other; what fills them up is masked."""
    if name == "image_grid_thw":
        return torch.stack(rows)
    fill = IGNORED if name == "token_labels" else 0
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=fill)
