"""PromptKD: the loss by hand, the projector, stored classes, refusals, checkpoints."""

import json
import math
import warnings

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import pipeline

from peft_vlm import PromptedClassifier, PromptKDConfig, PromptKDObjective
from peft_vlm.errors import AdapterError, ClassNameError, PeftVLMWarning, UnsupportedModelError
from peft_vlm.losses.distillation import average_teachers, distillation_loss
from peft_vlm.methods.promptkd import Teacher, preset_for, texts_are_stored_classes
from peft_vlm.methods.promptkd.presets import batchmean_weight
from peft_vlm.text import encode_classes
from peft_vlm.text.class_features import ClassFeatureCache
from tests.cases import TEACHER_DIM, base_model, class_prompts, images, perturb, pixels
from tests.tiny import clip_processor, colour_names, tiny_clip, tiny_siglip, tiny_tokenizer

NAMES = list(colour_names())


def fresh(**settings) -> PeftModel:
    """A student without class vectors."""
    return get_peft_model(base_model(), PromptKDConfig(**({"class_dim": TEACHER_DIM, "vision_depth": 2} | settings)))


def teacher(seed: int = 5, **settings) -> torch.nn.Module:
    """A random teacher with wider class vectors."""
    return tiny_clip(seed=seed, **({"dim": TEACHER_DIM} | settings))


def student(**settings) -> PeftModel:
    """A student with the class vectors of `teacher()`."""
    model = fresh(**settings)
    PromptKDObjective(class_prompts(), teacher=teacher()).prepare(model, images())
    return model.eval()


@torch.no_grad()
def logits(model, count: int = 4) -> torch.Tensor:
    return model(pixel_values=pixels(count)).logits_per_image


def test_loss_by_hand():
    """Two images, two classes: KL(p || q) with p = (1/4, 3/4), q = (1/2, 1/2) and twice p = q."""
    quarter = torch.tensor([[0.0, math.log(3.0)], [1.0, 5.0]])
    half = torch.tensor([[0.0, 0.0], [1.0, 5.0]])
    divergence = 0.25 * math.log(0.25 / 0.5) + 0.75 * math.log(0.75 / 0.5)
    assert distillation_loss(half, quarter).item() == pytest.approx(divergence / 2, rel=1e-6)
    official = distillation_loss(half, quarter, reduction="official")
    assert official.item() == pytest.approx(divergence / 4, rel=1e-6)
    backwards = 0.5 * math.log(0.5 / 0.25) + 0.5 * math.log(0.5 / 0.75)
    assert distillation_loss(quarter, half).item() == pytest.approx(backwards / 2, rel=1e-6)


def test_temperature_divides_logits_and_keeps_the_size_of_gradients():
    hot = distillation_loss(torch.tensor([[0.0, 0.0]]), torch.tensor([[0.0, 2 * math.log(3.0)]]), temperature=2.0)
    divergence = 0.25 * math.log(0.5) + 0.75 * math.log(1.5)
    assert hot.item() == pytest.approx(4 * divergence, rel=1e-6)


def test_the_teacher_gets_no_gradient():
    student_logits, teacher_logits = torch.randn(2, 3, requires_grad=True), torch.randn(2, 3, requires_grad=True)
    distillation_loss(student_logits, teacher_logits).backward()
    assert teacher_logits.grad is None
    assert student_logits.grad.abs().sum() > 0


def test_unknown_reductions_and_weightings_are_refused():
    with pytest.raises(ValueError, match="'official', 'batchmean'"):
        distillation_loss(torch.zeros(1, 2), torch.zeros(1, 2), reduction="sum")
    with pytest.raises(ValueError, match="'equal', 'confidence'"):
        average_teachers(torch.zeros(2, 1, 2), weighting="best")


def test_teachers_are_averaged_equally_or_by_confidence():
    """Probabilities (1/2, 1/2) and (1/4, 3/4): confidences 1/2 and 3/4 give the weights 2/5 and 3/5."""
    stacked = torch.tensor([[[0.0, 0.0]], [[0.0, math.log(3.0)]]])
    assert_close(average_teachers(stacked), torch.tensor([[0.0, math.log(3.0) / 2]]))
    weighted = average_teachers(stacked, weighting="confidence")
    assert_close(weighted, torch.tensor([[0.0, 0.6 * math.log(3.0)]]))


@pytest.mark.parametrize("depth", [1, 2, 3])
@pytest.mark.parametrize("norm", ["batchnorm", "layernorm", "none"])
def test_the_projector_is_the_chain_it_says(depth: int, norm: str):
    """Linear, norm, ReLU between; on the un-normalised feature, in evaluation mode."""
    model = student(projector_depth=depth, projector_norm=norm)
    perturb(model)
    layer = model.get_base_model().visual_projection
    pooled = torch.randn(3, 32)
    hidden = layer.base_layer(pooled)
    for index in range(1, depth + 1):
        hidden = getattr(layer, f"promptkd_linear{index}")["default"](hidden)
        if index < depth:
            if norm != "none":
                hidden = getattr(layer, f"promptkd_norm{index}")["default"](hidden)
            hidden = hidden.relu()
    assert_close(layer(pooled), hidden)
    norms = [name for name, _ in layer.named_modules() if "_norm" in name and name.endswith("default")]
    assert len(norms) == (0 if norm == "none" else depth - 1)


def test_batchnorm_follows_the_mode_of_the_model():
    model = student().train()
    norm = model.get_base_model().visual_projection.promptkd_norm1["default"]
    logits(model)
    assert int(norm.num_batches_tracked) == 1
    logits(model.eval())
    assert int(norm.num_batches_tracked) == 1
    model.add_adapter("second", PromptKDConfig(class_dim=TEACHER_DIM, vision_depth=2))
    assert not model.get_base_model().visual_projection.promptkd_norm1["second"].training


def test_a_batch_of_one_image_uses_the_running_statistics():
    """torch's BatchNorm raises on it, so the last batch of an epoch could end a run."""
    model = student().train()
    with torch.no_grad():
        alone = model(pixel_values=pixels(1)).logits_per_image
        assert torch.equal(alone, model.eval()(pixel_values=pixels(1)).logits_per_image)


def test_projector_stays_in_float32_on_a_half_precision_base():
    model = get_peft_model(base_model().to(torch.float16), PromptKDConfig(class_dim=TEACHER_DIM, vision_depth=2))
    layer = model.get_base_model().visual_projection
    floating = [t for t in layer.state_dict().values() if t.is_floating_point() and t.shape != (16, 32)]
    assert len(floating) == 8
    assert {t.dtype for t in floating} == {torch.float32}


def test_projector_alone_and_the_whole_student_as_baselines():
    alone = {name for name, p in fresh(vision_depth=0).named_parameters() if p.requires_grad}
    assert len(alone) == 6
    assert all("visual_projection.promptkd_" in name for name in alone)
    whole = fresh(vision_depth=0, tune_vision=True)
    trained = {name for name, p in whole.named_parameters() if p.requires_grad}
    assert len(trained) == 6 + 2 * 2 + 3 * 16  # projector, two norms, three layers of 8 leaves with weight and bias
    expected = base_model()(pixel_values=pixels(), input_ids=class_prompts().input_ids).logits_per_image
    perturb(whole)
    with whole.disable_adapter():
        assert torch.equal(
            whole(pixel_values=pixels(), input_ids=class_prompts().input_ids).logits_per_image, expected
        )
    with pytest.raises(AdapterError, match="same `tune_vision`"):
        whole.add_adapter("prompts", PromptKDConfig(class_dim=TEACHER_DIM, vision_depth=2))


def test_logits_are_scaled_cosines_with_the_teachers_vectors():
    """By the student's scale, although the vectors are the teacher's."""
    model = student()
    vectors = encode_classes(teacher(), class_prompts())
    with torch.no_grad():
        image = model.get_image_features(pixel_values=pixels()).pooler_output
    scale = base_model().logit_scale.detach().exp()
    expected = scale * torch.nn.functional.normalize(image, dim=-1) @ vectors.T
    assert_close(logits(model), expected, rtol=1e-5, atol=1e-5)
    config = model.active_peft_config
    assert (config.class_names, config.num_classes) == (NAMES, 6)
    assert config.student_logit_scale == pytest.approx(float(scale))
    assert config.teacher_logit_scale == pytest.approx(teacher().logit_scale.exp().item())


def test_without_class_vectors_there_is_a_clear_error():
    with pytest.raises(AdapterError, match="set_class_vectors"):
        fresh()(pixel_values=pixels())
    with pytest.raises(RuntimeError, match="prepare"):
        PromptKDObjective(class_prompts(), teacher=teacher())(fresh(), {"pixel_values": pixels()})
    with pytest.raises(AdapterError, match="active PromptKD adapter"):
        PromptKDObjective(class_prompts(), teacher=teacher()).prepare(base_model(), images())


def test_texts_are_refused_unless_they_are_declared():
    model, ids = student(), class_prompts().input_ids
    with pytest.raises(ValueError, match="texts_are_stored_classes"):
        model(pixel_values=pixels(), input_ids=ids)
    with texts_are_stored_classes(model):
        assert torch.equal(model(pixel_values=pixels(), input_ids=ids).logits_per_image, logits(model))
        with pytest.raises(AdapterError, match="Expected 6 texts.*got 3"):
            model(pixel_values=pixels(), input_ids=ids[:3])
    with pytest.raises(ValueError, match="input_ids"):
        model(pixel_values=pixels(), input_ids=ids)
    with model.disable_adapter():
        expected = base_model()(pixel_values=pixels(), input_ids=ids).logits_per_image
        assert torch.equal(model(pixel_values=pixels(), input_ids=ids).logits_per_image, expected)


def test_the_zero_shot_pipeline_refuses_or_works_when_declared():
    """Scores under wrong labels would look like a bad model."""
    model = student()
    base = model.get_base_model()
    run = pipeline(
        "zero-shot-image-classification", model=base, tokenizer=tiny_tokenizer(), image_processor=clip_processor()
    )
    image = images(1).image(2)
    with pytest.raises(ValueError, match="reads no text"):
        run(image, candidate_labels=NAMES)
    with texts_are_stored_classes(model):
        scores = {entry["label"]: entry["score"] for entry in run(image, candidate_labels=NAMES)}
    expected = logits(model, 3)[2].softmax(dim=-1).tolist()
    assert [scores[name] for name in NAMES] == pytest.approx(expected, rel=1e-4)


def test_adding_keeping_and_reordering_classes():
    """New vectors come from the teacher; the old columns stay as they are."""
    model = student()
    before = logits(model)
    model.add_classes(["pink", "light_grey"], teacher=teacher(), tokenizer=tiny_tokenizer(), template="a {}.")
    after = logits(model)
    assert torch.equal(after[:, :6], before)
    everything = encode_classes(teacher(), class_prompts([*NAMES, "pink", "light_grey"]))
    assert_close(encode_classes(model, class_prompts(["light grey", "red"])), everything[[7, 0]])
    assert model.active_peft_config.class_names == [*NAMES, "pink", "light_grey"]
    model.keep_classes(["pink", "green", "red"])
    assert torch.equal(logits(model), after[:, [6, 3, 0]])
    assert model.active_peft_config.num_classes == 3
    with pytest.raises(ClassNameError, match="has already"):
        model.add_classes(["pink"], teacher=teacher(), tokenizer=tiny_tokenizer(), template="a {}.")
    with pytest.raises(ClassNameError, match="'blue'.*add_classes"):
        model.keep_classes(["pink", "blue"])


def test_another_teacher_is_refused_by_width_and_warned_about_by_name():
    model = student()
    with pytest.raises(AdapterError, match="24 numbers, got 20"):
        model.add_classes(["pink"], teacher=teacher(dim=20), tokenizer=tiny_tokenizer(), template="a {}.")
    other = Teacher(teacher(seed=6), name="another")
    with pytest.warns(PeftVLMWarning, match="'another'"):
        model.add_classes(["pink"], teacher=other, tokenizer=tiny_tokenizer(), template="a {}.")
    with pytest.raises(AdapterError, match="class_dim=20"):
        PromptKDObjective(class_prompts(), teacher=teacher(dim=20)).prepare(fresh(), images())
    with pytest.raises(ClassNameError, match="stores 7 classes"):
        PromptKDObjective(class_prompts(), teacher=teacher()).prepare(model, images())


def test_changed_vectors_renew_cached_class_features():
    model, cache = student(), ClassFeatureCache()
    first = cache.get(model, class_prompts(["red", "blue"]))
    model.set_class_vectors(NAMES, torch.randn(6, TEACHER_DIM))
    second = cache.get(model, class_prompts(["red", "blue"]))
    assert cache.num_computed == 2
    assert not torch.equal(first, second)
    with pytest.raises(AdapterError, match="finite"):
        model.set_class_vectors(NAMES, torch.full((6, TEACHER_DIM), math.nan))


def test_unknown_classes_name_the_way_to_add_them():
    with pytest.raises(ClassNameError, match="'pink'.*model.add_classes"):
        encode_classes(student(), class_prompts(["red", "pink"]))


def test_class_names_choose_rows_of_the_stored_vectors(tmp_path):
    """`PromptedClassifier` on a saved adapter, with a subset in another order."""
    model = student()
    perturb(model)
    base_model().save_pretrained(tmp_path / "base")
    tiny_tokenizer().save_pretrained(tmp_path / "base")
    clip_processor().save_pretrained(tmp_path / "base")
    model.save_pretrained(tmp_path / "adapter")
    classifier = PromptedClassifier.from_pretrained(tmp_path / "adapter", base_model=tmp_path / "base")
    assert classifier.class_names == tuple(NAMES)
    subset = [NAMES[4], NAMES[1]]
    found = {p.label: p.probability for p in classifier.predict(images(1).image(0), class_names=subset)}
    expected = logits(model, 1)[0, [4, 1]].softmax(dim=-1).tolist()
    assert [found[name] for name in subset] == pytest.approx(expected, rel=1e-4)
    with pytest.raises(ClassNameError, match="add_classes"):
        classifier.predict(images(1).image(0), class_names=["red", "pink"])


@pytest.mark.parametrize("depth", [1, 2, 3])
def test_every_buffer_survives_under_another_name(tmp_path, depth: int):
    model = fresh(projector_depth=depth)
    objective = PromptKDObjective(class_prompts(), teacher=teacher())
    objective.prepare(model, images())
    logits(model.train())
    model.save_pretrained(tmp_path)
    again = PeftModel.from_pretrained(base_model(), tmp_path, adapter_name="renamed")
    first, second = get_peft_model_state_dict(model), get_peft_model_state_dict(again, adapter_name="renamed")
    assert first.keys() == second.keys()
    assert sum("running_mean" in key or "num_batches_tracked" in key for key in first) == 2 * (depth - 1)
    assert all(torch.equal(first[key], second[key]) for key in first)
    assert torch.equal(logits(model.eval()), logits(again))


@pytest.mark.parametrize(
    ("key", "change"),
    [
        ("class_vectors", lambda t: t[:5]),
        ("class_vectors", lambda t: torch.cat([t, t], dim=1)),
        ("norm1.running_var", None),
        ("norm1.num_batches_tracked", None),
        ("linear2.weight", lambda t: t[:, :7]),
    ],
)
def test_files_that_do_not_fit_are_refused(tmp_path, key: str, change):
    """Vectors of another number or width, or a buffer that is not there, would load as initial values."""
    student().save_pretrained(tmp_path)
    path = tmp_path / "adapter_model.safetensors"
    stored = load_file(path)
    (name,) = [name for name in stored if name.endswith(key)]
    value = stored.pop(name)
    if change is not None:
        stored[name] = change(value).contiguous()
    save_file(stored, path)
    with pytest.raises(AdapterError, match=key.replace(".", ".*")):
        PeftModel.from_pretrained(base_model(), tmp_path)


def test_a_configuration_with_other_classes_is_refused(tmp_path):
    student().save_pretrained(tmp_path)
    path = tmp_path / "adapter_config.json"
    config = json.loads(path.read_text())
    path.write_text(json.dumps(config | {"class_names": NAMES[:5]}))
    with pytest.raises(AdapterError, match="5 names and `num_classes`=6"):
        PeftModel.from_pretrained(base_model(), tmp_path)


def test_a_base_with_another_logit_scale_is_warned_about(tmp_path):
    student().save_pretrained(tmp_path)
    other = base_model()
    other.get_parameter("logit_scale").data.add_(1.0)
    with pytest.warns(PeftVLMWarning, match="logit scale"):
        PeftModel.from_pretrained(other, tmp_path)
    with warnings.catch_warnings():
        warnings.simplefilter("error", PeftVLMWarning)
        PeftModel.from_pretrained(base_model(), tmp_path)


def test_other_families_are_refused_as_students():
    with pytest.raises(UnsupportedModelError, match="`CLIPModel` as student, got `SiglipModel`"):
        get_peft_model(tiny_siglip(), PromptKDConfig(class_dim=8))


def test_presets_are_the_official_settings():
    preset = preset_for("base_to_new")
    assert (preset.config["vision_depth"], preset_for("cross_dataset").config["vision_depth"]) == (9, 3)
    assert (preset.objective["weight"], preset_for("base_to_new", low_weight=True).objective["weight"]) == (1000, 200)
    training = preset.training
    assert (training["learning_rate"], training["per_device_train_batch_size"]) == (0.005, 8)
    assert training["dataloader_drop_last"] is True
    with pytest.raises(ValueError, match="'base_to_new', 'cross_dataset'"):
        preset_for("few_shot")
    s, t = torch.randn(4, 6), torch.randn(4, 6)
    official = 1000 * distillation_loss(s, t, reduction="official")
    assert_close(official, batchmean_weight(1000, 6) * distillation_loss(s, t))
