"""KgCoOp against the official code: logits, both loss terms, the gradient of the context, the frozen class features.

Tolerances are those of the record, 5 to 100 times the error of an independent Hugging Face implementation.
"""

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import CoOpConfig, KgCoOpObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.text import encode_classes, tokenize_for_model
from tests.parity.recorded import (
    RecordedImages,
    assert_close_to_max,
    facts,
    load_prompts,
    prompt_tensors,
    recorded_clip,
    recorded_tokenizer,
    tensors,
)

CASE, RECORDED = facts("H_kgcoop"), tensors("H_kgcoop")


def setup(**settings):
    """The tiny CLIP with the recorded context, the objective of the record, and its images."""
    tokenizer, words = recorded_tokenizer(), CASE["ctx_init"]
    ids = tokenizer(words, add_special_tokens=False)["input_ids"]
    config = CoOpConfig(context_init=words, context_init_ids=ids)
    model = get_peft_model(recorded_clip("weights_student"), config)
    load_prompts(model, RECORDED, prefix="coop_")
    names = CASE["classnames"]
    prompts = tokenize_for_model(model, tokenizer, names, template=f"{words} {{}}.")
    anchors = tokenize_for_model(model, tokenizer, names, template=CASE["anchor_template"])
    weight = CASE["hyper"]["weight"]
    objective = KgCoOpObjective(prompts, anchor_prompts=anchors, weight=weight, **settings)
    return model, objective, RecordedImages(RECORDED["in.images"], RECORDED["in.labels"], names)


@pytest.mark.parametrize("image_cache", ["ram", "none"])
def test_logits_terms_and_gradient(image_cache: str):
    model, objective, dataset = setup(image_cache=image_cache)
    tolerance = CASE["tolerance"]
    objective.prepare(model, dataset)
    objective.epoch_start(model, dataset, 0)
    batch = {"labels": RECORDED["in.labels"], "index": torch.arange(len(dataset))}
    output = objective(model, batch | {"pixel_values": RECORDED["in.images"]})
    assert_close(output.logits, RECORDED["expected.logits"], rtol=0, atol=tolerance["logits_atol"])
    terms = {"cross_entropy": RECORDED["expected.loss_ce"], "knowledge": 8 * RECORDED["expected.loss_kg"]}
    assert output.loss_terms.keys() == terms.keys()
    for name, expected in terms.items():
        assert_close(output.loss_terms[name], expected, rtol=tolerance["losses_rtol"], atol=0)
    assert_close(output.loss, RECORDED["expected.loss_total"], rtol=tolerance["losses_rtol"], atol=0)
    output.loss.backward()
    (context,) = prompt_tensors(model, prefix="coop_")["text_ctx"]
    assert_close_to_max(context.grad, RECORDED["expected.grad.text_ctx"], tolerance["grads_rtol_of_max"])


def test_the_anchors_are_the_frozen_models_features_of_the_hand_written_prompts():
    """With the adapter switched on they would move with what they hold back."""
    model, objective, _ = setup()
    with model.disable_adapter():
        anchors = encode_classes(model, objective.anchor_prompts)
    assert_close(anchors, RECORDED["expected.anchor_text_features"], rtol=0, atol=1e-5)


def test_the_trainers_first_step_has_the_recorded_loss_and_gradient(tmp_path):
    """Plain SGD at rate 1 on all eight images: the context moves by minus the recorded gradient."""
    model, objective, dataset = setup()
    args = VLMTrainingArguments(
        output_dir=str(tmp_path),
        max_steps=1,
        per_device_train_batch_size=len(dataset),
        learning_rate=1.0,
        optim="sgd",
        momentum=0.0,
        weight_decay=0.0,
        max_grad_norm=0.0,
        logging_steps=1,
        save_strategy="no",
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = VLMTrainer(model, args, train_dataset=dataset, objective=objective)
    trainer.train()
    (loss,) = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert loss == pytest.approx(float(RECORDED["expected.loss_total"]), rel=1e-5)
    (context,) = prompt_tensors(model, prefix="coop_")["text_ctx"]
    moved = RECORDED["in.text_ctx"] - context.detach()
    assert_close_to_max(moved, RECORDED["expected.grad.text_ctx"], CASE["tolerance"]["grads_rtol_of_max"])
