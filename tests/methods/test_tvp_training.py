"""Runs of TVP on multimodal models by the trainer: what they learn, leave behind, resume, and how batches add up."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close

from peft_vlm import SkipTuningAnswerObjective, SkipTuningConfig, TVPObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.data import ImageQuestionDataset, RandomCrop
from peft_vlm.errors import DataError
from peft_vlm.methods.tvp import NormalizedGradient, prompt_layer_of, prompt_of
from tests.methods.tvp_models import objective, prompt_parameter, prompted_llava, questions
from tests.tiny_questions import tiny_llava


def run(
    folder: Path,
    dataset: ImageQuestionDataset | None = None,
    *,
    resume: str | None = None,
    target: dict[str, Any] | None = None,
    eval_dataset: ImageQuestionDataset | None = None,
    **settings: Any,
) -> VLMTrainer:
    """Two epochs on twelve questions in batches of four, from the same random prompt."""
    own = {"num_train_epochs": 2, "learning_rate": 0.5, "warmup_epochs": 0, "seed": 3, "per_device_eval_batch_size": 4}
    args = VLMTrainingArguments(
        output_dir=str(folder), use_cpu=True, disable_tqdm=True, **(own | {"save_strategy": "no"} | settings)
    )
    model = prompted_llava(size=0.1)
    trainer = VLMTrainer(
        model,
        args,
        train_dataset=dataset or questions(2),
        eval_dataset=eval_dataset,
        objective=objective(**(target or {})),
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer


def trained(trainer: VLMTrainer) -> Tensor:
    return prompt_parameter(trainer.model.model).detach()


def test_training_lowers_the_loss_and_leaves_a_prompt_that_predicts_the_same(tmp_path):
    """Adapter folder, metrics, summary; the centre of the prompt never moves."""
    trainer = run(
        tmp_path,
        questions(2, augmentation=RandomCrop()),
        eval_dataset=questions(),
        num_train_epochs=8,
        logging_steps=3,
    )
    losses = [entry["loss_language"] for entry in trainer.state.log_history if "loss_language" in entry]
    assert len(losses) == 8
    assert losses[-1] < losses[0] - 0.2
    assert isinstance(trainer.optimizer.optimizer, NormalizedGradient)
    model = trainer.model.model
    mask = prompt_layer_of(model).settings["default"].mask()
    assert not (trained(trainer) * (1 - mask)).any()
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    assert summary["objective"]["fca_weight"] == 0.05
    assert summary["objective"]["tse_template"] == ["a {}."]
    assert {"loss_language", "loss_fca", "loss_tse", "accuracy"} <= summary["metrics"].keys()
    again = PeftModel.from_pretrained(tiny_llava(), tmp_path)
    assert torch.equal(prompt_of(again), prompt_of(model))
    config = again.active_peft_config
    assert config.class_names == list(questions().class_names)
    assert config.template is None
    metrics = trainer.evaluate()
    assert 0 <= metrics["eval_accuracy"] <= 100


SAVING = {"save_strategy": "steps", "save_steps": 1, "save_total_limit": None}


@pytest.fixture(scope="module", params=[None, RandomCrop()], ids=["plain", "augmented"])
def straight(request, tmp_path_factory) -> tuple[RandomCrop | None, Path, Tensor]:
    """Augmentation, folder and final prompt of a run that never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    return request.param, folder, trained(run(folder, questions(2, augmentation=request.param), **SAVING))


@pytest.mark.parametrize("step", [2, 3])
def test_a_resumed_run_ends_with_the_prompt_of_one_that_never_stopped(tmp_path, straight, step):
    augmentation, folder, expected = straight
    data = questions(2, augmentation=augmentation)
    resumed = run(tmp_path, data, resume=str(folder / f"checkpoint-{step}"), **SAVING)
    assert resumed.state.global_step == 6
    assert torch.equal(trained(resumed), expected)
    assert not torch.equal(expected, prompt_parameter(prompted_llava(size=0.1)))


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Tensor:
    """The final prompt of a run with the default settings."""
    return trained(run(tmp_path_factory.mktemp("plain")))


def test_accumulated_batches_train_what_one_large_batch_trains(tmp_path):
    """Answers of one length, since the language term is a mean over the tokens of each batch."""
    large = trained(run(tmp_path / "a", even(), per_device_train_batch_size=4))
    small = trained(run(tmp_path / "b", even(), per_device_train_batch_size=2, gradient_accumulation_steps=2))
    assert_close(small, large, rtol=1e-4, atol=1e-5)


def even() -> ImageQuestionDataset:
    """The questions with answers of one length under the names of the colours."""
    dataset = questions(2)
    dataset._answers = [f"answer {label}" for label in dataset.labels]
    return dataset


def test_bf16_trains_about_the_same_prompt_in_float32(tmp_path, plain):
    half = run(tmp_path, bf16=True)
    assert trained(half).dtype == torch.float32
    start = prompt_parameter(prompted_llava(size=0.1)).detach()
    moved, expected = (trained(half) - start).flatten(), (plain - start).flatten()
    assert torch.nn.functional.cosine_similarity(moved, expected, dim=0) > 0.95
    assert not torch.equal(moved, expected)


def test_a_model_in_bf16_trains_a_float32_prompt(tmp_path):
    """As a large model is loaded: the prompt's steps would vanish in half precision."""
    model = prompted_llava(size=0.1, model=tiny_llava().to(torch.bfloat16))
    target = objective()
    dataset = questions(2)
    target.prepare(model, dataset)
    target.epoch_start(model, dataset, 0)
    prompt = prompt_parameter(model)
    assert prompt.dtype == torch.float32
    output = target(model.train(), dataset.collate([dataset[i] for i in range(4)]))
    output.loss.backward()
    assert output.loss.dtype == torch.float32
    assert prompt.grad.dtype == torch.float32
    assert prompt.grad.abs().max() > 0


def test_gradient_checkpointing_trains_the_same_prompt(tmp_path, plain):
    assert_close(trained(run(tmp_path, activation_checkpointing=True)), plain, rtol=1e-4, atol=1e-5)


def test_another_optimizer_moves_the_border_only(tmp_path):
    """`normalized_gradient=False`: the arguments' optimizer, which knows no mask."""
    target = {"normalized_gradient": False}
    trainer = run(tmp_path, target=target, optim="adamw_torch", learning_rate=0.05, weight_decay=0.0)
    mask = prompt_layer_of(trainer.model.model).settings["default"].mask()
    start = prompt_parameter(prompted_llava(size=0.1)).detach()
    moved = prompt_of(trainer.model.model) - start
    assert not (moved * (1 - mask)).any()
    assert moved.abs().max() > 0.05


def test_validation_questions_of_other_classes_are_refused(tmp_path):
    with pytest.raises(DataError, match="3 names for 6"):
        run(tmp_path, eval_dataset=questions().restrict([0, 1, 2]))


@pytest.mark.parametrize("target", [TVPObjective(None, tse_weight=0), SkipTuningAnswerObjective()])
def test_validation_of_free_answers_is_refused_before_training(tmp_path, target):
    """Not after the first epoch, which may have taken hours."""
    args = VLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    skip_tuning = get_peft_model(tiny_llava(), SkipTuningConfig(start_layer=1))
    model = prompted_llava() if isinstance(target, TVPObjective) else skip_tuning
    with pytest.raises(DataError, match=r"`(TVP|SkipTuningAnswer)Objective` for free answers"):
        VLMTrainer(model, args, train_dataset=questions(), eval_dataset=questions(), objective=target)
