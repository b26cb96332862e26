"""PRE against the official code: encoded contexts, logits, gradients of vectors and network, a run, and its collapse.

Tolerances are those of the record, 5 to 100 times the error of an independent Hugging Face implementation.
"""

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import CoOpConfig, PREObjective
from peft_vlm.models.towers import towers_of
from peft_vlm.text import encode_classes, tokenize_for_model
from tests.parity.recorded import (
    RecordedImages,
    assert_close_to_max,
    facts,
    official_run,
    recorded_clip,
    recorded_tokenizer,
    tensors,
)

CASES = {"RE1_pre_lstm_words4": "lstm", "RE2_pre_mlp_random6": "mlp", "RE3_pre_lstm_csc3": "lstm"}
MLP = {"weight1": "0.weight", "bias1": "0.bias", "weight2": "2.weight", "bias2": "2.bias"}


def parts(model) -> dict[str, torch.nn.Parameter]:
    """Trained tensors by their recorded names."""
    found = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad and "coop_network" in name:
            last = name.rpartition(".")[2]
            found[f"mlp.{MLP[last]}" if last in MLP else f"lstm.{last}"] = parameter
        elif parameter.requires_grad:
            found["text_ctx"] = parameter
    return found


def setup(name: str):
    """The tiny CLIP with the recorded vectors and network, the objective, case and record."""
    case, recorded, tokenizer = facts(name), tensors(name), recorded_tokenizer()
    words, clip = case["ctx_init"] or None, recorded_clip("weights_student")
    template = f"{words} {{}}." if words else "{}."
    prompts = tokenize_for_model(clip, tokenizer, case["classnames"], template=template)
    specific = case["class_specific_context"]
    config = CoOpConfig(
        num_text_tokens=case["n_ctx"],
        context_init=words,
        context_init_ids=tokenizer(words, add_special_tokens=False)["input_ids"] if words else None,
        class_position=case["class_token_position"],
        class_specific=specific,
        class_token_ids=prompts.input_ids.tolist() if specific else None,
        network=CASES[name],
    )
    model = get_peft_model(clip, config)
    with torch.no_grad():
        for part, parameter in parts(model).items():
            parameter.copy_(recorded[f"in.{part}"])
    return model, PREObjective(prompts, image_cache="none"), case, recorded


def step(model, objective, recorded, index: int):
    """Loss and logits of a recorded batch."""
    return objective(model, {"pixel_values": recorded["in.images"][index], "labels": recorded["in.labels"][index]})


@pytest.mark.parametrize("name", CASES)
def test_encoded_context_logits_and_gradients(name):
    """Without the residual, with another hidden size or direction, the context alone shows it."""
    model, objective, case, recorded = setup(name)
    tolerance = case["tolerance"]
    context = towers_of(model).token_embedding.context("default").detach()
    assert_close(context, recorded["expected.encoded_ctx"], rtol=0, atol=1e-5)
    dataset = RecordedImages(recorded["in.images"][0], recorded["in.labels"][0], case["classnames"])
    objective.prepare(model, dataset)
    output = step(model, objective, recorded, 0)
    assert_close(output.logits.detach(), recorded["expected.logits"], rtol=0, atol=tolerance["logits_atol"])
    assert output.loss.item() == pytest.approx(float(recorded["expected.step_losses"][0]), rel=1e-5)
    output.loss.backward()
    assert len(parts(model)) == (5 if CASES[name] == "mlp" else 9)
    for part, parameter in parts(model).items():
        expected = recorded[f"expected.grad.{part}"]
        assert_close_to_max(parameter.grad, expected, tolerance["grads_rtol_of_max"])
    features = encode_classes(model, objective.prompts)
    assert_close(features, recorded["expected.text_features"], rtol=0, atol=tolerance["features_atol"])


def test_a_run_of_three_epochs_and_its_collapse():
    """Rates, momentum and decay of the network too; afterwards the adapter is CoOp's, with the recorded logits."""
    model, objective, case, recorded = setup("RE1_pre_lstm_words4")
    hyper, tolerance = case["optimiser"], case["tolerance"]
    dataset = RecordedImages(recorded["in.images"][0], recorded["in.labels"][0], case["classnames"])
    objective.prepare(model, dataset)
    steps = (step(model, objective, recorded, index).loss for index in range(len(recorded["in.images"])))
    losses, rates = official_run((p for p in model.parameters() if p.requires_grad), hyper, steps)
    assert losses == pytest.approx(recorded["expected.step_losses"].tolist(), rel=1e-4)
    assert rates == pytest.approx(recorded["expected.step_lrs"].tolist(), rel=1e-6)
    towers_of(model).token_embedding.collapse("default")
    assert [part for part in parts(model)] == ["text_ctx"]
    with torch.no_grad():
        logits = objective.predict(model.eval(), {"pixel_values": recorded["in.eval_images"]})
    assert_close(logits, recorded["expected.final.eval_logits"], rtol=0, atol=tolerance["logits_atol"])
