"""Gaussian prompt aggregation (GPA): the trained prompts are a weighted mean over the epochs.

Self-regulating Prompts, 2023, arXiv 2307.06948, Sec. 3.2.2, Eq. (6).
"""

import logging
import math
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

logger = logging.getLogger(__name__)

STATE_PREFIX = "aggregation."


def gaussian_log_weights(num_epochs: int, *, mean: float | int, std: float | int) -> Tensor:
    """Logarithms of the weights of epochs 1 to N: a normal density at the epoch numbers, divided by its sum.

    Args:
        num_epochs: Epochs of the run, N.
        mean: Epoch with the largest weight, counted from 1. Official `GPA_MEAN`.
        std: Width in epochs. Official `GPA_STD`.

    Returns:
        Float64, (epochs,). Logarithms, because early epochs of a narrow Gaussian weigh less than a float can hold.
    """
    epochs = torch.arange(1, num_epochs + 1, dtype=torch.float64)
    return torch.log_softmax(-0.5 * ((epochs - mean) / std) ** 2, dim=0)


class PromptAggregation(TrainerCallback):
    """Keeps the weighted mean of the trained tensors over the epochs so far, and puts it into the model at the end.

    The mean is taken at the last step of each epoch, so that every checkpoint holds all finished epochs, and moved
    into the model before the last evaluation and the final files. It is always normalised over the epochs that were
    seen: a run that stops early still gives a mean.

    Args:
        mean: Epoch with the largest weight, counted from 1.
        std: Width in epochs.
    """

    def __init__(self, *, mean: float | int, std: float | int) -> None:
        self.mean, self.std = mean, std
        self.num_seen = 0
        self.averages: dict[str, Tensor] = {}
        self.model: nn.Module | None = None

    def trained(self) -> dict[str, nn.Parameter]:
        """The tensors that are averaged: those of the active adapter, never a frozen weight."""
        assert self.model is not None, "`Objective.callbacks` names the model"
        return {name: p for name, p in self.model.named_parameters() if p.requires_grad}

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Refuse `load_best_model_at_end`, under which the mean would be lost; a new run starts without one."""
        if args.load_best_model_at_end:
            raise ValueError(
                "Expected `load_best_model_at_end`=False with Gaussian prompt aggregation, got True: the best "
                "checkpoint, one single epoch, would replace the mean over all epochs. Leave out one of the two."
            )
        if state.global_step == 0:
            self.num_seen, self.averages = 0, {}

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Add the epoch that this step ends; a run that ends within an epoch counts that epoch as it is."""
        epoch = state.epoch or 0.0  # a whole number after the last step of an epoch, up to rounding
        if abs(epoch - round(epoch)) < 1e-6 or state.global_step >= state.max_steps:
            self.add(_number(epoch), num_epochs=state.num_train_epochs)

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the mean into the model when this was the last epoch."""
        if state.global_step >= state.max_steps or control.should_training_stop:
            self.add(_number(state.epoch or 0.0), num_epochs=state.num_train_epochs)
            self.finish(state)

    def on_train_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Put the mean into the model, also of a run that an evaluation stopped."""
        self.finish(state)

    @torch.no_grad()
    def add(self, epoch: int, *, num_epochs: int) -> None:
        """Take the prompts as they are into the mean.

        Args:
            epoch: Number of the epoch that ends, from 1; an epoch that is already in the mean is left out.
            num_epochs: Epochs of the run.
        """
        if epoch <= self.num_seen:
            return
        # the weight of this epoch among those so far: a running mean needs no knowledge of how the run ends
        log_weights = gaussian_log_weights(num_epochs, mean=self.mean, std=self.std)[:epoch]
        share = float(torch.exp(log_weights[-1] - torch.logsumexp(log_weights, dim=0)))
        for name, parameter in self.trained().items():
            value = parameter.detach().double()  # float32 would lose epochs of small weight
            average = self.averages.get(name)
            self.averages[name] = value if average is None else average.to(value).lerp(value, share)
        self.num_seen = epoch

    @torch.no_grad()
    def finish(self, state: TrainerState) -> None:
        """Put the mean into the model and say so; once per run.

        Args:
            state: State of the trainer; its log gets a line.
        """
        line = {"epoch": state.epoch, "step": state.global_step, "aggregated_epochs": self.num_seen}
        if not self.averages or line in state.log_history:
            return
        for name, parameter in self.trained().items():
            parameter.copy_(self.averages[name])
        state.log_history.append(line)
        settings = f"Gaussian mean {self.mean:g}, standard deviation {self.std:g}"
        logger.info("The prompts are the weighted mean over %d epochs (%s).", self.num_seen, settings)
        if self.num_seen < state.num_train_epochs:
            logger.warning(
                "Training stopped after %d of %d epochs: the weights of these %d were scaled to sum to 1 (%s).",
                *(self.num_seen, state.num_train_epochs, self.num_seen, settings),
            )

    def state_dict(self) -> dict[str, Tensor]:
        """The mean so far, and the number of its epochs."""
        state = {f"{STATE_PREFIX}{name}": tensor for name, tensor in self.averages.items()}
        return state | {"aggregated_epochs": torch.tensor(self.num_seen)}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on from a saved mean.

        Args:
            state: Mapping of `state_dict`.
        """
        self.num_seen = int(state["aggregated_epochs"])
        self.averages = {
            key.removeprefix(STATE_PREFIX): tensor for key, tensor in state.items() if key.startswith(STATE_PREFIX)
        }


def _number(epoch: float) -> int:
    """Number, from 1, of the epoch that a position like 2.0 (its end) or 1.3 (within it) belongs to."""
    return math.ceil(epoch - 1e-6)
