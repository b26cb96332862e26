"""PromptKD: the loss by hand, the projector, stored classes, refusals, checkpoints."""

import math

import pytest
import torch
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch.testing import assert_close

from peft_vlm import PromptKDConfig, PromptKDObjective
from peft_vlm.errors import AdapterError, UnsupportedModelError
from peft_vlm.losses import average_teachers, distillation_loss
from peft_vlm.methods.promptkd import preset_for
from peft_vlm.methods.promptkd.objective import batchmean_weight
from peft_vlm.text import encode_classes
from tests.cases import TEACHER_DIM, base_model, class_prompts, images, perturb, pixels
from tests.methods.promptkd_models import NAMES, fresh, logits, student, teacher
from tests.tiny import tiny_siglip


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


def test_averaged_are_logits_and_not_probabilities():
    """1 : 1 and 1 : 3 give the odds 1 : sqrt(3), the geometric mean; averaged probabilities would give 3 : 5."""
    stacked = torch.tensor([[[0.0, 0.0]], [[0.0, math.log(3.0)]]])
    found = average_teachers(stacked).softmax(dim=-1)[0]
    assert found.tolist() == pytest.approx([1 / (1 + math.sqrt(3)), math.sqrt(3) / (1 + math.sqrt(3))], rel=1e-6)
    assert found.tolist() != pytest.approx([3 / 8, 5 / 8], rel=1e-2)
    # a student that answers (1/2, 1/2) has a loss of KL((0.366, 0.634) || (0.5, 0.5)) = 0.0363
    loss = distillation_loss(torch.zeros(1, 2), average_teachers(stacked))
    assert loss.item() == pytest.approx(0.036341, abs=1e-6)


def test_a_teacher_with_a_larger_logit_scale_counts_more():
    """Cosines (1, 0) at scale 10 and (0, 1) at scale 20 average to (5, 10): the second one wins."""
    cosines, scales = torch.eye(2)[:, None, :], torch.tensor([10.0, 20.0])
    assert_close(average_teachers(scales[:, None, None] * cosines), torch.tensor([[5.0, 10.0]]))


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
