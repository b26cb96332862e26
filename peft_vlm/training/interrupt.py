"""Ctrl-C and the termination signal: the step is finished, a checkpoint written, and the run ends."""

import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_vlm.distributed import all_agree, from_all, is_main_process

SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 3.0
"""A launcher passes on what its processes got from the terminal too: within this time a signal is the same one."""


class Interrupt(TrainerCallback):
    """Ends a run after the step in which the first signal came; a second one ends it at once."""

    def __init__(self) -> None:
        self._signal: int | None = None
        self._since = 0.0
        self._ending = False

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within this, signals are taken; only the main thread of a process can."""
        self._signal, self._ending = None, False
        if threading.current_thread() is not threading.main_thread():
            yield
            return
        before = {number: signal.signal(number, self._take) for number in SIGNALS}
        try:
            yield
            if not all_agree(self._signal is None):  # it came when no step was left
                number = next(number for number in from_all(self._signal) if number is not None)
                _end(number, "Stopped after the last step; the run had finished and its results are written.")
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def _take(self, number: int, frame: FrameType | None) -> None:
        if self._signal is None:
            self._signal, self._since = number, time.monotonic()
            message = "\nInterrupted: this step is finished and a checkpoint written. Once more: stop at once.\n"
            sys.stderr.write(message if is_main_process() else "")
        elif time.monotonic() - self._since > ECHO_SECONDS:
            _end(number, "Stopped at once; the last checkpoint is as it was.")

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> TrainerControl:
        """Ask for a checkpoint, on all processes, when a signal has reached one of them."""
        if not self._ending and not all_agree(self._signal is None):
            self._ending = control.should_save = True
            self._signal = next(number for number in from_all(self._signal) if number is not None)
        return control

    def on_save(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """End the run after the checkpoint."""
        if self._ending and self._signal is not None:
            _end(
                self._signal,
                f"Stopped after step {state.global_step} of {state.max_steps}; checkpoint-{state.global_step} is in "
                f"{args.output_dir!r}. Go on with `resume_from_checkpoint='auto'`.",
            )


def _end(number: int, message: str) -> None:
    if number == signal.SIGINT:
        raise KeyboardInterrupt(message)
    if is_main_process():
        sys.stderr.write(message + "\n")
    raise SystemExit(128 + number)
