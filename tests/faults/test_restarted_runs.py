"""Runs that are started again: finished ones, ones without all they need, and ones that say how they differ."""

import json
import logging
import shutil
import warnings
from pathlib import Path
from typing import Any

import pytest
import torch
from transformers import TrainerCallback

from peft_vlm import VLMTrainer, VLMTrainingArguments
from peft_vlm.data.transforms import TrainTransform
from peft_vlm.errors import CheckpointError, PeftVLMWarning
from tests.cases import class_prompts
from tests.short_run import parts, train
from tests.tiny import clip_processor


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


@pytest.fixture(scope="module")
def interrupted(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Folder of a run that was interrupted after four of twelve steps; tests work on copies."""
    folder = tmp_path_factory.mktemp("interrupted")

    class Stopped(TrainerCallback):
        """An end after the second checkpoint."""

        def on_save(self, args, state, control, **kwargs) -> None:
            if state.global_step == 4:
                raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        train(folder, "kgcoop", callbacks=(Stopped(),))
    return folder


def other_labels(model: Any, objective: Any, dataset: Any) -> None:
    """Two images change their classes."""
    dataset.labels = [*dataset.labels[1:], dataset.labels[0]]


def other_image(model: Any, objective: Any, dataset: Any) -> None:
    """One image is another one; labels and number stay."""
    rows = list(dataset.source)
    rows[5] = rows[5] | {"image": rows[6]["image"]}
    dataset.source = rows


def other_class_names(model: Any, objective: Any, dataset: Any) -> None:
    """Two classes change places."""
    names = list(dataset.class_names)
    names[:2] = names[1::-1]
    dataset.class_names = tuple(names)
    objective.prompts = class_prompts(names)


def other_transform(model: Any, objective: Any, dataset: Any) -> None:
    """Augmentation in place of none."""
    dataset.transform = TrainTransform(clip_processor(), flip_probability=0.25)


def other_processor(model: Any, objective: Any, dataset: Any) -> None:
    """The images are prepared otherwise."""
    dataset.transform.processor.size["shortest_edge"] = 17


OTHER_RUNS: dict[str, tuple[dict[str, Any], str]] = {
    "labels": ({"change": other_labels}, "content was '"),
    "image": ({"change": other_image}, "content was '"),
    "images": ({"data": {"count": 20}}, "content was '.*images was 24 and is 20"),
    "class names": ({"change": other_class_names}, r"class_names was \['red', 'orange', 'yellow'\] at 0 and is \['o"),
    "transform": ({"change": other_transform}, "transform was .*EvalTransform.* and is .*TrainTransform"),
    "processor": ({"change": other_processor}, "transform was .*16.* and is .*17"),
    "objective's setting": ({"settings": {"weight": 4.0}}, "weight was 8.0 and is 4.0"),
    "optimizer": ({"optim": "adamw_torch"}, "optimizer was 'sgd' and is 'adamw_torch'"),
}


@pytest.mark.parametrize("name", OTHER_RUNS)
def test_a_resume_as_another_run_is_refused(tmp_path: Path, interrupted: Path, name: str) -> None:
    """Half of the steps would be of one run and half of another, under the name and settings of the second."""
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    options, message = OTHER_RUNS[name]
    with pytest.raises(CheckpointError, match=f"to go on as it was, but .*{message}"):
        train(tmp_path, "kgcoop", resume="auto", **options)
    assert not (tmp_path / "training_summary.json").exists()
    with pytest.warns(PeftVLMWarning, match=f"goes on from checkpoint-4, but .*{message}"):
        trainer = train(tmp_path, "kgcoop", resume="auto", resume_changes="warn", max_steps=6, **options)
    assert trainer.state.global_step == 6
    assert json.loads((tmp_path / "training_summary.json").read_text())["changes"]


def test_other_questions_are_another_run(tmp_path: Path) -> None:
    """The images and labels may be the same."""
    train(tmp_path, "skip_tuning_answers", max_steps=2)

    def other(model: Any, objective: Any, dataset: Any) -> None:
        dataset._set_questions("Which animal is this?", None)

    with pytest.raises(CheckpointError, match="questions was '"):
        train(tmp_path, "skip_tuning_answers", max_steps=4, resume="auto", change=other)


def test_another_objective_is_another_run(tmp_path: Path, interrupted: Path) -> None:
    """Its tensors may have the same names and shapes."""
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    with pytest.raises(CheckpointError, match="objective was 'KgCoOpObjective' and is 'CoOpObjective'"):
        train(tmp_path, "coop", resume="auto")


class NotedRates(TrainerCallback):
    """Keeps what each step is made with."""

    def __init__(self) -> None:
        self.steps: list[dict[str, float]] = []

    def on_step_begin(self, args, state, control, optimizer, **kwargs) -> None:
        """Before the step."""
        (group,) = optimizer.param_groups
        self.steps.append(
            {"learning_rate": group["lr"]} | {name: group[name] for name in ("weight_decay", "momentum")}
        )


#: Changed settings, and the learning rates of the fifth and the last step.
CHANGED_RATES: dict[str, tuple[dict[str, Any], float, float]] = {
    "learning rate": ({"learning_rate": 0.5}, 0.5, 0.25),
    "weight decay": ({"weight_decay": 0.25}, 0.01, 0.005),
    "momentum": ({"momentum": 0.5}, 0.01, 0.005),
    "schedule": ({"lr_schedule": "transformers", "lr_scheduler_type": "constant"}, 0.01, 0.01),
    "warm-up": ({"warmup_epochs": 1, "warmup_learning_rate": 0.125}, 0.125, 0.01),
}


@pytest.mark.parametrize("name", CHANGED_RATES)
def test_changed_rates_are_used_from_the_resume_on(tmp_path: Path, interrupted: Path, name: str) -> None:
    """The optimizer's state brings those of the checkpoint, while the reports would name the new ones."""
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    options, first, last = CHANGED_RATES[name]
    noted = NotedRates()
    with pytest.warns(PeftVLMWarning, match=f"checkpoint-4, but has other rates from here on: .*{[*options][-1]} was"):
        trainer = train(tmp_path, "kgcoop", resume="auto", callbacks=(noted,), **options)
    rates = [step.pop("learning_rate") for step in noted.steps]
    expected = {key: options.get(key, value) for key, value in {"weight_decay": 5e-4, "momentum": 0.9}.items()}
    assert noted.steps == [expected] * 8
    assert (rates[0], rates[-1]) == pytest.approx((first, last))
    logged = [entry["learning_rate"] for entry in trainer.state.log_history if "learning_rate" in entry]
    assert logged[-8:] == pytest.approx(rates)
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    assert all(text.startswith("from step 4 on, ") for text in summary["changes"])
    assert len(summary["changes"]) == len(options)


def test_changed_rates_of_an_optimizer_of_torch_are_used(tmp_path: Path) -> None:
    """Betas and epsilon come back with the optimizer's state too."""
    options = {"optim": "adamw_torch", "save_steps": 4}
    train(tmp_path, "coop", max_steps=4, **options)
    with pytest.warns(PeftVLMWarning, match="adam_beta1 was 0.9 and is 0.5, learning_rate was 0.01 and is 0.001"):
        trainer = train(tmp_path, "coop", max_steps=5, resume="auto", adam_beta1=0.5, learning_rate=0.001, **options)
    (group,) = trainer.optimizer.param_groups
    assert (group["betas"], group["initial_lr"]) == ((0.5, 0.999), 0.001)


def test_rates_that_no_step_was_made_with_do_not_reach_the_reports(tmp_path: Path) -> None:
    """A run that was killed between its last step and its reports writes them when it is started again."""
    train(tmp_path, "coop", max_steps=4)
    (tmp_path / "training_summary.json").unlink()
    with pytest.raises(CheckpointError, match="lacks its reports, but learning_rate was 0.01 and is 0.5"):
        train(tmp_path, "coop", resume="auto", learning_rate=0.5, max_steps=4)
    train(tmp_path, "coop", resume="auto", max_steps=4)
    assert json.loads((tmp_path / "training_summary.json").read_text())["training"]["learning_rate"] == 0.01


def test_changes_of_earlier_resumes_are_remembered(tmp_path: Path, interrupted: Path) -> None:
    """The summary of a run that was resumed twice would tell of the second change alone."""
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    with pytest.warns(PeftVLMWarning, match="learning_rate was 0.01 and is 0.02"):
        train(tmp_path, "kgcoop", resume="auto", learning_rate=0.02, max_steps=6)
    trainer = train(tmp_path, "kgcoop", resume="auto", learning_rate=0.02, max_steps=8)
    assert "from step 4 on, learning_rate was 0.01 and is 0.02" in trainer.record.changes


def test_a_checkpoint_of_an_earlier_version_still_resumes(
    tmp_path: Path, interrupted: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Its manifest records settings and order alone."""
    shutil.copytree(interrupted, tmp_path, dirs_exist_ok=True)
    path = tmp_path / "checkpoint-4" / "manifest.json"
    manifest = json.loads(path.read_text())
    old = {name: manifest[name] for name in ("files", "step", "order", "settings", "settings_found")}
    path.write_text(json.dumps(old))
    with caplog.at_level(logging.INFO, logger="peft_vlm"), warnings.catch_warnings():
        warnings.simplefilter("error", PeftVLMWarning)
        trainer = train(tmp_path, "kgcoop", resume="auto")
    assert trainer.state.global_step == 12
    assert "is of an earlier version, which recorded less" in caplog.text


def best_of(folder: Path, epochs: int, callbacks: tuple[TrainerCallback, ...] = ()) -> VLMTrainer:
    """A run whose best checkpoint, by the highest loss, is the first one."""
    torch.manual_seed(3)
    model, objective, dataset = parts("coop")
    options = {"save_strategy": "epoch", "eval_strategy": "epoch", "load_best_model_at_end": True, "use_cpu": True}
    options |= {"num_train_epochs": epochs, "metric_for_best_model": "loss", "greater_is_better": True}
    args = VLMTrainingArguments(str(folder), learning_rate=0.05, disable_tqdm=True, report_to="none", **options)
    images = {"train_dataset": dataset, "eval_dataset": dataset}
    return VLMTrainer(model, args, objective=objective, callbacks=list(callbacks), **images)


def test_a_damaged_best_checkpoint_is_not_loaded(tmp_path: Path) -> None:
    """Its tensors would be those of no step, and would be called the best ones."""

    class Damaged(TrainerCallback):
        """A bit falls over in the first checkpoint."""

        def on_step_end(self, args, state, control, **kwargs) -> None:
            if state.global_step == 8:
                path = Path(state.best_model_checkpoint, "adapter_model.safetensors")
                content = bytearray(path.read_bytes())
                content[-1] ^= 16
                path.write_bytes(content)

    with pytest.raises(CheckpointError, match="checkpoint-6'.*adapter_model.*damaged.*the best of the run.*_end=Fal"):
        best_of(tmp_path, 2, (Damaged(),)).train()


def test_the_best_checkpoint_is_found_where_the_run_has_been_moved_to(tmp_path: Path) -> None:
    """The trainer's state holds the path of the first place."""
    best_of(tmp_path / "here", 2).train()
    (tmp_path / "here").rename(tmp_path / "there")
    trainer = best_of(tmp_path / "there", 3)
    trainer.train(resume_from_checkpoint="auto")
    assert Path(trainer.state.best_model_checkpoint).name == "checkpoint-6"
