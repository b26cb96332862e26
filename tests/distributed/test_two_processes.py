"""Two processes on one machine train what one process trains."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from tests import forked
from tests.short_run import RUNS, train

#: BatchNorm's running statistics: each process keeps those of its own batches, and the first one's are saved.
STATISTICS = ("running_mean", "running_var", "num_batches_tracked")


def train_all(folder: str, **arguments) -> None:
    """Train every method, one after the other."""
    for method in RUNS:
        train(Path(folder) / method, method, save_strategy="no", per_device_train_batch_size=2, **arguments)


@pytest.fixture(scope="module")
def folders(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Runs of all methods in one process with two batches per step, and in two with one each."""
    one, two = tmp_path_factory.mktemp("one"), tmp_path_factory.mktemp("two")
    forked.run(one / "log.txt", train_all, str(one), gradient_accumulation_steps=2)
    forked.run_group(two, train_all, str(two))
    return one, two


@pytest.mark.parametrize("method", RUNS)
def test_two_processes_train_what_one_with_accumulation_trains(folders: tuple[Path, Path], method: str) -> None:
    """A call past the wrapped module skips gradient averaging: each process would train a model of its own.

    Averaging twice, or summing, would change the learning rate. Both runs see the same pairs of batches per step.
    """
    one, first, second = (
        {key: tensor for key, tensor in load_file(path).items() if not key.endswith(STATISTICS)}
        for path in (
            folders[0] / method / "final-0.safetensors",
            folders[1] / method / "final-0.safetensors",
            folders[1] / method / "final-1.safetensors",
        )
    )
    assert len(first) >= 1
    assert all(torch.equal(first[key], second[key]) for key in first)
    # the same float32 sums in another order, over 12 steps
    torch.testing.assert_close(first, one, rtol=1e-4, atol=1e-5)


def agreements(folder: Path) -> list[float]:
    """Agreement of student and teacher as logged after each epoch."""
    history = json.loads((folder / "promptkd" / "metrics.json").read_text())["history"]
    return [entry["agreement_seen"] for entry in history if "agreement_seen" in entry]


def test_agreement_counts_the_images_of_all_processes(folders: tuple[Path, Path]) -> None:
    """The first process alone has seen half of the images, and nothing in the log would say so."""
    assert len(agreements(folders[0])) == 2
    assert agreements(folders[0]) == agreements(folders[1])
