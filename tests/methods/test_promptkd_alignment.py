"""Stored student features and the projector's alignment before the first epoch."""

import pytest
import torch
from peft import PeftModel
from torch.testing import assert_close

from peft_vlm import PromptKDObjective
from peft_vlm.data.dataset import collate
from peft_vlm.errors import PeftVLMError
from peft_vlm.methods.promptkd.objective import projector_of, student_features
from tests.cases import class_prompts, images
from tests.methods.promptkd_models import fresh, teacher


def student(**settings) -> PeftModel:
    """A student without class vectors, with a projector of one layer."""
    return fresh(**({"projector_depth": 1} | settings))


def objective(**settings) -> PromptKDObjective:
    return PromptKDObjective(class_prompts(), teacher=teacher(layers=2), teacher_cache="views", **settings)


def started(model, target):
    dataset = images()
    target.prepare(model, dataset)
    target.epoch_start(model, dataset, 0)
    return dataset


def loss(model, target, dataset) -> torch.Tensor:
    return target(model.eval(), collate([dataset[i] for i in range(24)])).loss


def test_alignment_trains_the_projector_and_nothing_else():
    """It must leave the student's prompts and tower as they are."""
    plain, aligned = student(), student()
    first, second = objective(), objective(align_steps=100, align_learning_rate=0.005)
    before = loss(plain, first, started(plain, first))
    after = loss(aligned, second, started(aligned, second))
    assert float(after.detach()) < 0.9 * float(before.detach())
    old = dict(plain.named_parameters())
    changed = {name for name, p in aligned.named_parameters() if not torch.equal(p, old[name])}
    assert len(changed) == 2
    assert all("promptkd_linear1" in name for name in changed)
    assert all(p.grad is None for p in aligned.parameters())


def test_alignment_is_the_same_twice_and_happens_once():
    one, two = student(), student()
    first, second = objective(align_steps=3), objective(align_steps=3)
    dataset = started(one, first)
    started(two, second)
    weights = [projector_of(model).promptkd_linear1["default"].weight for model in (one, two)]
    assert torch.equal(*weights)
    kept = weights[0].detach().clone()
    first.epoch_start(one, dataset, 0)
    assert torch.equal(weights[0], kept)
    resumed = objective(align_steps=3)
    resumed.prepare(one, dataset)
    resumed.load_state_dict(first.state_dict())
    resumed.epoch_start(one, dataset, 0)
    assert torch.equal(weights[0], kept)


def test_a_stored_student_gives_the_same_loss_and_gradients_without_pixels():
    plain, stored = student(vision_depth=0), student(vision_depth=0)
    first, second = objective(), objective(student_cache="views")
    assert first.needs_pixels
    assert not second.needs_pixels
    dataset = started(plain, first)
    expected = first(plain.train(), collate([dataset[i] for i in range(8)]))
    started(stored, second)
    batch = collate([dataset[i] for i in range(8)])
    del batch["pixel_values"]
    actual = second(stored.train(), batch)
    assert_close(actual.loss, expected.loss, rtol=1e-5, atol=1e-6)
    expected.loss.backward()
    actual.loss.backward()
    for ours, theirs in zip(projector_of(stored).parameters(), projector_of(plain).parameters(), strict=True):
        if theirs.grad is not None:
            assert_close(ours.grad, theirs.grad, rtol=1e-4, atol=1e-6)


def test_student_features_are_those_that_enter_the_projector():
    model = student()
    pixels = collate([images()[i] for i in range(5)])["pixel_values"]
    features = student_features(model.train(), pixels)
    assert model.training
    projected = projector_of(model).project(features)
    assert_close(model.get_image_features(pixel_values=pixels).pooler_output, projected, rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("settings", [{"student_cache": "views"}, {"align_steps": 2}])
def test_stored_features_need_a_cached_teacher(settings):
    with pytest.raises(ValueError, match="Both read stored features"):
        PromptKDObjective(class_prompts(), teacher=teacher(), **settings)


def test_a_stored_student_must_be_frozen():
    model, target = student(), objective(student_cache="views")
    with pytest.raises(PeftVLMError, match="stale after one step"):
        target.prepare(model, images())


def test_the_projector_keeps_float32_under_autocast():
    """BatchNorm over a few images in half precision is where runs collapse."""
    model = student(projector_depth=2)
    features = torch.randn(6, 16)
    expected = projector_of(model.train()).project(features)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert torch.equal(projector_of(model).project(features), expected)


def test_another_dataset_or_student_is_not_given_stored_features_of_the_first():
    target = objective(align_steps=3, student_cache="views")
    started(student(vision_depth=0), target)
    first = target.cache.store.rows.clone()
    second = student(vision_depth=0)
    before = projector_of(second).promptkd_linear1["default"].weight.detach().clone()
    other = images(seed=9)
    target.prepare(second, other)
    target.epoch_start(second, other, 0)
    assert not torch.equal(target.cache.store.rows, first)
    assert not torch.equal(projector_of(second).promptkd_linear1["default"].weight, before)


def test_labels_are_matched_by_class_name():
    """Training images of some classes, in another order than the prompts, must not be scored against wrong names."""
    model, target = student(), objective()
    dataset = images().restrict([5, 0])
    target.prepare(model, dataset)
    target.epoch_start(model, dataset, 0)
    output = target(model.eval(), collate([dataset[0], dataset[len(dataset) - 1]]))
    names = [target.prompts.class_names[label] for label in output.labels.tolist()]
    assert names == [dataset.class_names[dataset.labels[0]], dataset.class_names[dataset.labels[-1]]]
