"""MaPLe against the official code: projected tokens, features, logits, gradients; as MaPLe and folded to PromptSRC.

Tolerances are those of the record, 5 to 100 times the error of an independent Hugging Face implementation.
"""

import pytest
import torch
from peft import PeftModel, get_peft_model
from torch.testing import assert_close

from peft_vlm import MaPLeConfig, MaPLeObjective, PromptSRCConfig
from peft_vlm.methods.maple import fold
from peft_vlm.models.towers import image_features, towers_of
from peft_vlm.text import encode_classes, tokenize_for_model
from tests.parity.recorded import (
    RecordedImages,
    assert_close_to_max,
    facts,
    recorded_clip,
    recorded_tokenizer,
    tensors,
)

CASE, RECORDED = facts("G_maple"), tensors("G_maple")
TOLERANCE = CASE["tolerance"]


def recorded_parts(model, group: str) -> dict[str, tuple[torch.nn.Parameter, torch.Tensor]]:
    """Trained tensors of the model and the recorded ones, by our names."""
    names = {"maple_prompt": ("text_ctx", "text_deep")}
    names |= {f"maple_{part}": (f"shallow_proj.{part}", f"deep_proj.{part}") for part in ("weight", "bias")}
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            shallow, deep = names[name.split(".")[-2]]
            layer = int(name.partition("layers.")[2].partition(".")[0] or 0)
            recorded = RECORDED[f"{group}.{shallow}"] if layer == 0 else RECORDED[f"{group}.{deep}"][layer - 1]
            found[name] = (parameter, recorded)
    assert len(found) == 9  # text tokens, weight and bias in three layers
    return found


def setup():
    """The tiny CLIP with the recorded adapter, the objective and its images."""
    tokenizer, words = recorded_tokenizer(), CASE["ctx_init"]
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    config = MaPLeConfig(num_text_tokens=2, depth=3, context_init=words, context_init_ids=ids)
    model = get_peft_model(recorded_clip("weights_student"), config)
    with torch.no_grad():
        for parameter, recorded in recorded_parts(model, "in").values():
            parameter.copy_(recorded)
    prompts = tokenize_for_model(model, tokenizer, CASE["classnames"], template=f"{words} {{}}.")
    dataset = RecordedImages(RECORDED["in.images"], RECORDED["in.labels"], CASE["classnames"])
    return model, MaPLeObjective(prompts), dataset


def batch() -> dict[str, torch.Tensor]:
    return {"labels": RECORDED["in.labels"], "pixel_values": RECORDED["in.images"]}


def test_logits_loss_and_gradients():
    """The gradient of a text token sums those of both towers; one through the projection alone is smaller."""
    model, objective, dataset = setup()
    objective.prepare(model, dataset)
    output = objective(model, batch())
    assert_close(output.logits.detach(), RECORDED["expected.logits"], rtol=0, atol=TOLERANCE["logits_atol"])
    assert output.loss.item() == pytest.approx(float(RECORDED["expected.loss_ce"]), rel=1e-5)
    output.loss.backward()
    for parameter, expected in recorded_parts(model, "expected.grad").values():
        assert_close_to_max(parameter.grad, expected, TOLERANCE["grads_rtol_of_max"])


def test_the_vision_tokens_are_projections_of_the_text_tokens():
    model, _, _ = setup()
    towers, like = towers_of(model), torch.empty(0)
    assert_close(towers.vision_embeddings.active_prompt(like), RECORDED["expected.vision_shallow"], rtol=0, atol=1e-5)
    deep = torch.stack([layer.active_prompt(like) for layer in towers.vision_layers[1:3]])
    assert_close(deep, RECORDED["expected.vision_deep"], rtol=0, atol=1e-5)


@pytest.mark.parametrize("folded", [False, True])
def test_features_as_maple_and_as_promptsrc(folded, tmp_path):
    """A folded adapter that still needed its projections, or lost a layer, would give other features."""
    model, objective, _ = setup()
    if folded:
        fold(model, tmp_path / "folded")
        model = PeftModel.from_pretrained(recorded_clip("weights_student"), tmp_path / "folded")
        assert isinstance(model.active_peft_config, PromptSRCConfig)
    features = encode_classes(model.eval(), objective.prompts)
    assert_close(features, RECORDED["expected.text_features"], rtol=0, atol=TOLERANCE["features_atol"])
    with torch.no_grad():
        own = torch.nn.functional.normalize(image_features(model, RECORDED["in.images"]), dim=-1)
    assert_close(own, RECORDED["expected.image_features"], rtol=0, atol=TOLERANCE["features_atol"])
