"""The folder of a run: one run at a time, results all or none, and found unusable before the first step."""

import json
import os
import random
import shutil
import signal
import sys
import time
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from transformers import TrainerCallback

from peft_vlm.errors import CheckpointError
from peft_vlm.files import LOCK_NAME, locked_folder
from tests import forked
from tests.short_run import MEMORY, RUNS, train

pytestmark = pytest.mark.plots

RESULTS = {"adapter_config.json", "adapter_model.safetensors", "metrics.json", "training_summary.json", "README.md"}
RESULTS |= {"training_curve.png"}


class Waits(TrainerCallback):
    """Says that a run is under way, and stays in its first step."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Wait for longer than a test takes."""
        Path(args.output_dir, "under_way").touch()
        time.sleep(300)


def train_and_wait(folder: str) -> None:
    """A run that does not end by itself."""
    train(folder, "coop", callbacks=(Waits(),), dataloader_num_workers=1, settings={"image_cache": "none"})


def test_two_runs_in_one_folder_are_refused_until_the_first_is_gone(tmp_path: Path) -> None:
    """They would replace each other's checkpoints; a killed one must not keep the folder."""
    log = tmp_path / "log.txt"
    process = forked.start(log, train_and_wait, str(tmp_path / "run"))
    for _ in range(600):
        time.sleep(0.1)
        if (tmp_path / "run" / "under_way").exists():
            break
    held = rf"got another run in it: 'process {process.pid} on .*'. Wait for it to end, stop it, or choose another"
    before = {path.name for path in (tmp_path / "run").iterdir()}
    with pytest.raises(CheckpointError, match=held):
        train(tmp_path / "run", "coop", max_steps=1)
    assert before == {path.name for path in (tmp_path / "run").iterdir()}
    process.kill()
    process.join()
    assert (tmp_path / "run" / LOCK_NAME).exists(), "nobody could remove it"
    train(tmp_path / "run", "coop", max_steps=1)
    assert not (tmp_path / "run" / LOCK_NAME).exists()


def test_a_run_that_fails_gives_its_folder_back(tmp_path: Path) -> None:
    """A notebook goes on in the same process."""

    def fail(model: Any, objective: Any, dataset: Any) -> None:
        objective.epoch_start = lambda *arguments: 1 / 0

    with pytest.raises(ZeroDivisionError):
        train(tmp_path, "coop", max_steps=1, change=fail)
    train(tmp_path, "coop", max_steps=1)


def test_a_strangers_lock_file_is_no_lock(tmp_path: Path) -> None:
    """A copied folder, or one from another machine, holds the file of a run that is not there."""
    (tmp_path / LOCK_NAME).write_text("process 1 on nowhere\x1b[2J")
    with locked_folder(tmp_path, is_main=True, tell=lambda value: value):
        with pytest.raises(CheckpointError) as caught, locked_folder(tmp_path, is_main=True, tell=lambda value: value):
            pass
        (tmp_path / LOCK_NAME).write_text("process 1\nof\x1b[2J " + "x" * 10_000)
        with (
            pytest.raises(CheckpointError) as strange,
            locked_folder(tmp_path, is_main=True, tell=lambda value: value),
        ):
            pass
    assert f"process {os.getpid()} on " in str(caught.value)
    assert str(strange.value).isprintable()
    assert len(str(strange.value)) < 1000


class Steps(TrainerCallback):
    """Fails when a step is made."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Too late."""
        pytest.fail("a step was made")


@pytest.mark.parametrize("place", ["file/run", "/proc/run", "read_only"])
def test_a_folder_that_cannot_be_written_to_is_found_before_the_first_step(tmp_path: Path, place: str) -> None:
    """Hours later, the first checkpoint would find it."""
    (tmp_path / "file").write_text("no folder")
    folder = Path(place) if place.startswith("/") else tmp_path / place
    if place == "/proc/run" and not Path("/proc/self").exists():
        pytest.skip("this system has no /proc")
    if place == "read_only":
        folder.mkdir()
        if os.geteuid() == 0 and os.system(f"mount -t tmpfs -o ro,size=1m tmpfs {folder} 2>/dev/null"):
            pytest.skip("root writes everywhere, and may mount nothing here")
        folder.chmod(0o500) if os.geteuid() else None
    try:
        with pytest.raises(
            CheckpointError, match=r"^Expected to write to '.*', got .*Error: .*another `output_dir`\.$"
        ):
            train(folder, "coop", max_steps=1, callbacks=(Steps(),))
    finally:
        if place == "read_only" and os.geteuid() == 0:
            os.system(f"umount {folder}")


@pytest.mark.parametrize("name", ["training_curve.png", "README.md", "metrics.json"])
def test_results_that_are_not_all_there_are_written_on_a_resume(tmp_path: Path, name: str) -> None:
    """The run would call itself finished, and the card would stay PEFT's stub."""
    train(tmp_path, "coop", max_steps=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    (tmp_path / name).unlink()
    train(tmp_path, "coop", max_steps=2, resume="auto")
    assert before.keys() == {path.name for path in tmp_path.iterdir() if path.is_file()}
    assert (tmp_path / name).stat().st_size > 100


def test_a_finished_run_that_was_killed_while_it_cleaned_up_is_clean_after_a_resume(tmp_path: Path) -> None:
    """What it had written into stays empty beside its results for ever."""
    train(tmp_path, "coop", max_steps=2)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    (tmp_path / ".partial" / "default").mkdir(parents=True)
    train(tmp_path, "coop", max_steps=2, resume="auto")
    assert not (tmp_path / ".partial").exists()
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}


def full_disk_at(folder: str, name: str) -> None:
    """Train where one of the last files cannot be written."""

    def watch(event: str, arguments: tuple) -> None:
        if event == "open" and ".partial" in str(arguments[0]) and name in str(arguments[0]):
            if "checkpoint-" not in str(arguments[0]):
                raise OSError(28, os.strerror(28), str(arguments[0]))

    sys.addaudithook(watch)
    train(folder, "coop", max_steps=2)


@pytest.mark.parametrize("name", ["metrics.json", "training_summary.json", "training_curve.png", "README.md"])
def test_a_full_disk_at_the_last_files_gives_the_same_advice(tmp_path: Path, name: str) -> None:
    """A traceback of the plotting library says nothing of the disk, and half of the results would stay."""
    log = tmp_path / "log.txt"
    assert forked.wait(forked.start(log, full_disk_at, str(tmp_path / "run"), name), log) == 1
    assert "Free some room, lower `save_total_limit`, or save less often, and go on with" in log.read_text()
    assert {path.name for path in (tmp_path / "run").iterdir()} == {"checkpoint-2"}
    trainer = train(tmp_path / "run", "coop", max_steps=2, resume="auto")
    assert trainer.first_step == 2
    assert {path.name for path in (tmp_path / "run").iterdir()} >= RESULTS


def at_the_end(folder: str, method: str, kill: int | None, count: str | None = None) -> None:
    """Train from the newest checkpoint, and kill this process at its n-th file operation after the last one."""
    done = [0]

    def watch(event: str, arguments: tuple) -> None:
        if event in ("open", "os.rename", "os.remove", "os.mkdir", "os.rmdir", "shutil.rmtree"):
            path = str(arguments[0])
            if path.startswith(folder) and "checkpoint-" not in path and LOCK_NAME not in path:
                done[0] += 1
                if done[0] == kill:
                    os.kill(os.getpid(), signal.SIGKILL)

    class Ends(TrainerCallback):
        """Counts from the end of the training on."""

        def on_train_end(self, args, state, control, **kwargs) -> None:
            sys.addaudithook(watch)

    train(folder, method, resume="auto", settings=MEMORY.get(method), callbacks=(Ends(),), max_steps=2)
    if count is not None:
        Path(count).write_text(str(done[0]))


@pytest.mark.slow
@pytest.mark.parametrize("method", RUNS)
def test_a_run_that_is_killed_in_its_last_files_is_completed(tmp_path: Path, method: str) -> None:
    """Twenty SIGKILLs between the last checkpoint and the last file; a resume ends with all that belongs to a run."""
    straight, log, count = tmp_path / "straight", tmp_path / "log.txt", tmp_path / "count"
    forked.run(log, at_the_end, str(straight), method, None, str(count))
    operations = int(count.read_text())
    assert operations >= 20
    kills = sorted(random.Random(method).sample(range(1, operations), 20))
    expected = load_file(straight / "final-0.safetensors")
    begun, names = tmp_path / "begun", {path.name for path in straight.iterdir()}
    code = forked.wait(forked.start(log, at_the_end, str(begun), method, 1), log)
    assert code == -signal.SIGKILL
    for kill in kills:
        folder = shutil.copytree(begun, tmp_path / "killed")
        code = forked.wait(forked.start(log, at_the_end, str(folder), method, kill), log)
        assert code == -signal.SIGKILL, f"operation {kill}: {code}\n{log.read_text()[-3000:]}"
        forked.run(log, at_the_end, str(folder), method, None)
        assert {path.name for path in folder.iterdir()} == names, kill
        tensors = load_file(folder / "final-0.safetensors")
        assert all(torch.equal(tensors[key], expected[key]) for key in expected), kill
        assert results(folder) == results(straight), kill
        shutil.rmtree(folder)


def results(folder: Path) -> tuple[Any, ...]:
    """Losses, number of steps and card of a run, without its place and the mean loss of its last start."""
    history = json.loads((folder / "metrics.json").read_text())["history"]
    losses = [entry["loss"] for entry in history if "loss" in entry]
    lines = (folder / "README.md").read_text().replace(folder.name, "").splitlines()
    card = [line for line in lines if "train_loss" not in line]
    return losses, json.loads((folder / "training_summary.json").read_text())["steps"], card
