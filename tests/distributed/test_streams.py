"""A stream in two processes: every image once, whole epochs on both, exact resume in mid-epoch."""

import json
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file

from peft_vlm import RPPObjective, VLMTrainer, VLMTrainingArguments
from tests import forked
from tests.cases import base_model, class_prompts, rpp_config
from tests.tiny_streams import stream, write_shards


def train_on_stream(folder: str, shards: str, resume: str | None = None) -> None:
    """Two epochs on 24 images, a checkpoint in the middle of each; the images of every step go to a file."""
    torch.set_num_threads(1)
    torch.manual_seed(1)
    images = stream(shards)
    own = {"num_train_epochs": 2, "save_strategy": "steps", "save_steps": 2, "save_total_limit": None}
    own |= {"use_cpu": True, "per_device_train_batch_size": 3, "disable_tqdm": True, "learning_rate": 0.1}
    args = VLMTrainingArguments(output_dir=folder, report_to="none", **own)
    seen: list[list[int]] = []

    class Watched(RPPObjective):
        """The objective, which notes what it gets."""

        def __call__(self, model: Any, batch: Any) -> Any:
            """A loss."""
            seen.append(batch["index"].tolist())
            return super().__call__(model, batch)

    objective = Watched(class_prompts(), soft_weight=0, num_sampled_classes=3)
    model = get_peft_model(base_model(), rpp_config(vision_depth=0))
    VLMTrainer(model, args, train_dataset=images, objective=objective).train(resume_from_checkpoint=resume)
    Path(folder, f"seen-{args.process_index}.json").write_text(json.dumps(seen))
    tensors = {name: tensor.contiguous() for name, tensor in get_peft_model_state_dict(model).items()}
    save_file(tensors, Path(folder) / f"final-{args.process_index}.safetensors")


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """A straight run, and one that goes on from its sixth step, the second of the second epoch."""
    root = tmp_path_factory.mktemp("streams")
    shards = write_shards(root / "shards")
    straight, resumed = root / "straight", root / "resumed"
    for folder, resume in ((straight, None), (resumed, str(straight / "checkpoint-6"))):
        folder.mkdir()
        forked.run_group(folder, train_on_stream, str(folder), str(shards), resume)
    return straight, resumed


def seen_by(folder: Path, rank: int) -> list[list[int]]:
    return json.loads((folder / f"seen-{rank}.json").read_text())


def test_two_processes_see_every_image_once_per_epoch(runs: tuple[Path, Path]) -> None:
    """One process that reads for both would show half of the images twice as long."""
    first, second = (seen_by(runs[0], rank) for rank in (0, 1))
    assert len(first) == len(second) == 8
    for epoch in (slice(0, 4), slice(4, 8)):
        counts = Counter(index for batches in (first, second) for batch in batches[epoch] for index in batch)
        assert counts == dict.fromkeys(range(24), 1)


def test_a_resumed_epoch_ends_with_the_same_tensors(runs: tuple[Path, Path]) -> None:
    """Skipped batches are placeholders of another size."""
    straight, resumed = runs
    for rank in (0, 1):
        assert seen_by(resumed, rank) == seen_by(straight, rank)[6:]
        expected, actual = (load_file(folder / f"final-{rank}.safetensors") for folder in runs)
        assert all(torch.equal(actual[key], expected[key]) for key in expected)
