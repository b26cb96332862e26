"""What every test relies on: no model hub, no progress bars, fixed seeds, one thread for each of several workers."""

import gc
import os

import tests.hub.environment  # noqa: F401 - before the hub libraries, which read their settings on import

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

import pytest
import torch
from accelerate.state import GradientState
from transformers import set_seed


def pytest_configure() -> None:
    """The threads of a worker, should a plugin have imported torch first."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_finish() -> None:
    """What was imported stays: leave it out of every garbage collection, of which trainers make many."""
    gc.collect()
    gc.freeze()


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, without what earlier trainers left in Accelerate, and all is said
    again that a process says once.
    """
    set_seed(0)
    GradientState._reset_state()
    from peft_vlm.serving.images import log_once  # later than this file, which is read before shapes are checked

    log_once.cache_clear()
