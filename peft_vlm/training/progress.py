"""What a long run says about itself: processes and memory at its start, one line per epoch with the time left."""

import resource
import sys
import time
import warnings
from typing import Any

import torch
from tqdm.auto import tqdm
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_vlm.distributed import all_agree, is_main_process, num_processes
from peft_vlm.errors import PeftVLMError, PeftVLMWarning
from peft_vlm.training.advice import what_to_lower
from peft_vlm.training.memory_estimate import estimate_memory, free_memory, in_words
from peft_vlm.training.running_means import RunningMeans

_said: set[str] = set()


class RunReport(TrainerCallback):
    """Prints to standard error from the main process, and refuses what cannot fit into memory.

    Args:
        trainer: The trainer it belongs to.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._start, self._first_step, self._loss, self._epoch = 0.0, 0, 0.0, 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say how many processes train, and compare estimated and free memory.

        Args:
            args: Settings of the run.
            state: State of the trainer.
            control: Not used.
            **kwargs: Not used.

        Raises:
            PeftVLMError: If the memory does not suffice, and `memory_check` is `"refuse"`.
        """
        trainer, size = self.trainer, args.per_device_train_batch_size
        model, objective = trainer.model.model, trainer.objective
        estimate = estimate_memory(model, objective, trainer.train_dataset, args)
        together = size * num_processes() * args.gradient_accumulation_steps
        self._say_once(
            f"Training in {num_processes()} process{'es' if num_processes() > 1 else ''} on {args.device.type}: "
            f"{together} images per step ({size} per process, {args.gradient_accumulation_steps} accumulated), "
            f"{state.max_steps - state.global_step} steps to go. Estimated memory per process: {estimate}."
        )
        free = free_memory(args.device)
        if args.memory_check != "off" and not all_agree(free is None or estimate.needed <= free):
            message = (
                f"Expected {in_words(free or 0)} of free memory to suffice, got an estimate of "
                f"{in_words(estimate.needed)} beside what is in use now ({estimate}). "
                f"{what_to_lower(args, objective.config_dict())} `memory_check='off'` tries it anyway."
            )
            if args.memory_check == "refuse":
                raise PeftVLMError(message)
            warnings.warn(message, PeftVLMWarning, stacklevel=2)
        trainer.running_means = RunningMeans()
        self._start, self._first_step = time.monotonic(), state.global_step

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """The loss of the epoch begins anew."""
        self.trainer.running_means.start_epoch()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Loss, speed, time left and peak memory; where the user has not switched progress off."""
        loss = self.trainer.running_means.epoch_loss()
        done = state.global_step - self._first_step
        if args.disable_tqdm or not done or loss is None:
            return
        seconds = (time.monotonic() - self._start) / done
        images = args.per_device_train_batch_size * num_processes() * args.gradient_accumulation_steps / seconds
        left = duration(seconds * (state.max_steps - state.global_step))
        self._say(
            f"Epoch {state.epoch or 0.0:g} of {state.num_train_epochs}: loss {loss:.4g}, {images:.3g} images/s, "
            f"{left} left, peak memory {_peak(args.device):.2f} GB"
        )

    def _say(self, line: str) -> None:
        if is_main_process():
            tqdm.write(line, file=sys.stderr)

    def _say_once(self, line: str) -> None:
        """Experiments train many times in the same way."""
        kind = line.partition("Estimated")[0]
        if kind not in _said:
            _said.add(kind)
            self._say(line)


def duration(seconds: float) -> str:
    """A time as people say it.

    Args:
        seconds: Length.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _peak(device: torch.device) -> float:
    if device.type == "cuda":
        return torch.cuda.max_memory_allocated(device) / 2**30
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * (1 if sys.platform == "darwin" else 1024) / 2**30
