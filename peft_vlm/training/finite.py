"""Steps whose loss or gradient is not finite: the run stops and names the images, or leaves such steps out."""

import logging
from contextlib import suppress
from typing import Any

import torch
from torch import Tensor
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_vlm.distributed import all_agree, from_all

logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 10
"""After so many steps left out one after the other the weights are broken, and the run stops."""
MAX_SCALER_SKIPS = 30
"""The same for a loss scaler, which halves its factor of 65,536 each time: no gradient is too large after so many."""


class FiniteSteps(TrainerCallback):
    """Looks at loss and gradient of all processes before each update; all of them decide alike.

    Under a loss scaler a gradient that overflows is nothing special: the scaler leaves the step out and lowers its
    factor. Such steps are counted too, and stop the run where lowering does not help.

    Args:
        trainer: The trainer it belongs to.
        choice: `"error"` or `"skip"`.
    """

    def __init__(self, trainer: Any, choice: str) -> None:
        self.trainer, self.choice = trainer, choice
        self._batches: list[tuple[dict[str, Tensor], Tensor]] = []
        self._in_a_row, self._scaler_skips = 0, 0
        self._left_out = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier run, which may have ended within a step."""
        self._batches, self._in_a_row, self._scaler_skips = [], 0, 0

    def add(self, outputs: dict[str, Tensor], index: Tensor) -> None:
        """Remember a batch until the update.

        Args:
            outputs: Loss and its terms.
            index: Positions of its images in the dataset.
        """
        self._batches.append(({k: v.detach() for k, v in outputs.items() if k.startswith("loss")}, index))

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop, or leave the update out, where something is not finite.

        Args:
            args: Settings of the run.
            state: State of the trainer.
            control: Not used.
            **kwargs: Not used.

        Raises:
            FloatingPointError: Naming the images.
        """
        batches, self._batches = self._batches, []
        parameters = [p for p in self.trainer.model.parameters() if p.grad is not None]
        good = torch.stack([outputs["loss"] for outputs, _ in batches]).isfinite().all()
        has_scaler = self.trainer.accelerator.scaler is not None
        if parameters and not has_scaler:
            good = good & torch.stack([p.grad.detach().float().sum() for p in parameters]).isfinite().all()
        self._left_out = not all_agree(bool(good))
        self.trainer.running_means.end_step(left_out=self._left_out)
        if not self._left_out:
            self._in_a_row = 0
            return
        message = self._message(batches, state.global_step)
        self._in_a_row += 1
        if self.choice == "error" or self._in_a_row > MAX_IN_A_ROW:
            raise FloatingPointError(message)
        logger.warning("The step is left out. %s", message)
        if has_scaler:  # which must have looked at gradients before they go, and skips the step if they overflow
            optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
            with suppress(RuntimeError):  # it has looked already
                self.trainer.accelerator.scaler.unscale_(optimizer)
        for parameter in parameters:
            parameter.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count a step that was left out, by this or by the loss scaler.

        Args:
            args: Settings of the run.
            state: State of the trainer.
            control: Not used.
            **kwargs: Not used.

        Raises:
            FloatingPointError: If the scaler leaves out every step.
        """
        by_scaler = self.trainer.accelerator.optimizer_step_was_skipped
        self._scaler_skips = self._scaler_skips + 1 if by_scaler else 0
        if self._scaler_skips > MAX_SCALER_SKIPS:
            raise FloatingPointError(
                f"Expected a finite gradient at step {state.global_step}, got {self._scaler_skips} steps in a row "
                "that the loss scaler left out, however small its factor. Use bf16 or float32 instead of fp16, or "
                "lower the learning rate."
            )
        if self._left_out or by_scaler:
            earlier = [entry["skipped_steps"] for entry in state.log_history if "skipped_steps" in entry]
            self.trainer.log({"skipped_steps": (earlier[-1] if earlier else 0.0) + 1})

    def _message(self, batches: list[tuple[dict[str, Tensor], Tensor]], step: int) -> str:
        bad = [pair for pair in batches if not torch.isfinite(pair[0]["loss"])]
        terms = {key: float(value) for key, value in bad[0][0].items()} if bad else {}
        images = sorted({position for _, index in bad or batches for position in index.tolist()})
        everywhere = from_all((terms, images))
        guilty = [pair for pair in everywhere if pair[0]] or everywhere
        what = f"a finite loss, got {guilty[0][0]!r}" if guilty[0][0] else "a finite gradient, got another"
        found = sorted({position for _, some in guilty for position in some})
        return (
            f"Expected {what} at step {step} for the images with dataset index {found!r}. Lower the learning rate, "
            "use bf16 or float32 instead of fp16, look at these images, or leave such steps out (`non_finite='skip'`)."
        )
