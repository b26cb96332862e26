"""What every test relies on: no model hub, no progress bars, fixed seeds, one thread for each of several workers."""

import gc
import os
import sys
from collections.abc import Iterator
from contextlib import ExitStack
from functools import cache
from unittest.mock import patch

import tests.hub.environment  # noqa: F401 - before the hub libraries, which read their settings on import
import tests.shape_checks  # noqa: F401 - before the package, whose functions are wrapped on import

os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")
os.environ.setdefault("MPLBACKEND", "Agg")
if "PYTEST_XDIST_WORKER" in os.environ:
    os.environ.setdefault("OMP_NUM_THREADS", "1")  # before torch is imported, and for the processes that tests start

import jinja2
import pytest
import torch
from accelerate.state import GradientState
from transformers import set_seed

# No computer is switched off in a test, and disks take milliseconds for each file that is to outlast that.
os.fsync = lambda descriptor: None
# PEFT writes a card beside every adapter and compiles the same template for each of them.
jinja2.Environment.compile = cache(jinja2.Environment.compile)


def pytest_configure() -> None:
    """The threads of a worker, should a plugin have imported torch first."""
    if "PYTEST_XDIST_WORKER" in os.environ:
        torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))


def pytest_collection_finish() -> None:
    """What was imported stays: leave it out of every garbage collection, of which trainers make many."""
    gc.collect()
    gc.freeze()


@pytest.hookimpl(trylast=True)
def pytest_runtest_teardown(item: pytest.Item, nextitem: pytest.Item | None) -> None:
    """The same at the end of each file, for what its tests have imported and cached; a collection took ever longer."""
    if nextitem is None or nextitem.path != item.path:
        gc.collect()
        gc.freeze()


@pytest.hookimpl(wrapper=True)
def pytest_runtest_protocol(item: pytest.Item) -> Iterator[None]:
    """Train and evaluate as if matplotlib were not installed: plots take a third of a short run.

    Tests that look at the plots say so, by the marker `plots`.
    """
    users = [sys.modules.get(f"peft_vlm.{name}") for name in ("training.reports", "experiments.run")]
    if item.get_closest_marker("plots") is not None:
        return (yield)
    with ExitStack() as stack:
        for module in filter(None, users):
            stack.enter_context(patch.object(module, "has_matplotlib", return_value=False))
        return (yield)


@pytest.fixture(autouse=True)
def _seeded() -> None:
    """Every test starts from the same random state, without what earlier trainers left in Accelerate, and all is said
    again that a process says once.
    """
    set_seed(0)
    GradientState._reset_state()
    from peft_vlm.serving.images import log_once  # later than this file, which is read before shapes are checked

    log_once.cache_clear()
