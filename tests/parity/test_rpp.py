"""POMP's class sampling, with CoOp as the prompt, against the official code; RPP itself has no official code.

Tolerances: the record's own independent implementation on Hugging Face models reached a relative error of 1.2e-6 in
the gradient of the context; 5e-6 of the largest entry leaves room for other orders of summation.
"""

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F
from torch.testing import assert_close

from peft_vlm import CoOpConfig, RPPObjective
from peft_vlm.losses import false_negatives, local_correction, sample_negatives, sampled_logits
from peft_vlm.models.towers import towers_of
from peft_vlm.text import ClassPrompts
from tests.parity.recorded import assert_close_to_max, facts, recorded_clip, tensors

FORMS = {"ln": "local_correction_ln", "log10": "local_correction_log10", "none": "no_correction"}
RECORD = tensors("P1_pomp")
NUM_CLASSES = len(RECORD["prompt_token_ids"])


def prompted_clip():
    """The tiny CLIP with the recorded context, and the recorded prompts with their four places reserved."""
    model = get_peft_model(recorded_clip("tiny_clip"), CoOpConfig(num_text_tokens=4, context_init=None))
    with torch.no_grad():
        towers_of(model).token_embedding.prompts["default"].copy_(RECORD["ctx_init"])
    ids = RECORD["prompt_token_ids"].clone()
    ids[:, 1:5] = model.active_peft_config.placeholder_id
    names = tuple(f"class {number}" for number in range(NUM_CLASSES))
    return model, ClassPrompts(names, ("{}.",), ids, slots=model.active_peft_config.slots)


class RecordedDraw(RPPObjective):
    """The objective with the recorded negatives: the official draw comes from the global generator."""

    def _draw(self, index: torch.Tensor) -> torch.Tensor:
        return RECORD["negatives"]


def test_the_negatives_are_those_of_the_official_draw():
    generator = torch.Generator().manual_seed(4242)
    assert torch.equal(sample_negatives(NUM_CLASSES, 9, generator=generator), RECORD["negatives"])


@pytest.mark.parametrize("form", FORMS)
def test_logits_loss_and_gradient_of_the_context(form: str):
    """The base-10 form is what the official repository computes since April 2023; ln is what its paper derives."""
    model, prompts = prompted_clip()
    towers, labels, negatives = towers_of(model), RECORD["labels"], RECORD["negatives"]
    text = towers.finish_text(towers.embed_text(prompts.input_ids), prompts.input_ids, 0)
    assert_close(F.normalize(text.detach(), dim=-1), RECORD["text_features_all"], rtol=0, atol=1e-5)
    logits = towers.similarity_logits(RECORD["image_features"], text)
    rejected = false_negatives(labels, negatives)
    assert rejected.sum(dim=1).tolist() == facts("P1_pomp")["results"][FORMS[form]]["rejected_per_image"]
    correction = local_correction(rejected, num_classes=NUM_CLASSES, form=form)
    sampled = sampled_logits(logits.gather(1, labels[:, None])[:, 0], logits[:, negatives], rejected, correction)
    expected = RECORD[f"{FORMS[form]}.logits"]
    valid = F.pad(~rejected, (1, 0), value=True)
    assert_close(sampled.detach()[valid], expected[valid], rtol=0, atol=5e-5)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("chunk_size", [4, 256])
def test_loss_and_gradient_of_the_objective_on_a_coop_adapter(form: str, chunk_size: int):
    """From pixels, in one chunk of prompts and in several, with the recorded draw."""
    model, prompts = prompted_clip()
    objective = RecordedDraw(
        prompts, soft_weight=0, num_sampled_classes=10, correction=form, text_chunk_size=chunk_size
    )
    objective.prepare(model, None)
    index = torch.arange(len(RECORD["labels"]))
    batch = {"pixel_values": RECORD["pixel_values"], "labels": RECORD["labels"], "index": index}
    output = objective(model, batch)
    expected = facts("P1_pomp")["results"][FORMS[form]]["loss"]
    assert float(output.loss.detach()) == pytest.approx(expected, rel=2e-6)
    output.loss.backward()
    gradient = towers_of(model).token_embedding.prompts["default"].grad
    assert_close_to_max(gradient, RECORD[f"{FORMS[form]}.grad_ctx"], 5e-6)


def test_only_the_natural_logarithm_comes_near_the_full_softmax():
    """Mean of 400 draws, standard error about 0.05; the record has 5.478 (ln) and 3.920 (none), full 5.638."""
    model, prompts = prompted_clip()
    towers, labels = towers_of(model), RECORD["labels"]
    with torch.no_grad():
        text = towers.finish_text(towers.embed_text(prompts.input_ids), prompts.input_ids, 0)
        logits = towers.similarity_logits(RECORD["image_features"], text)
    generator, means = torch.Generator().manual_seed(0), {}
    for form in ("ln", "none"):
        losses = []
        for _ in range(400):
            negatives = sample_negatives(NUM_CLASSES, 9, generator=generator)
            rejected = false_negatives(labels, negatives)
            correction = local_correction(rejected, num_classes=NUM_CLASSES, form=form)
            positive = logits.gather(1, labels[:, None])[:, 0]
            sampled = sampled_logits(positive, logits[:, negatives], rejected, correction)
            losses.append(float(F.cross_entropy(sampled, torch.zeros(len(labels), dtype=torch.long))))
        means[form] = sum(losses) / len(losses)
    assert means["ln"] == pytest.approx(5.478, abs=0.15)
    assert means["none"] == pytest.approx(3.920, abs=0.15)
