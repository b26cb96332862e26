"""Two processes with batches of N train what one process trains with batches of 2N, for every method.

With DDP each process has the whole model; with FSDP the frozen layers are divided among them.
"""

import json
import math
import tempfile
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from torch.distributed.tensor import DTensor
from torch.testing import assert_close

from peft_vlm.distributed import process_index
from peft_vlm.models.towers import unwrap
from peft_vlm.training import checkpoints, reports
from peft_vlm.training import trainer as trainer_module
from tests import forked
from tests.short_run import MEMORY, QUESTION_RUNS, RUNS, train

#: Runs beside the plain ones: the method, settings of its objective.
FURTHER: dict[str, tuple[str, dict[str, Any]]] = {
    "coop without cache": ("coop", {"image_cache": "none"}),
    "promptsrc without cache": ("promptsrc", {"image_cache": "none"}),
    "skip_tuning on disk": ("skip_tuning", {"image_cache": "disk"}),
    "skip_tuning without cache": ("skip_tuning", {"image_cache": "none"}),
    "promptkd without cache": ("promptkd", {}),
    "rpp in chunks": ("rpp", {"text_chunk_size": 1}),  # which classes, and so how many, differs between processes
    "skip_tuning in chunks without cache": ("skip_tuning", {"image_cache": "none", "cache_batch_size": 3}),
    "promptkd official": ("promptkd", {"reduction": "official", "align_steps": 4, "teacher_cache": "views"}),
}
ALL: dict[str, tuple[str, dict[str, Any]]] = {method: (method, MEMORY.get(method, {})) for method in RUNS} | FURTHER


class Watch:
    """Counts the images and texts that a model's towers encode without gradients, as caches do."""

    def __init__(self) -> None:
        self.counts = {"images": 0, "texts": 0}

    def __call__(self, model: torch.nn.Module, objective: Any, dataset: Any) -> None:
        """Watch a model."""
        for name, module in unwrap(model).named_modules():
            if name.endswith(("vision_model.embeddings", "vision_tower.embeddings")):
                module.register_forward_hook(self.count("images"))
            if name.endswith("text_model.embeddings"):
                module.register_forward_hook(self.count("texts"))

    def count(self, what: str):
        """A hook."""

        def hook(module: Any, inputs: Any, output: torch.Tensor) -> None:
            if not torch.is_grad_enabled():
                self.counts[what] += len(output)

        return hook


def train_all(folder: str, batch_size: int, **arguments: Any) -> None:
    """Train every method, one after the other, then evaluate on 13 images where it has classes.

    In steps of 8, 17 images leave one for the last step, fewer than processes; 23 leave seven, which divide unevenly.
    """
    writers: list[str] = []
    note_writers(writers)
    for number, (name, (method, settings)) in enumerate(ALL.items()):
        place, watch = Path(folder) / name, Watch()
        options = {"settings": None if method in QUESTION_RUNS else settings, "data": {"count": (17, 23)[number % 2]}}
        arguments |= {"save_strategy": "no", "per_device_train_batch_size": batch_size}
        trainer = train(place, method, change=watch, **options, **arguments)
        rank = trainer.args.process_index
        frozen = [p for p in trainer.model.parameters() if not p.requires_grad]
        facts = {"frozen": len(frozen), "divided": sum(isinstance(p, DTensor) for p in frozen)}
        (place / f"sharding-{rank}.json").write_text(json.dumps(facts))
        (place / f"counts-{rank}.json").write_text(json.dumps(watch.counts))
        if method not in QUESTION_RUNS:
            trainer.eval_dataset = trainer.train_dataset.select(range(13))
            trainer.args.per_device_eval_batch_size = 4
            (place / f"evaluation-{rank}.json").write_text(json.dumps(trainer.evaluate()))
    Path(folder, f"writers-{process_index()}.json").write_text(json.dumps(writers))


WRITERS = ("write_json", "save_weights", "save_objective_state", "training_curve_png", "write_card")


def note_writers(writers: list[str]) -> None:
    """Keep the names of functions that write files, with the process that called them."""
    for module in (reports, checkpoints, trainer_module):
        for name in WRITERS:
            if hasattr(module, name):
                setattr(module, name, noting(getattr(module, name), name, writers))


def noting(function: Any, name: str, calls: list[str]) -> Any:
    """The function, which notes its calls."""

    def called(*args: Any, **kwargs: Any) -> Any:
        calls.append(name)
        return function(*args, **kwargs)

    return called


@pytest.fixture(scope="module")
def one_process(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Runs of all methods in one process with batches of 8."""
    folder = tmp_path_factory.mktemp("one")
    forked.run(folder / "log.txt", train_all, str(folder), 8)
    return folder


@pytest.fixture(scope="module", params=["ddp", "fsdp"])
def folders(
    request: pytest.FixtureRequest, one_process: Path, tmp_path_factory: pytest.TempPathFactory
) -> tuple[Path, Path]:
    """The same runs in two processes with batches of 4."""
    two = tmp_path_factory.mktemp(request.param)
    forked.run_group(two, train_all, str(two), 4, **({"fsdp": True} if request.param == "fsdp" else {}))
    return one_process, two


def history(folder: Path) -> list[dict[str, float]]:
    """Loss, terms and accuracy of every step, and what is logged of every epoch."""
    entries = json.loads((folder / "metrics.json").read_text())["history"]
    kept = ("loss", "accuracy", "agreement", "epoch", "step")
    return [
        {key: value for key, value in entry.items() if key.startswith(kept)}
        for entry in entries
        if "train_runtime" not in entry
    ]


def test_final_tensors_are_those_of_one_process(folders: tuple[Path, Path]) -> None:
    """A call past the wrapped module skips gradient averaging; a mean of means weighs images of a last batch more.

    BatchNorm's statistics and CSkip's choice of classes are those of the whole batch, in one process or two.
    """
    one, two = folders
    assert len(ALL) >= 13
    for name in ALL:
        expected = load_file(one / name / "final-0.safetensors")
        first, second = (load_file(two / name / f"final-{rank}.safetensors") for rank in (0, 1))
        assert len(expected) >= 1
        assert all(torch.equal(first[key], second[key]) for key in first), name
        # the same float32 sums in another order, over 6 steps
        assert_close(first, expected, rtol=1e-3, atol=2e-5, msg=lambda text, name=name: f"{name}: {text}")


def test_losses_and_training_metrics_are_those_of_one_process(folders: tuple[Path, Path]) -> None:
    """The log of the first process alone would show half of the images; its epochs must be as long, too."""
    one, two = folders
    for name in ALL:
        expected, actual = history(one / name), history(two / name)
        assert len(expected) >= 4
        assert [entry.keys() for entry in actual] == [entry.keys() for entry in expected], name
        for entry, other in zip(expected, actual, strict=True):
            for key, value in entry.items():
                assert math.isclose(other[key], value, rel_tol=2e-3, abs_tol=2e-5), (name, key, other, entry)


def test_validation_metrics_are_exact_on_an_uneven_last_batch(folders: tuple[Path, Path]) -> None:
    """13 images in batches of 4: two processes fill up to 16, and counting the fillers moves the mean."""
    one, two = folders
    names = [name for name, (method, _) in ALL.items() if method not in QUESTION_RUNS]
    assert len(names) >= 11
    for name in names:
        expected = json.loads((one / name / "evaluation-0.json").read_text())
        for rank in (0, 1):
            actual = json.loads((two / name / f"evaluation-{rank}.json").read_text())
            assert actual["eval_accuracy"] == expected["eval_accuracy"], name
            assert actual["eval_loss"] == pytest.approx(expected["eval_loss"], rel=1e-4), name


def test_caches_are_built_once_and_divided(folders: tuple[Path, Path]) -> None:
    """Each process building all of a cache would cost as many times the work and the memory."""
    one, two = folders
    compared = 0
    for name in ALL:
        expected = json.loads((one / name / "counts-0.json").read_text())
        parts = [json.loads((two / name / f"counts-{rank}.json").read_text()) for rank in (0, 1)]
        checked_rows = 3 if ALL[name][0] in QUESTION_RUNS else 0  # each process tries the first row
        stores_nothing = name.endswith("without cache") or ALL[name][0] == "tvp"
        fillers = 2 if stores_nothing else 0  # one per epoch, where a step has one image
        for what, count in expected.items():
            total = sum(part[what] for part in parts)
            assert count <= total <= count + 2 * checked_rows + fillers, (name, what, parts, expected)
            compared += count > 0
    assert compared >= 8


def test_the_frozen_layers_are_divided_under_fsdp(folders: tuple[Path, Path], request: pytest.FixtureRequest) -> None:
    """A run that divides nothing has the right losses, too."""
    is_fsdp = "fsdp" in request.node.callspec.id
    for name in ALL:
        for rank in (0, 1):
            found = json.loads((folders[1] / name / f"sharding-{rank}.json").read_text())
            assert (found["divided"] > 0.5 * found["frozen"]) == is_fsdp, (name, found)


def test_only_one_process_writes(folders: tuple[Path, Path]) -> None:
    """Two writers of one file leave half of each."""
    one, two = folders
    alone, main, other = (
        json.loads((folder / f"writers-{rank}.json").read_text()) for folder, rank in ((one, 0), (two, 0), (two, 1))
    )
    assert set(alone) >= {"write_json", "save_weights", "write_card"}
    assert main == alone
    assert other == []
    for name in ALL:
        own = {path.name for path in (one / name).rglob("*")}
        others = {path.name for path in (two / name).rglob("*") if not path.stem.endswith("-1")}
        assert own == others, name
        assert not list(Path("/dev/shm").glob("peft_vlm_cache_*"))


def print_differences() -> None:
    """Print the largest differences of losses and final tensors from one process, with whole and divided layers."""
    with tempfile.TemporaryDirectory() as folder:
        places = [Path(folder, name) for name in ("one", "ddp", "fsdp")]
        for place in places:
            place.mkdir()
        forked.run(places[0] / "log.txt", train_all, str(places[0]), 8)
        forked.run_group(places[1], train_all, str(places[1]), 4)
        forked.run_group(places[2], train_all, str(places[2]), 4, fsdp=True)
        print(
            "| run | tensors divided | loss, DDP | loss, FSDP | final tensor, DDP | final tensor, FSDP |\n"
            + "|---" * 6
            + "|"
        )
        for name in ALL:
            steps = [[e["loss"] for e in history(place / name) if "loss" in e] for place in places]
            finals = [load_file(place / name / "final-0.safetensors") for place in places]
            losses = [max(abs(a - b) for a, b in zip(steps[0], other, strict=True)) for other in steps[1:]]
            tensors = [max((finals[0][key] - other[key]).abs().max().item() for key in other) for other in finals[1:]]
            facts = json.loads((places[2] / name / "sharding-0.json").read_text())
            print(f"| {name} | {facts['divided']} of {facts['frozen']} |", *(f"{v:.0e} |" for v in losses + tensors))


if __name__ == "__main__":
    print_differences()
