"""CoOp against the official code: token ids, features, logits, loss and the gradient of the context."""

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import CoOpConfig, CoOpObjective
from peft_vlm.methods.coop import preset_for
from peft_vlm.text import encode_classes, reserve_slots, tokenize_for_model
from peft_vlm.training.schedule import epoch_cosine
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

CASES = [
    "E1_coop_words4_end",
    "E2_coop_random16_end",
    "E3_coop_random16_middle",
    "E4_coop_random16_front",
    "E5_coop_csc16_end",
    "E6_coop_csc4_middle",
    "E7_coop_punct4_front",
]


def setup(name: str):
    """The tiny CLIP with the case's adapter, its prompts from the class names, and the record."""
    case, recorded, tokenizer = facts(name), tensors(name), recorded_tokenizer()
    words = case["ctx_init"]
    template = f"{words} {{}}." if words else "{}."
    clip = recorded_clip("weights_student")
    prompts = tokenize_for_model(clip, tokenizer, case["classnames"], template=template)
    specific = bool(case.get("class_specific_context"))
    config = CoOpConfig(
        num_text_tokens=16 if words else case["n_ctx"],
        context_init=words,
        context_init_ids=tokenizer(words, add_special_tokens=False)["input_ids"] if words else None,
        class_position=case["class_token_position"],
        class_specific=specific,
        class_token_ids=prompts.input_ids.tolist() if specific else None,
    )
    model = get_peft_model(clip, config)
    return case, recorded, model, prompts


@pytest.mark.parametrize("name", CASES)
def test_token_ids_are_the_recorded_ones_with_slots_for_the_context(name: str):
    """Also where the last punctuation of a name merges with the final '.', which the official slice swallows."""
    case, recorded, model, prompts = setup(name)
    ids = reserve_slots(model, prompts).input_ids
    mask = (ids == 640) & (torch.arange(ids.shape[1]) > 0)
    assert mask.sum(dim=1).tolist() == [case["n_ctx"]] * len(case["classnames"])
    position, count = case["class_token_position"], case["n_ctx"]
    before = {"end": count, "middle": count // 2, "front": 0}[position]
    for row, token_row, mask_row, length in zip(
        ids, recorded["in.input_ids"], mask, case["class_token_counts"], strict=True
    ):
        official = token_row.tolist()
        official = official[: official.index(641) + 1]
        body = official[1 + count :]
        expected = [640, *[640] * before, *body[:length], *[640] * (count - before), *body[length:]]
        assert row[: len(expected)].tolist() == expected
        assert int(mask_row.sum()) == count


@pytest.mark.parametrize("name", CASES)
@pytest.mark.parametrize("image_cache", ["ram", "none"])
def test_logits_features_loss_and_gradient(name: str, image_cache: str):
    case, recorded, model, prompts = setup(name)
    if case.get("class_specific_context"):
        with torch.no_grad():
            prompt_tensors(model, prefix="coop_")["text_ctx"][0].copy_(recorded["in.text_ctx"])
    else:
        load_prompts(model, recorded, prefix="coop_")
    tolerance = case["tolerance"]
    dataset = RecordedImages(recorded["in.images"], recorded["in.labels"], case["classnames"])
    objective = CoOpObjective(prompts, image_cache=image_cache)
    objective.prepare(model, dataset)
    objective.epoch_start(model, dataset, 0)
    batch = {"labels": recorded["in.labels"], "index": torch.arange(len(dataset))}
    batch["pixel_values"] = recorded["in.images"]
    output = objective(model, batch)
    assert_close(output.logits, recorded["expected.logits"], rtol=0, atol=tolerance["logits_atol"])
    assert_close(output.loss, recorded["expected.loss_ce"], rtol=1e-5, atol=0)
    output.loss.backward()
    (context,) = prompt_tensors(model, prefix="coop_")["text_ctx"]
    assert_close_to_max(context.grad, recorded["expected.grad.text_ctx"], tolerance["grads_rtol_of_max"])
    features = encode_classes(model, prompts)
    assert_close(features, recorded["expected.text_features"], rtol=0, atol=tolerance["features_atol"])
    predicted = objective.predict(model, {"pixel_values": recorded["in.images"]}).detach()
    assert_close(predicted, recorded["expected.logits"], rtol=0, atol=tolerance["logits_atol"])


def test_the_context_starts_from_the_embeddings_of_its_words():
    """Of the words alone, without positions, as recorded for the prompts of the IVLP case."""
    _, _, model, _ = setup("E1_coop_words4_end")
    (context,) = prompt_tensors(model, prefix="coop_")["text_ctx"]
    assert torch.equal(context, tensors("B_ivlp_forward")["in.text_ctx"])


@pytest.mark.parametrize(("shots", "epochs"), [(1, 50), (2, 100), (4, 100), (8, 200), (16, 200)])
def test_presets_follow_the_official_schedule(shots: int, epochs: int):
    """The recorded schedule at 0.002 (50 epochs) is the preset for one shot; the others differ in length only."""
    training = preset_for(shots=shots).training
    assert training["num_train_epochs"] == epochs
    if epochs == 50:
        expected = tensors("S_schedules")["expected.lr_epochs50_base0.002"].tolist()
        assert len(expected) == epochs
        ours = [
            epoch_cosine(
                epoch,
                learning_rate=training["learning_rate"],
                num_epochs=epochs,
                warmup_epochs=training["warmup_epochs"],
                warmup_rate=training["warmup_learning_rate"],
            )
            for epoch in range(epochs)
        ]
        assert ours == pytest.approx(expected, rel=1e-9)
