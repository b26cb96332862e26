"""The promises about training runs: equal seeds, exact resume, the files that are left."""

import json
from pathlib import Path

import pytest
import torch
from peft import PeftConfig, PeftModel, get_peft_model, get_peft_model_state_dict

from peft_vlm import VLMTrainer, VLMTrainingArguments
from peft_vlm.adapters.adapter_files import AdapterSource
from peft_vlm.adapters.config import facts_of
from peft_vlm.training.reports import training_curve_png
from tests.cases import CASES, Case, base_model, class_prompts, images, logits_of


@pytest.fixture(params=CASES, ids=lambda case: case.method)
def case(request) -> Case:
    return request.param


def run(case: Case, folder: Path, *, name: str = "default", epochs: int = 2, resume: str | None = None, seed: int = 3):
    """A short training; the adapter's tensors at its end."""
    torch.manual_seed(seed)
    model = get_peft_model(base_model(), case.config(), adapter_name=name)
    args = VLMTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=0.01,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=None,
        use_cpu=True,
        disable_tqdm=True,
        seed=seed,
    )
    dataset = images()
    objective = case.objective(class_prompts())
    trainer = VLMTrainer(
        model, args, train_dataset=dataset, eval_dataset=images(per_class=1, seed=9), objective=objective
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, get_peft_model_state_dict(model, adapter_name=name)


@pytest.fixture(scope="module", params=CASES, ids=lambda case: case.method)
def straight(request, tmp_path_factory):
    """Case, folder, trainer and tensors of a run that never stopped; tests change none of them."""
    folder = tmp_path_factory.mktemp(request.param.method)
    return request.param, folder, *run(request.param, folder)


def test_equal_seeds_give_equal_tensors(straight, tmp_path):
    case, _, _, first = straight
    _, second = run(case, tmp_path)
    assert all(torch.equal(first[key], second[key]) for key in first)


@pytest.mark.parametrize("step", [2, 6, 8])
def test_a_resumed_run_ends_with_the_tensors_of_one_that_never_stopped(straight, tmp_path, step):
    """In mid-epoch (2, 8) and at the end of an epoch (6), momentum, schedule and batch order included."""
    case, folder, _, expected = straight
    trainer, resumed = run(case, tmp_path, resume=str(folder / f"checkpoint-{step}"))
    assert trainer.state.global_step == 12
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


def test_an_adapter_of_any_name_resumes_and_reloads(case, tmp_path):
    _, expected = run(case, tmp_path / "a", name="mine")
    _, resumed = run(case, tmp_path / "b", name="mine", resume=str(tmp_path / "a" / "checkpoint-8"))
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


def test_a_finished_run_leaves_what_a_person_wants(straight, tmp_path):
    case, folder, trainer, _ = straight
    files = {path.name for path in folder.iterdir()}
    assert {"adapter_config.json", "adapter_model.safetensors", "metrics.json", "training_summary.json"} <= files
    training_curve_png(trainer.state.log_history, tmp_path / "training_curve.png")
    assert (tmp_path / "training_curve.png").stat().st_size > 5_000
    summary = json.loads((folder / "training_summary.json").read_text())
    assert summary["steps"] == 12
    assert summary["objective"]
    config = facts_of(AdapterSource.find(folder), PeftConfig.from_pretrained(folder))
    assert config.class_names == list(class_prompts().class_names)
    assert config.template == "a {}."
    assert config.image_size == [16, 16]
    assert len(config.image_mean) == len(config.image_std) == 3
    again = PeftModel.from_pretrained(base_model(), folder)
    assert torch.equal(logits_of(case, again), logits_of(case, trainer.model.model.eval()))
    assert not list(folder.rglob("*.bin"))
