"""Gaussian prompt aggregation: weights by hand, and whole runs that finish, are interrupted, or stop early."""

import json
import logging
import math

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch.testing import assert_close
from transformers import TrainerCallback

from peft_vlm import PromptSRCObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.methods.promptsrc.aggregation import PromptAggregation, gaussian_log_weights
from tests.cases import class_prompts, images, pixels, promptsrc_config
from tests.tiny import tiny_clip


def test_aggregation_weights_by_hand():
    """Epochs 1, 2, 3 around 2 with standard deviation 1: exp(-1/2), 1, exp(-1/2), divided by their sum."""
    total = 1 + 2 * math.exp(-0.5)
    expected = [math.exp(-0.5) / total, 1 / total, math.exp(-0.5) / total]
    assert gaussian_log_weights(3, mean=2, std=1).exp().tolist() == pytest.approx(expected, rel=1e-12)


def test_weights_below_the_smallest_float_still_have_a_mean():
    """Epoch 1 of 20 around 15 with standard deviation 0.3 weighs e^-1089 of epoch 15."""
    aggregation = PromptAggregation(mean=15, std=0.3)
    aggregation.model = torch.nn.Linear(1, 1, bias=False)
    for epoch, value in ((1, 1.0), (2, 3.0)):
        aggregation.model.weight.data.fill_(value)
        aggregation.add(epoch, num_epochs=20)
    assert float(aggregation.averages["weight"]) == pytest.approx(3.0)


class Recorder(TrainerCallback):
    """Keeps the prompts at the end of each epoch, and stops the run after some step."""

    def __init__(self, model, *, stop_after: int | None = None) -> None:
        self.model, self.stop_after = model, stop_after
        self.epochs: list[dict[str, torch.Tensor]] = []

    def on_step_end(self, args, state, control, **kwargs):
        """Copy the prompts at the last step of an epoch."""
        if state.global_step % 6 == 0:
            self.epochs.append({k: v.clone() for k, v in get_peft_model_state_dict(self.model).items()})
        if state.global_step == self.stop_after:
            control.should_training_stop = True
        return control


def train(folder, *, epochs=3, resume=None, stop_after=None, evaluate=False, **settings):
    """A short run with aggregation: 24 images, 6 steps per epoch."""
    torch.manual_seed(3)
    model = get_peft_model(tiny_clip(), promptsrc_config())
    args = VLMTrainingArguments(
        output_dir=str(folder),
        num_train_epochs=epochs,
        learning_rate=0.05,
        save_total_limit=None,
        use_cpu=True,
        disable_tqdm=True,
        seed=3,
        **({"save_strategy": "steps", "save_steps": 2} | settings),
    )
    objective = PromptSRCObjective(class_prompts(), gpa_mean=2, gpa_std=1)
    recorder = Recorder(model, stop_after=stop_after)
    trainer = VLMTrainer(
        model,
        args,
        train_dataset=images(),
        eval_dataset=images(per_class=1, seed=9) if evaluate else None,
        callbacks=[recorder],
        objective=objective,
    )
    trainer.train(resume_from_checkpoint=resume)
    return trainer, get_peft_model_state_dict(model), recorder.epochs


def assert_mean(final, epochs, weights) -> None:
    assert len(epochs) == len(weights)
    for key, value in final.items():
        expected = sum(w * epoch[key].double() for w, epoch in zip(weights, epochs, strict=True))
        assert_close(value.double(), expected, rtol=1e-5, atol=1e-7)
        assert not torch.equal(value, epochs[-1][key])


def test_the_final_prompts_are_the_weighted_mean(tmp_path, caplog):
    with caplog.at_level(logging.INFO):
        trainer, final, epochs = train(tmp_path)
    assert_mean(final, epochs, gaussian_log_weights(3, mean=2, std=1).exp().tolist())
    assert "weighted mean over 3 epochs (Gaussian mean 2, standard deviation 1)" in caplog.text
    saved = get_peft_model_state_dict(PeftModel.from_pretrained(tiny_clip(), tmp_path))
    assert all(torch.equal(saved[key], final[key]) for key in final)
    summary = json.loads((tmp_path / "training_summary.json").read_text())
    assert summary["metrics"]["aggregated_epochs"] == 3
    assert (summary["objective"]["gpa_mean"], summary["objective"]["gpa_std"]) == (2, 1)


def test_frozen_weights_are_not_averaged(tmp_path):
    """The official code averages the whole state, whose frozen weights pick up rounding."""
    trainer, _, _ = train(tmp_path)
    assert set(trainer.objective.aggregation.averages) == {
        name for name, p in trainer.model.model.named_parameters() if p.requires_grad
    }
    with trainer.model.model.disable_adapter():
        base = trainer.model.model.get_base_model().eval()
        logits = base(pixel_values=pixels(), input_ids=class_prompts().input_ids).logits_per_image
    expected = tiny_clip()(pixel_values=pixels(), input_ids=class_prompts().input_ids).logits_per_image
    assert torch.equal(logits, expected)


@pytest.fixture(scope="module")
def straight(tmp_path_factory):
    """Folder and tensors of a run that never stopped."""
    folder = tmp_path_factory.mktemp("straight")
    return folder, train(folder)[1]


@pytest.mark.parametrize("step", [2, 6, 8, 12, 18])
def test_a_resumed_run_ends_with_the_same_mean_bitwise(tmp_path, straight, step):
    """In mid-epoch, at the end of an epoch, and after the last step, before the mean was put in place."""
    folder, expected = straight
    trainer, resumed, _ = train(tmp_path, resume=str(folder / f"checkpoint-{step}"))
    assert trainer.state.global_step == 18
    assert expected.keys() == resumed.keys()
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


def test_a_run_that_was_interrupted_goes_on_to_the_same_mean(tmp_path, straight):
    """Stopped within epoch 2 by an exception, as by a kill; resumed from its own last checkpoint."""

    class Stop(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            if state.global_step == 9:
                raise KeyboardInterrupt

    _, expected = straight
    torch.manual_seed(3)
    model = get_peft_model(tiny_clip(), promptsrc_config())
    settings = {"num_train_epochs": 3, "learning_rate": 0.05, "save_strategy": "steps", "save_steps": 2, "seed": 3}
    args = VLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, disable_tqdm=True, **settings)
    objective = PromptSRCObjective(class_prompts(), gpa_mean=2, gpa_std=1)
    with pytest.raises(KeyboardInterrupt):
        VLMTrainer(model, args, train_dataset=images(), callbacks=[Stop()], objective=objective).train()
    _, resumed, _ = train(tmp_path, resume=str(tmp_path / "checkpoint-8"))
    assert all(torch.equal(expected[key], resumed[key]) for key in expected)


@pytest.mark.parametrize("stop_after", [12, 15])
def test_a_run_that_stops_early_averages_what_it_saw_and_says_so(tmp_path, caplog, stop_after):
    """Two epochs, or two and the half of a third, of four."""
    with caplog.at_level(logging.INFO):
        trainer, final, epochs = train(tmp_path, epochs=4, stop_after=stop_after)
    seen = math.ceil(stop_after / 6)
    assert (
        f"Training stopped after {seen} of 4 epochs: the weights of these {seen} were scaled to sum to 1"
        in caplog.text
    )
    if stop_after == 12:
        weights = gaussian_log_weights(4, mean=2, std=1).exp()[:2]
        assert_mean(final, epochs, (weights / weights.sum()).tolist())


def test_evaluation_and_checkpoint_of_the_last_epoch_show_the_mean(tmp_path):
    """Otherwise the reported accuracy would be that of prompts nobody gets."""
    trainer, final, _ = train(tmp_path, evaluate=True, eval_strategy="epoch", save_strategy="epoch")
    accuracy = [entry["eval_accuracy"] for entry in trainer.state.log_history if "eval_accuracy" in entry]
    assert len(accuracy) == 3
    assert accuracy[-1] == pytest.approx(trainer.evaluate()["eval_accuracy"])
    saved = get_peft_model_state_dict(PeftModel.from_pretrained(tiny_clip(), tmp_path / "checkpoint-18"))
    assert all(torch.equal(saved[key], final[key]) for key in final)


def test_the_best_checkpoint_and_the_mean_exclude_each_other(tmp_path):
    settings = {"load_best_model_at_end": True, "eval_strategy": "epoch", "save_strategy": "epoch"}
    with pytest.raises(ValueError, match="`load_best_model_at_end`=False with Gaussian prompt aggregation"):
        train(tmp_path, evaluate=True, **settings)


def test_aggregation_is_off_by_default():
    objective = PromptSRCObjective(class_prompts())
    assert objective.callbacks(tiny_clip()) == []
    assert objective.state_dict() == {}
