"""TVP against the official code: three training steps with two settings, and likelihood scores of class names.

The record replaces MiniGPT-4 by a tiny LLaVA and 224 px by 32. An independent implementation that read the same files
had errors of 5e-6 in the loss terms and 1.7e-6 in the prompt; tolerances are about five times that.
"""

from typing import Any

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch import Tensor
from torch.testing import assert_close
from transformers import LlavaConfig, LlavaForConditionalGeneration

from peft_vlm import TVPConfig
from peft_vlm.methods.tvp import ClipGuide, TVPObjective, preset_for, prompt_layer_of, prompt_of, without_prompt
from peft_vlm.models.vision import encode_visual_tokens, record_visual_tokens
from peft_vlm.text import Candidates, ClassPrompts, candidate_scores
from tests.parity.recorded import facts, recorded_clip, tensors

CASE, RECORDED = facts("T1_tvp"), tensors("T1_tvp")
SIZE, BORDER, STEPS = 32, 5, 3


def recorded_llava() -> LlavaForConditionalGeneration:
    """The tiny LLaVA of the record."""
    config = {key: value for key, value in facts("tiny_llava")["hf_config"].items() if key != "transformers_version"}
    model = LlavaForConditionalGeneration(LlavaConfig.from_dict(config))
    model.load_state_dict(tensors("tiny_llava"), strict=True)
    return model.eval()


def prompted(run: str) -> PeftModel:
    """The model with the recorded initial prompt; images arrive with their border."""
    normalization = {"image_mean": CASE["mean"], "image_std": CASE["std"]}
    config = TVPConfig(canvas_size=SIZE, border=BORDER, shrink="processor", **normalization)
    model = get_peft_model(recorded_llava(), config)
    with torch.no_grad():
        prompt_layer_of(model).prompts["default"].copy_(RECORDED[f"{run}.perturbation.0"])
    return model


def batch_of_step(step: int) -> dict[str, Tensor]:
    """A recorded batch, as `ShrinkingProcessor` and `QuestionCollator` make one."""
    images = torch.nn.functional.pad(RECORDED[f"batch.{step}.images"], (BORDER,) * 4)
    mean, std = (torch.tensor(CASE[name]).view(3, 1, 1) for name in ("mean", "std"))
    columns = {name: RECORDED[f"batch.{step}.{name}"] for name in ("input_ids", "attention_mask", "labels")}
    columns["token_labels"] = RECORDED[f"batch.{step}.lm_labels"]
    return columns | {"pixel_values": (images - mean) / std, "index": torch.arange(4 * step, 4 * step + 4)}


class RecordedQuestions:
    """The images of all steps with what an objective asks of a dataset."""

    has_fixed_pixels = True
    class_names = tuple(CASE["class_names"])

    def __init__(self) -> None:
        batches = [batch_of_step(step) for step in range(STEPS)]
        self.items = [{name: column[i] for name, column in batch.items()} for batch in batches for i in range(4)]
        self.labels = [int(item["labels"]) for item in self.items]

    def __len__(self) -> int:
        return len(self.items)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return self.items[index]

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack columns."""
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def guide() -> ClipGuide:
    """The CLIP of TSE with the recorded captions."""
    captions = torch.zeros(len(CASE["class_names"]), 77, dtype=torch.long)
    for step in range(STEPS):
        captions[RECORDED[f"batch.{step}.labels"]] = RECORDED[f"batch.{step}.clip_caption_ids"]
    assert int((captions.sum(dim=1) > 0).sum()) == len(captions)
    return ClipGuide(recorded_clip("tiny_clip"), ClassPrompts(tuple(CASE["class_names"]), ("{}",), captions))


def candidates() -> Candidates:
    """Class names in the record's vocabulary of words, without the newline."""
    vocabulary = facts("tiny_llava")["vocab"]
    ids = tuple(tuple(vocabulary[word] for word in name.split()) for name in CASE["class_names"])
    return Candidates(tuple(CASE["class_names"]), ids, include_end=False)


def objective_of(settings: dict[str, Any], **more: Any) -> TVPObjective:
    weights = {"fca_weight": settings["fca"], "tse_weight": settings["tse"]}
    return TVPObjective(candidates(), **weights, tse_clip=guide(), **more)


@pytest.mark.parametrize("run", ["readme", "strong"])
def test_loss_terms_gradients_and_prompts_of_three_steps(run: str):
    """`strong` weighs FCA and TSE so that an error in either shows in the prompt."""
    settings, model, dataset = CASE["runs"][run], prompted(run), RecordedQuestions()
    objective = objective_of(settings)
    objective.prepare(model, dataset)
    optimizer = objective.optimizer(model, learning_rate=settings["lr"])
    prompt = prompt_layer_of(model).prompts["default"]
    for step, expected in enumerate(settings["steps"]):
        objective.epoch_start(model, dataset, step)
        terms = objective(model.train(), batch_of_step(step)).loss_terms
        assert terms["language"].item() == pytest.approx(expected["lm_loss"], abs=2e-5)
        assert terms["fca"].item() == pytest.approx(settings["fca"] * expected["fca_term"], abs=2e-5)
        assert terms["tse"].item() == pytest.approx(settings["tse"] * -expected["tse_term"], abs=2e-5)
        assert sum(terms.values()).item() == pytest.approx(expected["total"], abs=2e-5)
        optimizer.zero_grad()
        sum(terms.values()).backward()
        # the official code averages over the batch twice, which its normalisation takes away again
        gradient = 4 * RECORDED[f"{run}.grad_mean.{step}"]
        assert_close(prompt.grad, gradient, rtol=0, atol=1e-5 * float(gradient.abs().max()))
        optimizer.step()
        assert_close(prompt_of(model), RECORDED[f"{run}.perturbation.{step + 1}"], rtol=0, atol=1e-5)


def test_visual_tokens_with_and_without_the_prompt():
    """What enters the language model, recorded inside the model's own forward pass."""
    model, batch = prompted("readme"), batch_of_step(1)
    with torch.no_grad():
        prompt_layer_of(model).prompts["default"].copy_(RECORDED["readme.perturbation.1"])
        inputs = {name: batch[name] for name in ("input_ids", "attention_mask", "pixel_values")}
        with record_visual_tokens(model) as recorded:
            model(**inputs)
        assert_close(recorded.tokens, RECORDED["features.prompted.1"].flatten(0, 1), rtol=0, atol=1e-5)
        with without_prompt(model):
            clean = encode_visual_tokens(model, batch)
        assert_close(clean, RECORDED["features.clean.1"].flatten(0, 1), rtol=0, atol=1e-5)


@pytest.mark.parametrize("through_the_objective", [True, False])
def test_likelihood_scores_of_class_names(through_the_objective: bool):
    """Mean log-probability of each name's tokens, the newline not counted, behind the training batch's question."""
    model, batch = prompted("readme"), batch_of_step(0)
    with torch.no_grad():
        prompt_layer_of(model).prompts["default"].copy_(RECORDED["readme.perturbation.3"])
    expected = RECORDED["readme.eval_scores_batch0"]
    if through_the_objective:
        scores = objective_of(CASE["runs"]["readme"]).predict(model, batch)
    else:
        start = int((batch["token_labels"] != -100).int().argmax(dim=1).min())
        inputs = {"input_ids": batch["input_ids"][:, :start], "attention_mask": batch["attention_mask"][:, :start]}
        scores = candidate_scores(model, inputs | {"pixel_values": batch["pixel_values"]}, candidates())
    assert_close(scores, expected, rtol=0, atol=1e-5)


def test_the_preset_is_the_recorded_recipe():
    """The command of the official README, whose rate stays at 10 in its single epoch."""
    preset, recorded = preset_for("cifar10"), CASE["runs"]["readme"]
    assert preset.objective == {"fca_weight": recorded["fca"], "tse_weight": recorded["tse"]}
    assert preset.training["learning_rate"] == recorded["lr"]
    assert preset.training["warmup_epochs"] == 0
    assert preset_for("script").objective == {"fca_weight": 0, "tse_weight": 0}
    with pytest.raises(ValueError, match=r"\('cifar10', 'script'\), got 'imagenet'"):
        preset_for("imagenet")
