"""Bayesian prompts against the official code: sampled contexts, averaged probabilities, gradients, a run.

The recorded noise takes the place of the adapter's own. Tolerances are those of the record, 5 to 100 times the error
of an independent Hugging Face implementation.
"""

import re

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import BayesianConfig, BayesianObjective
from peft_vlm.methods.bayesian.model import Sampling
from peft_vlm.models.towers import image_features, towers_of
from peft_vlm.text import encode_classes, tokenize_for_model
from peft_vlm.text.class_features import conditioned_context
from tests.parity.recorded import (
    RecordedImages,
    assert_close_to_max,
    facts,
    official_run,
    recorded_clip,
    recorded_tokenizer,
    tensors,
)

CASES = ("BP1_bayes_unconditional", "BP2_bayes_conditional")
NAMES = {"mean": "posterior_mean", "log_variance": "posterior_logvar"}
NETWORKS = {"mean_network": "mean_net", "log_variance_network": "logvar_net"}


def parts(model) -> dict[str, torch.nn.Parameter]:
    """Trained tensors by their recorded names."""
    found = {}
    for name, parameter in model.named_parameters():
        kind, last = re.search(r"bayesian_(\w+)\.default\.?(\w*)$", name).groups() if parameter.requires_grad else "  "
        if kind in NETWORKS:
            part, number = last[:-1], 2 * (int(last[-1]) - 1)
            found[f"{NETWORKS[kind]}.{number}.{part}"] = parameter
        elif parameter.requires_grad:
            found[NAMES.get(kind, "text_ctx")] = parameter
    return found


def set_noise(model, noise: torch.Tensor) -> None:
    """Recorded draws, (samples, 1, width), in the place of the adapter's."""
    layer = towers_of(model).token_embedding
    layer.sampling["default"] = Sampling(noise[:, 0], layer.sees_image)


def setup(name: str):
    """The tiny CLIP with the recorded context and distribution, the objective, case and record."""
    case, recorded, tokenizer = facts(name), tensors(name), recorded_tokenizer()
    words = case["ctx_init"] or None
    clip = recorded_clip("weights_student")
    template = f"{words} {{}}." if words else "{}."
    prompts = tokenize_for_model(clip, tokenizer, case["classnames"], template=template)
    config = BayesianConfig(
        num_text_tokens=case["n_ctx"],
        context_init=words,
        context_init_ids=tokenizer(words, add_special_tokens=False)["input_ids"] if words else None,
        num_samples=case["num_samples"],
        conditional=case["variant"] == "cocoopvpt",
    )
    model = get_peft_model(clip, config).eval()
    found = parts(model)
    assert len(found) == (13 if config.conditional else 3)
    with torch.no_grad():
        for part, parameter in found.items():
            parameter.copy_(recorded[f"in.{part}"].view_as(parameter))
    return model, BayesianObjective(prompts, image_cache="none", kl_weight=case["kl_weight"]), case, recorded


def step(model, objective, recorded, index: int):
    """The output for a recorded batch and its draws."""
    set_noise(model, recorded["in.noise"][index])
    return objective(model, {"pixel_values": recorded["in.images"][index], "labels": recorded["in.labels"][index]})


def prepared(name: str):
    model, objective, case, recorded = setup(name)
    dataset = RecordedImages(recorded["in.images"][0], recorded["in.labels"][0], case["classnames"])
    objective.prepare(model, dataset)
    return model, objective, case, recorded


@pytest.mark.parametrize("name", CASES)
def test_probabilities_losses_and_gradients(name):
    """Averaged logits, a KL that is a sum, a standard deviation in the place of a log-variance: each shows."""
    model, objective, case, recorded = prepared(name)
    tolerance = case["tolerance"]
    output = step(model, objective, recorded, 0)
    atol = tolerance["logits_atol"]
    assert_close(output.logits.detach(), recorded["expected.log_probs"], rtol=0, atol=atol)
    terms = {key: term.item() for key, term in output.loss_terms.items()}
    assert terms["cross_entropy"] == pytest.approx(float(recorded["expected.step_task_losses"][0]), rel=1e-5)
    expected_kl = case["kl_weight"] * float(recorded["expected.step_kl"][0])
    assert terms["kl"] == pytest.approx(expected_kl, rel=1e-5)
    output.loss.backward()
    for part, parameter in parts(model).items():
        expected = recorded[f"expected.grad.{part}"].view_as(parameter)
        assert_close_to_max(parameter.grad, expected, tolerance["grads_rtol_of_max"])


@pytest.mark.parametrize("name", CASES)
@torch.no_grad()
def test_class_features_of_every_sample(name):
    model, objective, case, recorded = prepared(name)
    set_noise(model, recorded["in.noise"][0])
    layer, expected = conditioned_context(model), recorded["expected.text_features"]
    if not layer.sees_image:
        features = encode_classes(model, objective.prompts)
        assert_close(features, expected, rtol=0, atol=case["tolerance"]["features_atol"])
        return
    images = image_features(model, recorded["in.images"][0])
    for posterior, part in zip(layer.posterior(images), NAMES.values(), strict=True):
        assert_close(posterior, recorded[f"expected.{part}"], rtol=0, atol=1e-5)
    (shifts,) = layer.shifts(images)
    for shift, rows in zip(shifts, expected, strict=True):
        with layer.shifted_by(shift[None]):
            features = encode_classes(model, objective.prompts)
        assert_close(features, rows, rtol=0, atol=case["tolerance"]["features_atol"])


@pytest.mark.parametrize("name", CASES)
def test_a_run_of_three_epochs_and_its_evaluation(name):
    """Rates, momentum and decay, and the averaged probabilities of the evaluation images at the end."""
    model, objective, case, recorded = prepared(name)
    hyper, tolerance = case["optimiser"], case["tolerance"]
    steps = (step(model, objective, recorded, index).loss for index in range(len(recorded["in.images"])))
    losses, rates = official_run((p for p in model.parameters() if p.requires_grad), hyper, steps)
    assert losses == pytest.approx(recorded["expected.step_losses"].tolist(), rel=1e-5)
    assert rates == pytest.approx(recorded["expected.step_lrs"].tolist(), rel=1e-6)
    for part, parameter in parts(model).items():
        final = recorded[f"expected.final.{part}"]
        change = final - recorded[f"in.{part}"]
        atol = tolerance["final_rtol_of_max_change"] * float(change.abs().max()) + tolerance["final_atol"]
        assert_close(parameter.detach(), final.view_as(parameter), rtol=0, atol=atol)
    expected = recorded["expected.final.eval_log_probs"]
    assert_close(evaluated(model, objective, recorded), expected, rtol=0, atol=tolerance["logits_atol"])


@torch.no_grad()
def evaluated(model, objective, recorded) -> torch.Tensor:
    """Predictions with the recorded draws: of the batch, or, where each image has its own, image by image."""
    noise, pixels = recorded["in.eval_noise"], recorded["in.eval_images"]
    batches = [(noise, pixels)] if noise.ndim == 3 else list(zip(noise, pixels.split(1), strict=True))
    rows = []
    for draws, images in batches:
        set_noise(model, draws)
        objective._class_features.clear()  # which follow the weights, not a constant of the configuration
        rows.append(objective.predict(model.eval(), {"pixel_values": images}))
    return torch.cat(rows)
