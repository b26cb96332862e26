"""What happens around the steps of a run: hooks of the objective, signals, steps that are not finite, progress."""

import logging
import os
import signal
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from types import FrameType
from typing import Any

import torch
from torch import Tensor, distributed
from tqdm.auto import tqdm
from transformers import ProgressCallback, TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_vlm.distributed import all_agree, from_all, is_main_process, num_processes, process_index, shows_progress
from peft_vlm.errors import PeftVLMError
from peft_vlm.serving.escape import one_line

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
#: Parts of what gloo and NCCL say when a connection is gone or nobody answers.
LOST_PARTNER = ("gloo", "Gloo", "NCCL", "Connection closed by peer", "Connection reset by peer", "Broken pipe")
CACHES = ("image_cache", "state_cache", "cache_storage")


@contextmanager
def with_advice(args: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Errors of the machine leave this with a message that says what to change.

    Args:
        args: Settings of the run.
        settings: Those of the objective, for caches that could lie elsewhere.

    Raises:
        MemoryError: In place of what torch raises.
        PeftVLMError: If a worker died, or another process of the training.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        first = str(error).partition("\n")[0] or "Out of memory."
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if is_memory or any(words in str(error).lower() for words in OUT_OF_MEMORY):
            raise MemoryError(f"{first} {_what_to_lower(args, settings)}") from error
        if "DataLoader worker" in str(error):
            raise PeftVLMError(
                f"A process that reads images died: {first} The system usually ends it for want of memory. Lower "
                f"`dataloader_num_workers` (now {args.dataloader_num_workers}) or the objective's `num_workers`, give "
                "a container more shared memory (`--shm-size`), and go on with `resume_from_checkpoint='auto'`."
            ) from error
        is_of_backend = isinstance(error, distributed.DistError) or any(words in str(error) for words in LOST_PARTNER)
        if num_processes() > 1 and is_of_backend:
            raise PeftVLMError(
                f"Expected {num_processes()} processes to train together, got no answer from another one than process "
                f"{process_index()}: {one_line(error)[:300]}. It has ended, or hangs: look at its output for the "
                "reason, then start all of them again with `resume_from_checkpoint='auto'`."
            ) from error
        raise


def _what_to_lower(args: Any, settings: dict[str, Any]) -> str:
    """How the same training takes less memory.

    Args:
        args: Settings of the run.
        settings: Those of the objective.
    """
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    advice = []
    if size > 1:
        advice.append(
            f"`per_device_train_batch_size={size // 2}` with `gradient_accumulation_steps={2 * accumulation}` (now "
            f"{size} and {accumulation}) takes half of the images' activations"
        )
    if not args.activation_checkpointing:
        advice.append("`gradient_checkpointing=True` recomputes them")
    if not (args.bf16 or args.fp16):
        advice.append("`bf16=True` halves them")
    for name in CACHES:
        if (choice := settings.get(name)) in ("ram", "auto"):
            advice.append(f"the objective's `{name}={choice!r}` holds features in memory, 'disk' and 'none' do not")
    advice.append("fewer classes per run shorten the text side")
    return f"Lower what the run needs: {'; '.join(advice)}. Then go on with `resume_from_checkpoint='auto'`."


class ObjectiveCallback(TrainerCallback):
    """Calls `prepare` once and `epoch_start` before each epoch, and tells the run's images their epoch.

    Both run in the mixed precision of the training, so that caches hold what training would compute.

    Args:
        trainer: The trainer it belongs to.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._has_begun = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Prepare the objective on the device of the run, and log an epoch that was over but not logged at a resume.

        The checkpoint of the last step of an epoch is written before the epoch ends.
        """
        self.trainer.record.use_own_rates()
        module = self.trainer.model
        with self.trainer.interrupt.between_steps(state.global_step), self.trainer.accelerator.autocast():
            module.objective.prepare(module.model, self.trainer.images)
            self._keep_weights()
        self._has_begun, epoch = False, state.epoch or 0.0
        if round(epoch) > 0 and abs(epoch - round(epoch)) < 1e-6:
            metrics = module.objective.epoch_end()
            logged = [entry.keys() for entry in state.log_history if entry.get("epoch") == epoch]
            if metrics and not any(metrics.keys() <= keys for keys in logged):
                self.trainer.log(metrics)

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Build the caches of the epoch that begins or, after a resume, continues.

        Batches that a resumed run throws away need not be decoded.
        """
        images, module = self.trainer.images, self.trainer.model
        epoch = int((state.epoch or 0.0) + 1e-6)
        done = 0 if self._has_begun or args.ignore_data_skip else state.global_step % self.trainer.steps_per_epoch
        self._has_begun = True
        images.set_epoch(epoch)
        images.skip_batches(done * args.gradient_accumulation_steps)
        with self.trainer.interrupt.between_steps(state.global_step), self.trainer.accelerator.autocast():
            module.objective.epoch_start(module.model, images, epoch)
            self._keep_weights()

    def _keep_weights(self) -> None:
        """Copy the trained weights, which an objective may have aligned, to DeepSpeed's optimizer: it has its own."""
        if self.trainer.is_deepspeed_enabled:
            self.trainer.model_wrapped.optimizer.refresh_fp32_params()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Log what the objective has counted in the epoch."""
        metrics = self.trainer.model.objective.epoch_end()
        unreadable = set().union(*from_all(set(self.trainer.images.unreadable.rows)))
        if unreadable:
            metrics["unreadable_images"] = float(len(unreadable))
        if metrics:
            self.trainer.log(metrics)


SIGNALS = (signal.SIGINT, signal.SIGTERM)
ECHO_SECONDS = 3.0
"""A launcher passes on what its processes got from the terminal too: within this time a signal is the same one."""


class Interrupt(TrainerCallback):
    """Ends a run after the step in which the first signal came, and at once where no step is made; so does a second
    one.
    """

    def __init__(self) -> None:
        self._signal: int | None = None
        self._since = 0.0
        self._ending = False
        self._process = os.getpid()
        #: Why the run may end where it is; None within a step, whose work would be lost.
        self._between_steps: str | None = None

    @contextmanager
    def watched(self) -> Iterator[None]:
        """Within this, signals are taken; only the main thread of a process can."""
        self._signal, self._ending, self._process = None, False, os.getpid()
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

    @contextmanager
    def between_steps(self, step: int) -> Iterator[None]:
        """Within this, where an objective may store features for minutes, the first signal ends the run at once.

        What was stored is dropped: only all of it is of use, and only for this run.

        Args:
            step: Steps that were made.
        """
        done = f"Stopped before step {step + 1}, while the objective prepared it"
        self._between_steps = f"{done}; the last checkpoint is as it was." if step else f"{done}; nothing was written."
        try:
            if self._signal is not None and not self._ending:
                _end(self._signal, self._between_steps)
            yield
        finally:
            self._between_steps = None

    def _take(self, number: int, frame: FrameType | None) -> None:
        if os.getpid() != self._process:  # a worker that reads images; the run ends it
            return
        if self._signal is None and self._between_steps is not None:
            self._signal = number
            _end(number, self._between_steps)
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


logger = logging.getLogger(__name__)

MAX_IN_A_ROW = 10
"""After so many skipped steps one after the other the weights are broken, and the run stops."""
MAX_SCALER_SKIPS = 30
"""The same for a loss scaler, which halves its factor of 65,536 each time: no gradient is too large after so many."""


class FiniteSteps(TrainerCallback):
    """Looks at loss and gradient of all processes before each update; all of them decide alike.

    Under a loss scaler a gradient that overflows is nothing special: the scaler skips the step and lowers its factor.
    Such steps are counted too, and stop the run where lowering does not help.

    Args:
        trainer: The trainer it belongs to.
        choice: `"error"` or `"skip"`.
    """

    def __init__(self, trainer: Any, choice: str) -> None:
        self.trainer, self.choice = trainer, choice
        self._in_a_row, self._scaler_skips = 0, 0
        self._skipped = False

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget an earlier run."""
        self._in_a_row, self._scaler_skips = 0, 0

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Stop, or skip the update, where something is not finite.

        Args:
            args: Settings of the run.
            state: State of the trainer.
            control: Not used.
            **kwargs: Not used.

        Raises:
            FloatingPointError: Naming the images.
        """
        batches = self.trainer.losses.batches
        parameters = [p for p in self.trainer.model.parameters() if p.grad is not None]
        good = torch.stack([outputs["loss"] for outputs, _ in batches]).isfinite().all()
        has_scaler = self.trainer.accelerator.scaler is not None
        seen = [p.grad for p in parameters]
        if self.trainer.is_deepspeed_enabled:  # it has made the update, or left it out, and dropped the gradients
            seen = [p for p in self.trainer.model.parameters() if p.requires_grad]
            good = good & (not self.trainer.accelerator.optimizer_step_was_skipped)
        if seen and not has_scaler:
            good = good & torch.stack([tensor.detach().float().sum() for tensor in seen]).isfinite().all()
        self._skipped = not all_agree(bool(good))
        self.trainer.losses.end_step(skipped=self._skipped)
        if not self._skipped:
            self._in_a_row = 0
            return
        message = self._message(batches, state.global_step)
        self._in_a_row += 1
        if self.choice == "error" or self._in_a_row > MAX_IN_A_ROW:
            raise FloatingPointError(message)
        logger.warning("The step is skipped. %s", message)
        if has_scaler:  # which must have looked at gradients before they go, and skips the step if they overflow
            optimizer = getattr(self.trainer.optimizer, "optimizer", self.trainer.optimizer)
            with suppress(RuntimeError):  # it has looked already
                self.trainer.accelerator.scaler.unscale_(optimizer)
        for parameter in parameters:
            parameter.grad = None

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Count a step that was skipped, by this or by the loss scaler.

        Args:
            args: Settings of the run.
            state: State of the trainer.
            control: Not used.
            **kwargs: Not used.

        Raises:
            FloatingPointError: If the scaler skips every step.
        """
        by_scaler = self.trainer.accelerator.optimizer_step_was_skipped
        self._scaler_skips = self._scaler_skips + 1 if by_scaler else 0
        if self._scaler_skips > MAX_SCALER_SKIPS:
            raise FloatingPointError(
                f"Expected a finite gradient at step {state.global_step}, got {self._scaler_skips} steps in a row "
                "that the loss scaler left out, however small its factor. Use bf16 or float32 instead of fp16, or "
                "lower the learning rate."
            )
        if self._skipped or by_scaler:
            earlier = [entry["skipped_steps"] for entry in state.log_history if "skipped_steps" in entry]
            self.trainer.log({"skipped_steps": (earlier[-1] if earlier else 0.0) + 1})

    def _message(self, batches: list[tuple[dict[str, Tensor], Tensor]], step: int) -> str:
        bad = [pair for pair in batches if not torch.isfinite(pair[0]["loss"])]
        terms = {key: float(value) for key, value in bad[0][0].items() if key.startswith("loss")} if bad else {}
        images = sorted({position for _, index in bad or batches for position in index.tolist()})
        everywhere = from_all((terms, images))
        guilty = [pair for pair in everywhere if pair[0]] or everywhere
        what = f"a finite loss, got {guilty[0][0]!r}" if guilty[0][0] else "a finite gradient, got another"
        found = sorted({position for _, some in guilty for position in some})
        return (
            f"Expected {what} at step {step} for the images with dataset index {found!r}. Lower the learning rate, "
            "use bf16 or float32 instead of fp16, look at these images, or skip such steps (`non_finite='skip'`)."
        )


_said: set[str] = set()


class RunReport(TrainerCallback):
    """Prints what a run does to standard error, from the main process.

    Args:
        trainer: The trainer it belongs to.
    """

    def __init__(self, trainer: Any) -> None:
        self.trainer = trainer
        self._start = 0.0

    def on_train_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Say how many processes train, and on how many images per step."""
        size = args.per_device_train_batch_size
        together = size * num_processes() * args.gradient_accumulation_steps
        self._say_once(
            f"Training in {num_processes()} process{'es' if num_processes() > 1 else ''} on {args.device.type}: "
            f"{together} images per step ({size} per process, {args.gradient_accumulation_steps} accumulated), "
            f"{state.max_steps - state.global_step} steps to go"
            f"{', frozen layers divided among the processes' * args.has_sharded_layers}."
        )
        self.trainer.losses.start_run()
        self._start = time.monotonic()

    def on_epoch_begin(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Forget the loss of the epoch before."""
        self.trainer.losses.start_epoch()

    def on_epoch_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Loss, speed, time left and peak memory; where the user has not switched progress off."""
        loss = self.trainer.losses.epoch_loss()
        done = state.global_step - self.trainer.first_step
        if args.disable_tqdm or not done or loss is None:
            return
        seconds = (time.monotonic() - self._start) / done
        images = args.per_device_train_batch_size * num_processes() * args.gradient_accumulation_steps / seconds
        left = _duration(seconds * (state.max_steps - state.global_step))
        self._say(
            f"Epoch {state.epoch or 0.0:g} of {state.num_train_epochs}: loss {loss:.4g}, {images:.3g} images/s, "
            f"{left} left{_peak(args.device)}"
        )

    def _say(self, line: str) -> None:
        if shows_progress():
            tqdm.write(line, file=sys.stderr)

    def _say_once(self, line: str) -> None:
        """Experiments train many times in the same way."""
        if line not in _said:
            _said.add(line)
            self._say(line)


def _duration(seconds: float) -> str:
    """A time as people say it.

    Args:
        seconds: Length.
    """
    minutes, rest = divmod(round(seconds), 60)
    hours, minutes = divmod(minutes, 60)
    if hours:
        return f"{hours} h {minutes:02d} min"
    return f"{minutes} min {rest:02d} s" if minutes else f"{rest} s"


def _peak(device: torch.device) -> str:
    """The peak memory of this process as the end of a sentence; empty where the system does not say."""
    if device.type == "cuda":
        return f", peak memory {torch.cuda.max_memory_allocated(device) / 2**30:.2f} GB"
    try:
        import resource
    except ImportError:  # Windows
        return ""
    unit = 1 if sys.platform == "darwin" else 1024
    return f", peak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 2**30:.2f} GB"


class OneBar(ProgressCallback):
    """One bar with the time left and the loss, and a line per validation, in place of a dictionary per step."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Show the loss at the end of the bar.

        Args:
            args: Settings of the run.
            state: State of the trainer.
            control: Not used.
            logs: What is logged.
            **kwargs: Not used.
        """
        if self.training_bar is not None and logs and "loss" in logs:
            self.training_bar.set_postfix_str(f"loss {logs['loss']:.4g}")

    def on_evaluate(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        metrics: dict[str, float] | None = None,
        **kwargs: Any,
    ) -> None:
        """Print the scores of a validation; remove its bar.

        Args:
            args: Settings of the run.
            state: State of the trainer.
            control: Not used.
            metrics: What was measured.
            **kwargs: Not used.
        """
        super().on_evaluate(args, state, control, **kwargs)
        scores = {key.removeprefix("eval_"): value for key, value in (metrics or {}).items()}
        parts = [f"accuracy {scores['accuracy']:.2f} %"] if "accuracy" in scores else []
        parts += [f"loss {scores['loss']:.4g}"] if "loss" in scores else []
        if state.is_world_process_zero and parts:
            tqdm.write(f"  validation: {', '.join(parts)}", file=sys.stderr)
