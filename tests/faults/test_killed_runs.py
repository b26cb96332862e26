"""A training that is killed again and again goes on where it was and ends with the same tensors."""

import json
import os
import random
import signal
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from tests import forked
from tests.short_run import MEMORY, QUESTION_RUNS, RUNS, train

SIGKILLED = -signal.SIGKILL


class KillAtStep(TrainerCallback):
    """Kills its own process without a chance to clean up, before or after a step counted from where the leg begins."""

    def __init__(self, steps: int, *, before: bool) -> None:
        self.steps, self.before = steps, before

    def on_train_begin(self, args, state, control, **kwargs) -> None:
        """The step at which it ends."""
        self.last = state.global_step + self.steps

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Within a step, before the optimizer."""
        if self.before and state.global_step + 1 >= self.last:
            os.kill(os.getpid(), signal.SIGKILL)

    def on_step_end(self, args, state, control, **kwargs) -> None:
        """After a step, before its checkpoint."""
        if not self.before and state.global_step >= self.last:
            os.kill(os.getpid(), signal.SIGKILL)


def kill_at_file_operation(number: int) -> None:
    """Kill this process when it opens, renames or removes a file of a checkpoint for the n-th time."""
    left = [number]

    def watch(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            if "checkpoint-" in str(arguments[0]):
                left[0] -= 1
                if not left[0]:
                    os.kill(os.getpid(), signal.SIGKILL)

    sys.addaudithook(watch)


def leg(folder: str, method: str, epochs: int, kill: tuple[str, int] | None) -> None:
    """A part of the run, from the newest checkpoint to where it is killed."""
    callbacks: tuple[TrainerCallback, ...] = ()
    if kill is not None and kill[0] == "file":
        kill_at_file_operation(kill[1])
    elif kill is not None:
        callbacks = (KillAtStep(kill[1], before=kill[0] == "before"),)
    data = {"augmented": method not in QUESTION_RUNS}
    options = {"settings": MEMORY.get(method), "data": data, "callbacks": callbacks, "save_total_limit": 3}
    train(folder, method, resume="auto", num_train_epochs=epochs, **options)


def chain(tmp_path: Path, method: str, *, kills: int, epochs: int) -> None:
    """A run that is killed at seeded random moments, and one that is not."""
    rng, folder, log = random.Random(f"{method}{kills}"), tmp_path / "killed", tmp_path / "log.txt"
    folder.mkdir()
    for number in range(kills):
        kind = ("file", "before", "after")[number % 3]
        kill = (kind, rng.randint(1, 40) if kind == "file" else rng.randint(1, 3))
        code = forked.wait(forked.start(log, leg, str(folder), method, epochs, kill), log)
        assert code == SIGKILLED, f"leg {number} with {kill}: {code}\n{log.read_text()[-3000:]}"
    assert not (folder / "final-0.safetensors").exists()
    forked.run(log, leg, str(folder), method, epochs, None)
    forked.run(log, leg, str(tmp_path / "straight"), method, epochs, None)
    killed, straight = (load_file(tmp_path / name / "final-0.safetensors") for name in ("killed", "straight"))
    assert len(straight) >= 1
    assert killed.keys() == straight.keys()
    assert all(torch.equal(killed[key], straight[key]) for key in straight)
    assert losses(folder) == losses(tmp_path / "straight")
    assert not list(folder.glob(".*"))  # nothing half-written is left


def losses(folder: Path) -> list[dict[str, float]]:
    """Loss of every step, and what the objective says of every epoch."""
    history = json.loads((folder / "metrics.json").read_text())["history"]
    timeless = {"grad_norm", "learning_rate"}
    return [
        {key: value for key, value in entry.items() if key not in timeless and "runtime" not in key}
        for entry in history
        if "train_runtime" not in entry
    ]


@pytest.mark.parametrize("method", RUNS)
def test_a_run_that_is_killed_three_times_ends_with_the_same_tensors(tmp_path: Path, method: str) -> None:
    """A resume that restarts schedule, momentum, batch order, augmentation or a draw ends elsewhere, unnoticed."""
    assert len(RUNS) >= 7
    chain(tmp_path, method, kills=3, epochs=2 if method not in QUESTION_RUNS else 3)


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_a_run_that_is_killed_twenty_times_ends_with_the_same_tensors(tmp_path: Path, method: str) -> None:
    """Twenty-four kills at other moments, every third of them while a checkpoint is written or removed."""
    chain(tmp_path, method, kills=24, epochs=12 if method not in QUESTION_RUNS else 24)
