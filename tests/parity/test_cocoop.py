"""CoCoOp against the official code: the shift of the context, logits, gradients, and the official file.

Tolerances are those of the record, 5 to 100 times the error of an independent Hugging Face implementation.
"""

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import CoCoOpConfig, CoCoOpObjective
from peft_vlm.models.towers import image_features, towers_of
from peft_vlm.text import tokenize_for_model
from tests.parity.recorded import (
    RecordedImages,
    assert_close_to_max,
    facts,
    recorded_clip,
    recorded_tokenizer,
    tensors,
)

CASE, RECORDED = facts("F_cocoop"), tensors("F_cocoop")
TOLERANCE = CASE["tolerance"]
NAMES = {"cocoop_prompt": "text_ctx"}
NAMES |= {f"cocoop_{part}{n}": f"meta.linear{n}.{part}" for n in (1, 2) for part in ("weight", "bias")}


def parts(model) -> dict[str, torch.nn.Parameter]:
    """Trained tensors by their recorded names."""
    found = {NAMES[n.split(".")[-2]]: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(found) == 5
    return found


def setup(**settings):
    """The tiny CLIP with the recorded adapter, the objective and its images."""
    tokenizer, words = recorded_tokenizer(), CASE["ctx_init"]
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    model = get_peft_model(recorded_clip("weights_student"), CoCoOpConfig(context_init=words, context_init_ids=ids))
    with torch.no_grad():
        for name, parameter in parts(model).items():
            parameter.copy_(RECORDED[f"in.{name}"])
    prompts = tokenize_for_model(model, tokenizer, CASE["classnames"], template=f"{words} {{}}.")
    dataset = RecordedImages(RECORDED["in.images"], RECORDED["in.labels"], CASE["classnames"])
    return model, CoCoOpObjective(prompts, **settings), dataset


@pytest.mark.parametrize("image_cache", ["ram", "none"])
def test_logits_loss_and_gradients(image_cache):
    """A network on the feature as it is, or a shift of one vector only, shows in every number."""
    model, objective, dataset = setup(image_cache=image_cache)
    objective.prepare(model, dataset)
    objective.epoch_start(model, dataset, 0)
    batch = {"labels": RECORDED["in.labels"], "index": torch.arange(len(dataset))}
    output = objective(model, batch | {"pixel_values": RECORDED["in.images"]})
    assert_close(output.logits.detach(), RECORDED["expected.logits"], rtol=0, atol=TOLERANCE["logits_atol"])
    assert output.loss.item() == pytest.approx(float(RECORDED["expected.loss_ce"]), rel=1e-5)
    output.loss.backward()
    for name, parameter in parts(model).items():
        assert_close_to_max(parameter.grad, RECORDED[f"expected.grad.{name}"], TOLERANCE["grads_rtol_of_max"])


def test_the_shift_is_that_of_the_normalised_image_feature():
    model, _, _ = setup()
    layer = towers_of(model).token_embedding
    with torch.no_grad():
        shifts = layer.shifts(image_features(model, RECORDED["in.images"]))
        for (shift,), expected in zip(shifts, RECORDED["expected.meta_bias"], strict=True):
            with layer.shifted_by(shift[None]):
                moved = layer.active_prompt(shift) - RECORDED["in.text_ctx"]
            assert_close(moved, expected.expand_as(moved), rtol=0, atol=1e-5)


def test_predictions_are_those_of_the_objective():
    model, objective, _ = setup()
    with torch.no_grad():
        logits = objective.predict(model.eval(), {"pixel_values": RECORDED["in.images"]})
    assert_close(logits, RECORDED["expected.logits"], rtol=0, atol=TOLERANCE["logits_atol"])
