"""Runs that are started again: finished ones, ones without all they need, and ones that say how they differ."""

import json
import warnings
from pathlib import Path

import pytest
from transformers import TrainerCallback

from peft_vlm import VLMTrainer, VLMTrainingArguments
from peft_vlm.errors import PeftVLMWarning
from tests.short_run import parts, train


def test_a_finished_run_that_is_started_again_stays_as_it_is(tmp_path: Path) -> None:
    """Ended in mid-epoch, it would make one more step each time, and describe the adapter by the new settings."""
    options = {"max_steps": 3, "save_strategy": "steps", "save_steps": 3}
    train(tmp_path, "coop", settings={"image_cache": "none"}, **options)
    before = {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert {"metrics.json", "training_summary.json", "README.md"} <= before.keys()
    with pytest.warns(PeftVLMWarning, match="checkpoint-3, but has other settings: image_cache was 'none'"):
        trainer = train(tmp_path, "coop", resume="auto", learning_rate=0.5, **options)
    assert trainer.state.global_step == 3
    assert before == {path.name: path.read_bytes() for path in tmp_path.iterdir() if path.is_file()}
    assert [path.name for path in tmp_path.glob("checkpoint-*")] == ["checkpoint-3"]


def test_a_run_killed_before_its_last_files_does_not_keep_those_of_an_earlier_run(tmp_path: Path) -> None:
    """Its last checkpoint is there, its adapter and reports are not; those in the folder are of another run."""
    train(tmp_path, "coop", max_steps=2)
    old = (tmp_path / "adapter_model.safetensors").read_bytes()

    class Killed(TrainerCallback):
        """An end after the last checkpoint."""

        def on_train_end(self, *arguments, **kwargs) -> None:
            raise KeyboardInterrupt

    with pytest.warns(PeftVLMWarning, match="are kept as"), pytest.raises(KeyboardInterrupt):
        train(tmp_path, "coop", max_steps=4, learning_rate=0.5, warmup_epochs=0, callbacks=(Killed(),))
    assert (tmp_path / "adapter_model.safetensors").read_bytes() == old
    train(tmp_path, "coop", max_steps=4, learning_rate=0.5, warmup_epochs=0, resume="auto")
    assert (tmp_path / "adapter_model.safetensors").read_bytes() != old
    assert json.loads((tmp_path / "training_summary.json").read_text())["steps"] == 4


def test_model_and_objective_that_go_on_in_the_same_session_are_no_other_settings(tmp_path: Path) -> None:
    """What training fills in, such as the teacher's name, was not there at the beginning."""
    model, objective, dataset = parts("promptkd", teacher_cache="views", num_views=2)
    options = {"save_strategy": "steps", "save_steps": 2, "use_cpu": True, "report_to": "none", "disable_tqdm": True}
    for steps in (2, 4):
        args = VLMTrainingArguments(output_dir=str(tmp_path), max_steps=steps, **options)
        with warnings.catch_warnings():
            warnings.simplefilter("error", PeftVLMWarning)
            VLMTrainer(model, args, train_dataset=dataset, objective=objective).train(resume_from_checkpoint="auto")


def test_a_resume_without_its_optimizer_says_so(tmp_path: Path) -> None:
    """Momentum and schedule would begin anew without a word."""
    train(tmp_path, "coop", max_steps=2, save_only_model=True)
    with pytest.warns(PeftVLMWarning, match="begins with a new optimizer and schedule"):
        train(tmp_path, "coop", resume="auto", max_steps=4)


def test_the_loss_of_a_resumed_run_is_that_of_its_own_steps(tmp_path: Path) -> None:
    """Divided by the steps of both it would look half as large."""
    train(tmp_path, "coop", max_steps=8)
    trainer = train(tmp_path, "coop", resume="auto", max_steps=12)
    entries = trainer.state.log_history
    own = [entry["loss"] for entry in entries if "loss" in entry and entry["step"] > 8]
    assert len(own) == 4
    assert entries[-1]["train_loss"] == pytest.approx(sum(own) / 4)
    with pytest.warns(PeftVLMWarning, match="'earlier-...': checkpoint-10, checkpoint-12"):
        whole = trainer.train(resume_from_checkpoint=str(tmp_path / "checkpoint-8"))
    assert whole.training_loss == whole.metrics["train_loss"] == pytest.approx(sum(own) / 4)
