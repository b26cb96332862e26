"""CLIP-LoRA against the official code: logits, losses, gradients, rates and tensors of several steps.

Tolerances are those of the record, 5 to 100 times the error of an independent Hugging Face implementation.
"""

import pytest
import torch
from peft import LoraConfig, get_peft_model
from torch import Tensor, nn
from torch.testing import assert_close
from transformers import get_scheduler

from peft_vlm import CLIPLoRAObjective
from peft_vlm.methods.clip_lora import preset_for
from peft_vlm.models.towers import image_features
from peft_vlm.text import encode_classes, tokenize_for_model
from tests.parity.recorded import (
    RecordedImages,
    assert_close_to_max,
    facts,
    recorded_clip,
    recorded_tokenizer,
    tensors,
)

PRESET = preset_for(shots=1)


class RecordedDropout(nn.Dropout):
    """Dropout with recorded masks: kept values are multiplied by 1 / (1 - p), as always."""

    def __init__(self, keep: Tensor, p: float) -> None:
        super().__init__(p)
        self.keep, self.step = keep, 0

    def forward(self, hidden: Tensor) -> Tensor:
        """The last layer of a tower asks for the query of one token only."""
        if not self.training:
            return hidden
        keep = self.keep[self.step, :, : hidden.shape[1]]  # (rows, tokens, width)
        return hidden * keep / (1 - self.p)


def setup(name: str):
    """The tiny CLIP with the recorded LoRA, the objective, and what was recorded."""
    case, recorded = facts(name), tensors(name)
    config = LoraConfig(**(PRESET.config | {"lora_dropout": case["dropout"]}))
    model = get_peft_model(recorded_clip("weights_student"), config)
    load(model, recorded, "in")
    prompts = tokenize_for_model(model, recorded_tokenizer(), case["classnames"], template=case["template"])
    return model, CLIPLoRAObjective(prompts), case, recorded


def parts(model: nn.Module) -> dict[str, nn.Parameter]:
    """Trained tensors by their recorded names."""
    named = {name: p for name, p in model.named_parameters() if p.requires_grad}
    return {name.removeprefix("base_model.model.").removesuffix(".default.weight"): p for name, p in named.items()}


@torch.no_grad()
def load(model: nn.Module, recorded: dict[str, Tensor], group: str) -> None:
    for name, parameter in parts(model).items():
        parameter.copy_(recorded[f"{group}.{name}"])


def put_masks(model: nn.Module, recorded: dict[str, Tensor], p: float) -> list[RecordedDropout]:
    """Replace each LoRA's dropout by the recorded one."""
    masks = []
    for name, module in model.get_base_model().named_modules():
        if hasattr(module, "lora_dropout"):
            mask = RecordedDropout(recorded[f"in.dropout_keep.{name}"], p)
            module.lora_dropout["default"] = mask
            masks.append(mask)
    return masks


def batch(recorded: dict[str, Tensor], step: int) -> dict[str, Tensor]:
    return {"pixel_values": recorded["in.images"][step], "labels": recorded["in.labels"][step]}


def trained(name: str):
    """Losses, rates and model after all recorded steps, by the preset's optimizer and schedule."""
    model, objective, case, recorded = setup(name)
    hyper, tolerance = case["optimiser"], case["tolerance"]
    masks = put_masks(model, recorded, case["dropout"]) if case["dropout"] else []
    images, labels = recorded["in.images"], recorded["in.labels"]
    dataset = RecordedImages(images.flatten(0, 1), labels.flatten(), case["classnames"])
    objective.prepare(model.train(), dataset)
    optimizer = torch.optim.AdamW(
        model.parameters(), lr=hyper["lr"], betas=tuple(hyper["betas"]), weight_decay=PRESET.training["weight_decay"]
    )
    schedule = get_scheduler(
        PRESET.training["lr_scheduler_type"],
        optimizer,
        num_warmup_steps=0,
        num_training_steps=hyper["T_max"],
        scheduler_specific_kwargs=PRESET.training["lr_scheduler_kwargs"],
    )
    losses, rates = [], []
    for step in range(len(images)):
        for mask in masks:
            mask.step = step
        output = objective(model, batch(recorded, step))
        if step == 0:
            assert_close(output.logits.detach(), recorded["expected.logits"], rtol=0, atol=tolerance["logits_atol"])
        optimizer.zero_grad()
        output.loss.backward()
        if step == 0:
            assert len(parts(model)) == 48
            for part, parameter in parts(model).items():
                expected = recorded[f"expected.grad.{part}"]
                assert_close_to_max(parameter.grad, expected, tolerance["grads_rtol_of_max"])
        losses.append(output.loss.item())
        rates.append(schedule.get_last_lr()[0])
        optimizer.step()
        schedule.step()
    return model, losses, rates, case, recorded


@pytest.mark.parametrize("name", ["LO1_lora_qkv_both", "LO2_lora_dropout"])
def test_logits_gradients_and_tensors_of_all_steps(name):
    """`alpha / r` in place of `alpha / sqrt(r)`, one mask for three projections, decay of nothing: each shows here."""
    model, losses, rates, case, recorded = trained(name)
    tolerance = case["tolerance"]
    assert losses == pytest.approx(recorded["expected.step_losses"].tolist(), rel=1e-4)
    assert rates == pytest.approx(recorded["expected.step_lrs"].tolist(), rel=1e-5)
    for part, parameter in parts(model).items():
        start, final = recorded[f"in.{part}"], recorded[f"expected.final.{part}"]
        change = float((final - start).abs().max())
        atol = tolerance["final_rtol_of_max_change"] * change + tolerance["final_atol"]
        assert_close(parameter.detach(), final, rtol=0, atol=atol)
    model.eval()
    with torch.no_grad():
        images = nn.functional.normalize(image_features(model, recorded["in.eval_images"]), dim=-1)
    prompts = tokenize_for_model(model, recorded_tokenizer(), case["classnames"], template=case["template"])
    cosines = images @ encode_classes(model, prompts).T
    assert_close(cosines, recorded["expected.final.eval_cosines"], rtol=0, atol=5e-5)


def test_without_dropout_the_official_gradients_are_not_those_of_its_loss():
    """The update has left its weight when the backward pass reads it; ours are the derivatives of the loss."""
    model, objective, case, recorded = setup("LO3_lora_zero_dropout_branch")
    images, labels = recorded["in.images"], recorded["in.labels"]
    objective.prepare(model, RecordedImages(images.flatten(0, 1), labels.flatten(), case["classnames"]))
    loss = objective(model, batch(recorded, 0)).loss
    assert loss.item() == pytest.approx(float(recorded["expected.step_losses"][0]), rel=1e-5)
    loss.backward()
    official = {part: recorded[f"expected.grad.{part}"] for part in parts(model)}
    errors = {
        part: float((p.grad - official[part]).abs().max() / official[part].abs().max())
        for part, p in parts(model).items()
    }
    assert len(errors) == 48
    assert max(errors.values()) > 0.02
    # the last layers' own tensors get no gradient through another adapted layer, so there both are right
    assert errors["text_model.encoder.layers.3.self_attn.v_proj.lora_B"] < 1e-4
    part, step = max(errors, key=errors.__getitem__), 1e-3
    parameter = parts(model)[part]
    direction = torch.sign(parameter.grad)
    with torch.no_grad():
        values = []
        for sign in (1, -1):
            parameter += sign * step * direction
            values.append(objective(model, batch(recorded, 0)).loss.item())
            parameter -= sign * step * direction
    slope = (values[0] - values[1]) / (2 * step)
    assert slope == pytest.approx(float((parameter.grad * direction).sum()), rel=0.02)
