"""CPL against the official code: the greedy search, counterfactuals, loss terms, gradients, a run, and the mask's bug.

`CF2` is the official code with one line corrected, so that it mixes element by element; `CF1` is the code as it is.
Tolerances are those of the record, 5 to 100 times the error of an independent Hugging Face implementation.
"""

import pytest
import torch
from peft import get_peft_model
from torch.nn.functional import normalize
from torch.testing import assert_close

from peft_vlm import CoCoOpConfig, CPLObjective
from peft_vlm.methods.cpl import greedy_target
from peft_vlm.models.towers import image_features, text_features
from peft_vlm.text import tokenize_for_model
from tests.parity.recorded import (
    RecordedImages,
    assert_close_to_max,
    facts,
    official_run,
    recorded_clip,
    recorded_tokenizer,
    tensors,
)

CASE, RECORDED = facts("CF2_cpl_elementwise"), tensors("CF2_cpl_elementwise")
TOLERANCE = CASE["tolerance"]
NAMES = {"cocoop_prompt": "text_ctx"}
NAMES |= {f"cocoop_{part}{n}": f"meta_net.linear{n}.{part}" for n in (1, 2) for part in ("weight", "bias")}


def parts(model) -> dict[str, torch.nn.Parameter]:
    """Trained tensors by their recorded names, but for the mask."""
    found = {NAMES[n.split(".")[-2]]: p for n, p in model.named_parameters() if p.requires_grad}
    assert len(found) == 5
    return found


def setup(recorded=RECORDED):
    """The tiny CLIP with the recorded adapter, and the objective with the recorded mask and target."""
    tokenizer, words = recorded_tokenizer(), CASE["ctx_init"]
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    model = get_peft_model(recorded_clip("weights_student"), CoCoOpConfig(context_init=words, context_init_ids=ids))
    prompts = tokenize_for_model(model, tokenizer, CASE["classnames"], template=f"{words} {{}}.")
    objective = CPLObjective(prompts, image_cache="none")
    labels = range(len(CASE["classnames"]))
    pixels = recorded["in.images"].flatten(0, 1)[[0] * len(labels)]
    objective.prepare(model, RecordedImages(pixels, torch.tensor(labels), CASE["classnames"]))
    with torch.no_grad():
        for name, parameter in parts(model).items():
            parameter.copy_(recorded[f"in.{name}"])
        objective.mask.copy_(recorded["in.mask"].T)
    objective.target = recorded["in.mask_target"].T.clone()
    return model.train(), objective


def step(model, objective, recorded, index: int):
    """The output for a recorded image and its negative."""
    (label,) = recorded["in.labels"][index]
    with torch.no_grad():
        (negative,) = normalize(image_features(model, recorded["in.negative_images"][index]), dim=-1)
    objective.negatives[label] = negative
    return objective(model, {"pixel_values": recorded["in.images"][index], "labels": label[None]})


def test_counterfactual_loss_terms_and_gradients():
    """A contrast over the label alone, with the logit scale, or a mean of the mask's norm over classes: each shows."""
    model, objective = setup()
    output = step(model, objective, RECORDED, 0)
    assert_close(output.logits.detach(), RECORDED["expected.logits"], rtol=0, atol=TOLERANCE["logits_atol"])
    labels, images = RECORDED["in.labels"][0], RECORDED["in.images"][0]
    assert_close(objective.masks(labels)[0].detach(), RECORDED["expected.mask_column"], rtol=0, atol=1e-6)
    with torch.no_grad():
        found = objective.counterfactuals(image_features(model, images), labels)[0]
    expected = RECORDED["expected.counterfactual_feature"]
    assert_close(found, expected, rtol=0, atol=TOLERANCE["features_atol"])
    terms = {name: term.item() for name, term in output.loss_terms.items()}
    assert terms["cross_entropy"] == pytest.approx(float(RECORDED["expected.step_loss_ce"][0]), rel=1e-5)
    assert terms["contrastive"] == pytest.approx(float(RECORDED["expected.step_loss_contrastive"][0]), rel=1e-5)
    assert terms["contrastive"] == pytest.approx(float(RECORDED["expected.contrastive_per_class"].mean()), rel=1e-5)
    norm = float(RECORDED["expected.step_loss_norm"][0])
    assert terms["mask_norm"] == pytest.approx(CASE["norm_weight"] * norm, rel=1e-5)
    output.loss.backward()
    for name, parameter in parts(model).items():
        assert_close_to_max(parameter.grad, RECORDED[f"expected.grad.{name}"], TOLERANCE["grads_rtol_of_max"])
    assert_close_to_max(objective.mask.grad.T, RECORDED["expected.grad.mask"], TOLERANCE["grads_rtol_of_max"])


def test_a_run_of_three_epochs_moves_the_mask_too():
    """Rates, momentum and decay of the mask are those of the adapter; evaluation is plain CoCoOp."""
    model, objective = setup()
    hyper = CASE["optimiser"]
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    steps = (step(model, objective, RECORDED, index).loss for index in range(len(RECORDED["in.images"])))
    losses, rates = official_run(objective.param_groups(named)["all"], hyper, steps)
    assert losses == pytest.approx(RECORDED["expected.step_losses"].tolist(), rel=1e-5)
    assert rates == pytest.approx(RECORDED["expected.step_lrs"].tolist(), rel=1e-6)
    found = {name: p.detach() for name, p in parts(model).items()} | {"mask": objective.mask.detach().T}
    for name, actual in found.items():
        final = RECORDED[f"expected.final.{name}"]
        change = float((final - RECORDED[f"in.{name}"]).abs().max())
        atol = TOLERANCE["final_rtol_of_max_change"] * change + TOLERANCE["final_atol"]
        assert_close(actual, final, rtol=0, atol=atol)
    with torch.no_grad():
        logits = objective.predict(model.eval(), {"pixel_values": RECORDED["in.eval_images"]})
    assert_close(logits, RECORDED["expected.final.eval_logits"], rtol=0, atol=TOLERANCE["logits_atol"])


def test_the_official_code_mixes_by_one_number_of_the_mask():
    """Its mask of shape (dim, 1) makes an outer product, of which one row is read: a mask of u[0, y] everywhere."""
    recorded = tensors("CF1_cpl_verbatim")
    model, objective = setup(recorded)
    output = step(model, objective, recorded, 0)
    labels, negatives = recorded["in.labels"][0], objective.negatives
    assert negatives is not None
    assert_close(objective.masks(labels)[0].detach(), recorded["expected.mask_column"], rtol=0, atol=1e-6)
    with torch.no_grad():
        features = image_features(model, recorded["in.images"][0])
        ours = objective.counterfactuals(features, labels)[0]
        first, unit = objective.masks(labels)[0, 0], normalize(features, dim=-1)[0]
        verbatim = normalize((1 - first) * unit + first * negatives[labels[0]], dim=-1)
    expected = recorded["expected.counterfactual_feature"]
    assert_close(verbatim, expected, rtol=0, atol=TOLERANCE["features_atol"])
    assert (ours - expected).abs().max() > 100 * TOLERANCE["features_atol"]
    contrast = float(recorded["expected.step_loss_contrastive"][0])
    assert abs(output.loss_terms["contrastive"].item() - contrast) > 1e-3 * contrast
    # with a mask that is u[0, y] everywhere, the right equation gives the recorded loss
    objective.target, objective.momentum = first.expand_as(objective.target), 1.0
    again = step(model, objective, recorded, 0)
    assert again.loss_terms["contrastive"].item() == pytest.approx(contrast, rel=1e-5)
    assert again.loss_terms["cross_entropy"].item() == pytest.approx(
        float(recorded["expected.step_loss_ce"][0]), rel=1e-5
    )


def test_the_greedy_search_finds_the_recorded_dimensions():
    """Exactly, the last dimension included that is taken where no exchange gives a positive score."""
    recorded, model = tensors("CF3_cpl_greedy_mask"), recorded_clip("weights_student")
    labels, others = recorded["in.labels"], recorded["in.negative_labels"]
    with torch.no_grad():
        features, negatives = (image_features(model, recorded[f"in.{name}"]) for name in ("images", "negative_images"))
        texts = text_features(model, recorded["in.name_input_ids"])
    for actual, name in ((features, "image"), (negatives, "negative"), (texts, "name_text")):
        assert_close(actual, recorded[f"expected.{name}_features_raw"], rtol=0, atol=1e-5)
    target = torch.full((len(texts), features.shape[-1]), -1.0)
    target[labels] = greedy_target(features, negatives, texts[labels], texts[others])
    assert torch.equal(target.T, recorded["expected.mask_target"])
    assert (target[labels] == 1).sum(dim=-1).tolist() == recorded["expected.num_edits"].tolist()
