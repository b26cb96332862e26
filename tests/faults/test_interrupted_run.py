"""A training that is killed goes on where it was, and a damaged checkpoint is refused instead of half loaded."""

import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cases import CASES
from tests.source_tree import ROOT

METHODS = [case.method for case in CASES]


def command(folder: Path, *options: str, method: str) -> list[str]:
    """The short training of a method."""
    return [sys.executable, "-m", "tests.short_run", str(folder), "--method", method, *options]


def finish(folder: Path, *options: str, method: str) -> dict[str, torch.Tensor]:
    """Run to the end; the final tensors."""
    result = subprocess.run(command(folder, *options, method=method), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return load_file(folder / "final-0.safetensors")


def kill_after(folder: Path, *, checkpoint: str, method: str) -> None:
    """Start the training and kill it, without a chance to clean up, once a checkpoint is there."""
    process = subprocess.Popen(
        command(folder, "--pause", "0.5", method=method), cwd=ROOT, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE
    )
    try:
        deadline = time.monotonic() + 120
        while not (folder / checkpoint / "trainer_state.json").is_file():
            assert process.poll() is None, process.stderr.read().decode() if process.stderr else ""
            assert time.monotonic() < deadline, f"no {checkpoint} within two minutes"
            time.sleep(0.05)
    finally:
        os.kill(process.pid, signal.SIGKILL)
        process.communicate()


@pytest.fixture(scope="module", params=METHODS)
def killed(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, str]:
    """Folder of a run that was killed after its second checkpoint, and the method; tests work on copies."""
    assert len(METHODS) >= 1
    folder = tmp_path_factory.mktemp("killed")
    kill_after(folder, checkpoint="checkpoint-4", method=request.param)
    assert not (folder / "final-0.safetensors").exists()
    return folder, request.param


def test_a_killed_run_resumes_to_the_same_tensors(tmp_path: Path, killed: tuple[Path, str]) -> None:
    """A resume that restarts the schedule, the momentum or the batch order ends elsewhere, and nobody notices."""
    folder, method = killed
    shutil.copytree(folder, tmp_path / "resumed")
    resumed = finish(tmp_path / "resumed", "--resume", method=method)
    straight = finish(tmp_path / "straight", method=method)
    assert len(straight) >= 1
    assert resumed.keys() == straight.keys()
    assert all(torch.equal(resumed[key], straight[key]) for key in straight)


def test_a_truncated_checkpoint_is_refused(tmp_path: Path, killed: tuple[Path, str]) -> None:
    """A copy that was cut off must not be resumed with whatever could be read."""
    folder, method = killed
    shutil.copytree(folder, tmp_path, dirs_exist_ok=True)
    weights = sorted(tmp_path.glob("checkpoint-*/adapter_model.safetensors"))
    assert len(weights) >= 2
    for path in weights:
        path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])
    result = subprocess.run(command(tmp_path, "--resume", method=method), cwd=ROOT, capture_output=True, text=True)
    assert result.returncode != 0
    assert "cut off or damaged" in result.stderr, result.stderr
