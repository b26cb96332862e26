"""Processes that were started as different runs stop at once; one whose partner is gone says so."""

import json
import os
import signal
from pathlib import Path
from typing import Any

import pytest
from transformers import TrainerCallback

from peft_vlm.data.transforms import TrainTransform
from peft_vlm.distributed import process_index
from peft_vlm.errors import PeftVLMError
from tests import forked
from tests.cases import class_prompts
from tests.short_run import train
from tests.tiny import clip_processor


def other_labels(model: Any, objective: Any, dataset: Any) -> None:
    """Labels of a table that was read in another order."""
    dataset.labels = dataset.labels[::-1]


def other_names(model: Any, objective: Any, dataset: Any) -> None:
    """Classes of a folder that was read in another order."""
    dataset.class_names = dataset.class_names[::-1]
    objective.prompts = class_prompts(dataset.class_names)


def other_transform(model: Any, objective: Any, dataset: Any) -> None:
    """Augmentation on one machine."""
    dataset.transform = TrainTransform(clip_processor())


#: What the second process is started with, and what the message names.
DIFFERENCES: dict[str, tuple[dict[str, Any], str]] = {
    "learning rate": ({"learning_rate": 0.5}, "`learning_rate` was 0.01 and is 0.5"),
    "batch size": ({"per_device_train_batch_size": 2}, "`per_device_train_batch_size` was 4 and is 2"),
    "accumulation": ({"gradient_accumulation_steps": 2}, "`gradient_accumulation_steps` was 1 and is 2"),
    "seed": ({"seed": 4}, "`seed` was 3 and is 4"),
    "steps": ({"max_steps": 3}, "`max_steps` was 2 and is 3"),
    "checkpoints": ({"save_steps": 1}, "`save_steps` was 2 and is 1"),
    "precision": ({"bf16": True}, "`bf16` was False and is True"),
    "objective": ({"settings": {"weight": 4.0}}, "weight was 8.0 and is 4.0"),
    "cache": ({"settings": {"image_cache": "none"}}, "image_cache was 'auto' and is 'none'"),
    "images": ({"data": {"count": 20}}, "images was 24 and is 20"),
    "labels": ({"change": other_labels}, "content was '"),
    "class names": ({"change": other_names}, "class_names was ['red', "),
    "transform": ({"change": other_transform}, "transform was "),
    "resume": ({"resume": "auto"}, "`resume_from_checkpoint` was 'None' and is 'auto'"),
}


def disagree(folder: str) -> None:
    """Start each training with something else in the second process, and keep what it says."""
    said = {}
    for name, (options, _) in DIFFERENCES.items():
        own = options if process_index_of_launcher() else {}
        with pytest.raises(PeftVLMError) as caught:
            train(Path(folder) / name, "kgcoop", **({"max_steps": 2} | own))
        said[name] = str(caught.value)
    Path(folder, f"said-{process_index()}.json").write_text(json.dumps(said))
    train(Path(folder) / "alike", "kgcoop", max_steps=2)


def process_index_of_launcher() -> int:
    """Known before the processes are connected."""
    return int(os.environ["RANK"])


def test_processes_of_different_runs_stop_before_the_first_step(tmp_path: Path) -> None:
    """Other rates end with other tensors in each process; other batch sizes hang for half an hour."""
    forked.run_group(tmp_path, disagree, str(tmp_path))
    first, second = (json.loads((tmp_path / f"said-{rank}.json").read_text()) for rank in (0, 1))
    assert first == second
    for name, (_, message) in DIFFERENCES.items():
        assert "Expected one run in 2 processes, got another one in process 1 than in process 0: " in first[name], name
        assert message in first[name], (name, first[name])
        assert not (tmp_path / name / "metrics.json").exists()
    assert (tmp_path / "alike" / "metrics.json").exists()


class Dies(TrainerCallback):
    """The system ends the second process in its third step."""

    def on_step_begin(self, args, state, control, **kwargs) -> None:
        """Without a chance to say anything."""
        if state.global_step == 2 and process_index() == 1:
            os.kill(os.getpid(), signal.SIGKILL)


def lose_a_partner(folder: str) -> None:
    """Train until the other process is gone."""
    train(folder, "coop", max_steps=6, callbacks=(Dies(),))


def test_a_process_whose_partner_is_gone_says_so(tmp_path: Path) -> None:
    """gloo speaks of addresses, and nobody would look at the other process."""
    (first, log), (second, other) = forked.start_group(tmp_path, lose_a_partner, str(tmp_path / "run"))
    try:
        assert forked.wait(second, other) == -signal.SIGKILL
        assert forked.wait(first, log, timeout=60) == 1
    finally:
        first.kill()
    printed = log.read_text()
    assert "Expected 2 processes to train together, got no answer from another one than process 0: " in printed
    assert "start all of them again with `resume_from_checkpoint='auto'`" in printed
    forked.run_group(tmp_path, train, str(tmp_path / "run"), "coop", max_steps=6, resume="auto")
