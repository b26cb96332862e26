"""Two processes on one machine train what one process trains."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests.cases import CASES
from tests.source_tree import ROOT

METHODS = [case.method for case in CASES]
#: BatchNorm's running statistics: each process keeps those of its own batches, and the first one's are saved.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def run(module: str, folder: Path, *options: str, processes: int, accumulation: int) -> list[dict[str, torch.Tensor]]:
    """Run a training in one or more processes (gloo, CPU); the final tensors of each process."""
    launcher = ["torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", "-m"]
    command = [sys.executable, "-m", *(launcher if processes > 1 else []), module, str(folder), *options]
    command += ["--accumulation", str(accumulation)]
    environment = os.environ | {"OMP_NUM_THREADS": "1"}
    result = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    return [load_file(folder / f"final-{rank}.safetensors") for rank in range(processes)]


def train(folder: Path, *, method: str, processes: int, accumulation: int) -> list[dict[str, torch.Tensor]]:
    """Train a method with batches of two in one or more processes."""
    options = ("--method", method, "--batch-size", "2")
    finals = run("tests.short_run", folder, *options, processes=processes, accumulation=accumulation)
    return [{key: tensor for key, tensor in final.items() if not key.endswith(STATISTICS)} for final in finals]


@pytest.mark.parametrize("method", METHODS)
def test_two_processes_train_what_one_with_accumulation_trains(tmp_path: Path, method: str) -> None:
    """A call past the wrapped module skips gradient averaging: each process would train a model of its own.

    Averaging twice, or summing, would change the learning rate. Both runs see the same pairs of batches per step.
    """
    assert len(METHODS) >= 1
    first, second = train(tmp_path / "two", method=method, processes=2, accumulation=1)
    assert len(first) >= 1
    assert all(torch.equal(first[key], second[key]) for key in first)
    (one,) = train(tmp_path / "one", method=method, processes=1, accumulation=2)
    # the same float32 sums in another order, over 12 steps of SGD
    torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-6)


def agreements(folder: Path) -> list[float]:
    """Agreement of student and teacher as logged after each epoch."""
    history = json.loads((folder / "metrics.json").read_text())["history"]
    return [entry["agreement_seen"] for entry in history if "agreement_seen" in entry]


def test_agreement_counts_the_images_of_all_processes(tmp_path: Path) -> None:
    """The first process alone has seen half of the images, and nothing in the log would say so."""
    train(tmp_path / "two", method="promptkd", processes=2, accumulation=1)
    train(tmp_path / "one", method="promptkd", processes=1, accumulation=2)
    assert len(agreements(tmp_path / "one")) == 2
    assert agreements(tmp_path / "two") == agreements(tmp_path / "one")


def test_two_processes_train_one_pixel_prompt(tmp_path: Path) -> None:
    """Normalising the gradient of each process before averaging would let a process with a weak one count as much."""
    first, second = run("tests.short_question_run", tmp_path / "two", processes=2, accumulation=1)
    assert torch.equal(first["prompt"], second["prompt"])
    (one,) = run("tests.short_question_run", tmp_path / "one", processes=1, accumulation=2)
    assert one["prompt"].abs().max() > 0.05
    # the same float32 sums in another order, normalised, over 6 steps
    torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-5)
