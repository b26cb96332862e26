"""PromptSRC against the official code: forward, loss terms, gradients, training with aggregation, schedules."""

import pytest
import torch
from peft import get_peft_model
from torch.testing import assert_close

from peft_vlm import PromptSRCConfig, PromptSRCObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.methods.promptsrc import preset_for
from peft_vlm.methods.promptsrc.aggregation import gaussian_log_weights
from peft_vlm.methods.promptsrc.objective import frozen_class_features
from peft_vlm.models.towers import image_features
from peft_vlm.objective import EpochBatchSampler
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
    stacked,
    tensors,
)

PROMPTS = ["text_ctx", "text_deep", "vision_deep", "vision_shallow"]


def setup(name: str, **settings):
    """Model with the recorded prompts, prepared objective and dataset, record."""
    case, recorded, tokenizer = facts(name), tensors(name), recorded_tokenizer()
    words = tokenizer("a photo of a", add_special_tokens=False)["input_ids"]
    config = PromptSRCConfig(text_depth=3, vision_depth=3, context_init_ids=words)
    model = get_peft_model(recorded_clip("weights_student"), config)
    load_prompts(model, recorded, prefix="promptsrc_")
    assert sorted(prompt_tensors(model, prefix="promptsrc_")) == PROMPTS
    names, templates = case["classnames"], case.get("templates", "a photo of a {}.")
    prompts = tokenize_for_model(model, tokenizer, names, template="a photo of a {}.")
    frozen = tokenize_for_model(model, tokenizer, names, template=templates)
    objective = PromptSRCObjective(prompts, frozen_prompts=frozen, **settings)
    pixels, labels = recorded["in.images"].flatten(0, -4), recorded["in.labels"].flatten()
    dataset = RecordedImages(pixels, labels, names)
    objective.prepare(model, dataset)
    return case, recorded, model, objective, dataset


def check_gradients(model, recorded, tolerance: float) -> None:
    """Gradients of every prompt tensor."""
    found = prompt_tensors(model, prefix="promptsrc_")
    assert sorted(found) == PROMPTS
    for name, parameters in found.items():
        expected = recorded[f"expected.grad.{name}"]
        assert_close_to_max(stacked([p.grad for p in parameters], expected), expected, tolerance)


def batch_of(recorded) -> dict[str, torch.Tensor]:
    """The recorded batch."""
    labels = recorded["in.labels"]
    return {"pixel_values": recorded["in.images"], "labels": labels, "index": torch.arange(len(labels))}


def test_slots_stand_where_the_recorded_ids_have_the_words():
    case, recorded, model, objective, _ = setup("B_ivlp_forward")
    ids = reserve_slots(model, objective.prompts).input_ids
    expected = recorded["in.input_ids"][:, : ids.shape[1]].clone()
    expected[:, 1:5] = 640
    kept = torch.arange(ids.shape[1]) <= (expected == 641).int().argmax(dim=1)[:, None]
    assert len(ids) == len(case["classnames"])
    assert torch.equal(ids[kept], expected[kept])


def test_ivlp_forward_and_gradients():
    """All weights 0: logits, features, cross-entropy and its gradients for every prompt tensor."""
    case, recorded, model, objective, _ = setup("B_ivlp_forward", text_weight=0, image_weight=0, logit_weight=0)
    tolerance = case["tolerance"]
    output = objective(model, batch_of(recorded))
    assert list(output.loss_terms) == ["cross_entropy"]
    assert_close(output.logits, recorded["expected.logits"], rtol=0, atol=tolerance["logits_atol"])
    assert_close(output.loss, recorded["expected.loss_ce"], rtol=1e-5, atol=0)
    output.loss.backward()
    check_gradients(model, recorded, tolerance["grads_rtol_of_max"])
    with torch.no_grad():
        image = torch.nn.functional.normalize(image_features(model, recorded["in.images"]), dim=-1)
    assert_close(image, recorded["expected.image_features"], rtol=0, atol=tolerance["features_atol"])
    text = encode_classes(model, objective.prompts)
    assert_close(text, recorded["expected.text_features"], rtol=0, atol=tolerance["features_atol"])
    predicted = objective.predict(model, {"pixel_values": recorded["in.images"]}).detach()
    assert_close(predicted, recorded["expected.logits"], rtol=0, atol=tolerance["logits_atol"])


def test_frozen_text_features_are_normalised_once():
    """Normalising before the mean too, as zero-shot ensembles do, moves them by 2e-3."""
    case, recorded, model, objective, _ = setup("C_promptsrc_loss")
    assert len(objective.frozen_prompts.templates) == 5
    features = frozen_class_features(model, objective.frozen_prompts)
    expected = recorded["expected.fixed_text_features"]
    assert_close(features, expected, rtol=0, atol=case["tolerance"]["features_atol"])
    with model.disable_adapter():
        other = encode_classes(model, objective.frozen_prompts)
    assert (other - expected).abs().max() > 10 * case["tolerance"]["features_atol"]


def test_loss_terms_and_gradients():
    case, recorded, model, objective, _ = setup("C_promptsrc_loss")
    tolerance = case["tolerance"]
    output = objective(model, batch_of(recorded))
    expected = {
        "cross_entropy": "ce",
        "text_consistency": "text",
        "image_consistency": "image",
        "logit_consistency": "logits",
    }
    assert list(output.loss_terms) == list(expected)
    for name, short in expected.items():
        value = recorded[f"expected.loss_{short}"]
        assert_close(output.loss_terms[name], value, rtol=tolerance["losses_rtol"], atol=0)
    assert_close(output.loss, recorded["expected.loss_total"], rtol=tolerance["losses_rtol"], atol=0)
    assert_close(output.logits, recorded["expected.logits"], rtol=0, atol=tolerance["logits_atol"])
    output.loss.backward()
    check_gradients(model, recorded, tolerance["grads_rtol_of_max"])


@pytest.mark.parametrize(("epochs", "mean", "std"), [(20, 15, 1), (50, 30, 30), (50, 45, 5), (4, 2, 1)])
def test_aggregation_weights(epochs: int, mean: int, std: int):
    expected = tensors("C_promptsrc_loss")[f"expected.gpa_weights_epochs{epochs}_mean{mean}_std{std}"]
    weights = gaussian_log_weights(epochs, mean=mean, std=std).exp()
    assert_close(weights, expected, rtol=facts("C_promptsrc_loss")["tolerance"]["gpa_weights_rtol"], atol=0)


class FixedBatches(EpochBatchSampler):
    """Two batches of four images per epoch, in the recorded order."""

    def __iter__(self):
        first = 8 * self.epoch
        yield from ([*range(first, first + 4)], [*range(first + 4, first + 8)])

    def __len__(self) -> int:
        return 2


def test_training_with_schedule_and_aggregation_through_the_trainer(tmp_path):
    """Losses and rates of eight steps, prompts after each epoch, and the aggregated prompts that the run ends with."""
    info = facts("C2_promptsrc_training_gpa")
    gpa, optimizer = info["gpa"], info["optimizer"]
    case, recorded, model, objective, dataset = setup(
        "C2_promptsrc_training_gpa", gpa_mean=gpa["mean"], gpa_std=gpa["std"]
    )
    objective.batch_sampler = lambda labels, batch_size, seed: FixedBatches(batch_size=batch_size, seed=seed)
    args = VLMTrainingArguments(
        output_dir=str(tmp_path),
        num_train_epochs=gpa["epochs"],
        learning_rate=optimizer["lr"],
        momentum=optimizer["momentum"],
        weight_decay=optimizer["weight_decay"],
        warmup_epochs=1,
        save_strategy="steps",
        save_steps=2,
        save_total_limit=None,
        logging_steps=1,
        use_cpu=True,
        disable_tqdm=True,
    )
    trainer = VLMTrainer(model, args, train_dataset=dataset, objective=objective)
    trainer.train()
    tolerance = case["tolerance"]
    log = [entry for entry in trainer.state.log_history if "loss" in entry]
    assert len(log) == 8
    assert [e["loss"] for e in log] == pytest.approx(
        recorded["expected.losses"].tolist(), rel=tolerance["losses_rtol"]
    )
    assert [e["learning_rate"] for e in log] == pytest.approx(recorded["expected.lrs"].tolist(), rel=1e-9)
    check_prompts(model, recorded, "expected.gpa_final", tolerance["prompts_atol"])
    with torch.no_grad():
        logits = objective.predict(model, {"pixel_values": recorded["in.images"][0]})
    expected = recorded["expected.gpa_final.logits_of_first_batch"]
    assert_close(logits, expected, rtol=0, atol=tolerance["logits_atol"])
    for epoch in range(1, 5):  # checkpoints of an epoch's last step hold the prompts before aggregation
        model.load_adapter(tmp_path / f"checkpoint-{2 * epoch}", adapter_name="default")
        check_prompts(model, recorded, f"expected.after_epoch{epoch}", tolerance["prompts_atol"])


def check_prompts(model, recorded, group: str, tolerance: float) -> None:
    """Every prompt tensor."""
    found = prompt_tensors(model, prefix="promptsrc_")
    assert sorted(found) == PROMPTS
    for name, parameters in found.items():
        expected = recorded[f"{group}.{name}"]
        assert_close(stacked(list(parameters), expected), expected, rtol=0, atol=tolerance)


@pytest.mark.parametrize(
    ("epochs", "rate"), [(20, 0.005), (20, 0.0025), (50, 0.002), (5, 0.0035), (10, 0.002), (4, 0.0025)]
)
def test_learning_rate_of_every_epoch(epochs: int, rate: float):
    expected = tensors("S_schedules")[f"expected.lr_epochs{epochs}_base{rate}"].tolist()
    assert len(expected) == epochs
    ours = [
        epoch_cosine(epoch, learning_rate=rate, num_epochs=epochs, warmup_epochs=1, warmup_rate=1e-5)
        for epoch in range(epochs)
    ]
    assert ours == pytest.approx(expected, rel=1e-9)


def test_presets_are_the_official_settings():
    """The configuration files of the official repositories; the two that the record has schedules for are compared."""
    wanted = {
        "base_to_new": (9, 20, 0.0025, 4, 15, 1),
        "cross_dataset": (3, 20, 0.0025, 4, 6, 10),
        "few_shot": (9, 50, 0.0025, 4, 30, 30),
        "few_shot_late": (9, 50, 0.0025, 4, 45, 5),
        "teacher": (9, 20, 0.005, 8, 15, 1),
    }
    for protocol, (depth, epochs, rate, batch, mean, std) in wanted.items():
        preset = preset_for(protocol)
        assert (preset.config["text_depth"], preset.config["vision_depth"]) == (depth, depth)
        assert preset.training["num_train_epochs"] == epochs
        assert preset.training["learning_rate"] == rate
        assert preset.training["per_device_train_batch_size"] == batch
        assert (preset.objective["gpa_mean"], preset.objective["gpa_std"]) == (mean, std)
        assert (preset.objective["text_weight"], preset.objective["image_weight"]) == (25, 10)
        PromptSRCConfig(**preset.config)
    for protocol in ("base_to_new", "teacher"):
        rate = preset_for(protocol).training["learning_rate"]
        assert f"expected.lr_epochs20_base{rate}" in tensors("S_schedules")
    with pytest.raises(ValueError, match="teacher"):
        preset_for("zero_shot")


def test_template_ids_are_the_recorded_ones():
    """Template by template, class by class: the frozen features average what the official code averages."""
    case, recorded, _, objective, _ = setup("C_promptsrc_loss")
    ids = objective.frozen_prompts.input_ids
    official = recorded["in.template_input_ids"].flatten(0, 1)[:, : ids.shape[1]]
    kept = torch.arange(ids.shape[1]) <= (official == 641).int().argmax(dim=1)[:, None]
    assert ids.shape[0] == 5 * len(case["classnames"])
    assert torch.equal(ids[kept], official[kept])
