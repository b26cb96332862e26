"""RPP's objective: which classes it draws, what its terms are, what does not grow with the number of classes."""

import copy

import pytest
import torch
from peft import get_peft_model
from torch.nn import functional as F
from torch.testing import assert_close

from peft_vlm import (
    CoOpConfig,
    PromptSRCConfig,
    RPPObjective,
    SkipTuningConfig,
    VLMTrainer,
    VLMTrainingArguments,
)
from peft_vlm.data.dataset import collate
from peft_vlm.data.splits import BalancedBatches
from peft_vlm.errors import AdapterError, ClassNameError, DataError, UnsupportedModelError
from peft_vlm.losses import distillation_loss
from peft_vlm.methods.rpp import objective as objective_module
from peft_vlm.models.towers import image_features, similarity_logits, towers_of
from peft_vlm.text import ClassPrompts, encode_classes, reserve_slots
from peft_vlm.text.class_features import CompactPrompts
from tests.cases import class_prompts, images, perturb, rpp_config
from tests.tiny import tiny_clip, tiny_siglip

ALL = 100


def student(config=None):
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), config or rpp_config()).eval()
    perturb(model)
    return model


def batch(indices=range(0, 24, 4)):
    dataset = images()
    return collate([dataset[i] for i in indices])


def output(model, values=None, **settings):
    objective = RPPObjective(class_prompts(), **({"soft_weight": 0} | settings))
    objective.prepare(model, images())
    return objective(model, values or batch())


def all_logits(model):
    """Logits over all classes by the model's own forward."""
    ids = reserve_slots(model, class_prompts()).input_ids
    return model(pixel_values=batch()["pixel_values"], input_ids=ids).logits_per_image


@pytest.mark.parametrize("count", [len(class_prompts().class_names), ALL])
def test_with_all_classes_sampled_the_loss_is_cross_entropy(count: int):
    model = student()
    expected = F.cross_entropy(all_logits(model), batch()["labels"])
    assert_close(output(model, num_sampled_classes=count).loss, expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("weight", [0.0, 0.3, 1.0])
def test_hard_and_soft_labels_are_mixed_by_their_weight(weight: float):
    model, teacher = student(), tiny_clip(seed=5, dim=24)
    taught = similarity_logits(
        teacher,
        image_features(teacher, batch()["pixel_values"]),
        encode_classes(teacher, class_prompts()),
    )
    logits = all_logits(model)
    hard, soft = F.cross_entropy(logits, batch()["labels"]), distillation_loss(logits, taught, temperature=2)
    settings = {"num_sampled_classes": ALL, "temperature": 2, "soft_weight": weight}
    got = output(model, teacher=teacher, **settings)
    names = {0.0: ["hard_label"], 0.3: ["hard_label", "soft_label"], 1.0: ["soft_label"]}[weight]
    assert sorted(got.loss_terms) == names
    assert_close(got.loss, (1 - weight) * hard + weight * soft, rtol=1e-4, atol=1e-5)
    got.loss.backward()
    assert all(parameter.grad is None for parameter in teacher.parameters())


def test_teacher_and_student_are_compared_on_the_same_classes():
    """A teacher with the student's weights leaves no soft loss, whatever is drawn and however it is corrected."""
    model = get_peft_model(tiny_clip(), rpp_config(text_depth=0, vision_depth=1)).eval()
    for corrected in (False, True):
        settings = {"soft_weight": 1, "num_sampled_classes": 4, "correct_soft_labels": corrected}
        objective = RPPObjective(class_prompts(), teacher=copy.deepcopy(model), **settings)
        objective.prepare(model, images())
        assert float(objective(model, batch()).loss.detach()) == pytest.approx(0.0, abs=1e-5)


def test_a_student_that_is_its_own_teacher_is_refused():
    """`get_peft_model` changes the model it gets: kept as the teacher, it would follow the student."""
    clip = tiny_clip()
    model = get_peft_model(clip, rpp_config())
    objective = RPPObjective(class_prompts(), teacher=clip)
    with pytest.raises(AdapterError, match="a second time, or pass `copy.deepcopy"):
        objective.prepare(model, images())


def test_a_model_that_is_no_clip_is_refused():
    """SigLIP pools the last place of a padded text: none of it can be cut."""
    model = get_peft_model(tiny_siglip(), SkipTuningConfig(start_layer=1))
    with pytest.raises(UnsupportedModelError, match="Expected a `CLIPModel`.*got `SiglipModel`"):
        RPPObjective(class_prompts(), soft_weight=0).prepare(model, images())


def test_training_images_of_other_classes_are_refused(tmp_path):
    """Labels would teach one class under the name of another, and the adapter would record the wrong names."""
    model, dataset = get_peft_model(tiny_clip(), rpp_config()), images()
    args = VLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, report_to="none", max_steps=1)
    reversed_prompts = class_prompts(list(reversed(dataset.class_names)))
    with pytest.raises(DataError, match="got 6 classes that stand elsewhere there: label 0, 'red', is class 5"):
        VLMTrainer(model, args, train_dataset=dataset, objective=RPPObjective(reversed_prompts, soft_weight=0))
    fewer = class_prompts(list(dataset.class_names[:3]))
    with pytest.raises(DataError, match="of at most 3 classes, as the objective's prompts, got 6"):
        VLMTrainer(model, args, train_dataset=dataset, objective=RPPObjective(fewer, soft_weight=0))
    worded = class_prompts([f"a {name}" for name in dataset.class_names])
    for prompts in (class_prompts([*dataset.class_names, "green house"]), worded):
        VLMTrainer(model, args, train_dataset=dataset, objective=RPPObjective(prompts, soft_weight=0))


def test_the_draw_depends_on_seed_epoch_and_images_alone():
    """So a resumed run draws what the run it continues would have drawn."""
    draws = []
    for seed, epoch, index in ((0, 0, [1, 2]), (0, 0, [1, 2]), (1, 0, [1, 2]), (0, 1, [1, 2]), (0, 0, [2, 1])):
        objective = RPPObjective(class_prompts(), soft_weight=0, num_sampled_classes=5, seed=seed)
        objective.epoch_start(tiny_clip(), None, epoch)
        draws.append(objective._draw(torch.tensor(index)).tolist())
    assert draws[0] == draws[1]
    assert len({tuple(draw) for draw in draws}) == 4
    assert all(len(set(draw)) == 4 for draw in draws)


@pytest.mark.parametrize("chunk_size", [1, 2, None])
def test_chunks_of_the_text_tower_change_neither_loss_nor_gradients(chunk_size: int):
    """Each chunk is recomputed in the backward pass, cut to its own longest prompt."""
    results = []
    for size in (chunk_size, 256):
        model = student()
        got = output(model, num_sampled_classes=5, text_chunk_size=size)
        got.loss.backward()
        results.append((got.loss.detach(), [p.grad for p in model.parameters() if p.requires_grad]))
    assert_close(results[0], results[1], rtol=1e-4, atol=1e-6)


def test_classes_run_in_one_pass_where_they_fit(monkeypatch):
    """A few prompts more than a chunk holds would double the cost of the text; too many must not fill the memory."""
    model, passes = student(), []
    towers, texts = objective_module.towers_of(model), class_prompts()
    encode = type(towers).finish_text
    monkeypatch.setattr(
        type(towers),
        "finish_text",
        lambda self, hidden, *rest: passes.append(len(hidden)) or encode(self, hidden, *rest),
    )
    output(model, num_sampled_classes=ALL)
    assert passes == [len(texts.class_names)]
    needed = towers.text_activation_bytes(10 * len(texts.class_names))
    monkeypatch.setattr(objective_module, "MAX_TEXT_BYTES", needed // 4)
    passes.clear()
    output(model, num_sampled_classes=ALL)
    assert len(passes) > 1
    assert max(passes) - min(passes) <= max(passes) // 2
    assert sum(passes) == len(texts.class_names)


def test_a_chunk_keeps_no_activations():
    """Else memory would grow with the classes of a step."""
    model, sizes = student(), {}
    for size in (1, 256):
        saved = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, s=saved: (s.append(t.numel()), t)[1], lambda t: t):
            output(model, num_sampled_classes=ALL, text_chunk_size=size)
        sizes[size] = sum(saved)
    base = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: (base.append(t.numel()), t)[1], lambda t: t):
        image_features(model, batch()["pixel_values"])
    assert sizes[1] - sum(base) < 0.3 * (sizes[256] - sum(base))


@pytest.mark.parametrize("storage", ["ram", "disk"])
def test_text_features_without_text_prompts_are_computed_once(storage: str):
    model = student(rpp_config(text_depth=0))
    expected = F.cross_entropy(all_logits(model), batch()["labels"])
    got = output(model, num_sampled_classes=ALL, storage=storage, text_chunk_size=4)
    assert_close(got.loss, expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "config",
    [
        CoOpConfig(num_text_tokens=2, context_init=None),
        PromptSRCConfig(context_init=None, text_depth=2, vision_depth=2),
    ],
)
def test_prompts_of_other_methods_can_be_pretrained_in_the_same_way(config):
    """POMP is CoOp's context with this objective."""
    model = student(config)
    expected = F.cross_entropy(all_logits(model), batch()["labels"])
    assert_close(output(model, num_sampled_classes=ALL).loss, expected, rtol=1e-5, atol=1e-5)


def test_compact_prompts_give_back_the_rows_they_were_made_of():
    prompts, towers = class_prompts(), towers_of(tiny_clip())
    compact = CompactPrompts(prompts, towers.pooled_positions(prompts.input_ids) + 1)
    chosen = torch.tensor([4, 0, 4])
    rows = compact.rows(chosen)
    assert rows.shape[1] == int(compact.lengths[chosen].max()) <= prompts.input_ids.shape[1]
    assert torch.equal(rows, prompts.input_ids[chosen][:, : rows.shape[1]])
    assert compact._ids.numel() == int(compact.lengths.sum())


def test_balanced_batches_show_every_class_equally_often():
    """200 images of class 0, 4 of class 1, one of class 2."""
    labels = [0] * 200 + [1] * 4 + [2]
    sampler = BalancedBatches(labels, batch_size=10, seed=1)
    epochs = []
    for epoch in (0, 1, 0):
        sampler.set_epoch(epoch)
        epochs.append(list(sampler))
    assert len(sampler) == len(epochs[0]) == 21
    assert epochs[0] == epochs[2] != epochs[1]
    drawn = [labels[position] for part in epochs[0] for position in part]
    counts = [drawn.count(label) for label in range(3)]
    assert sum(counts) == 205
    assert max(counts) - min(counts) <= 1
    assert RPPObjective(class_prompts(), soft_weight=0).batch_sampler(labels, batch_size=4, seed=0) is None


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({}, "Expected a teacher for `soft_weight`=0.5, got None"),
        ({"soft_weight": 1.5}, "from 0 to 1, got 1.5"),
        ({"soft_weight": 0, "soft_form": "mse"}, "got 'mse'"),
        ({"soft_weight": 0, "correction": "log2"}, "got 'log2'"),
        ({"soft_weight": 0, "image_sampling": "weighted"}, "got 'weighted'"),
        ({"soft_weight": 0, "temperature": 0}, "above 0, got 0"),
        ({"soft_weight": 0, "num_sampled_classes": 1}, "of 2 or more, got 1"),
        ({"soft_weight": 0, "text_chunk_size": 0}, "of 1 or more, got 0"),
    ],
)
def test_settings_that_cannot_work_are_refused(settings: dict, message: str):
    with pytest.raises(ValueError, match=message):
        RPPObjective(class_prompts(), **settings)


def test_prompts_that_do_not_fit_are_refused():
    prompts = class_prompts()
    two = ClassPrompts(prompts.class_names, ("a {}.", "{}"), prompts.input_ids.repeat(2, 1))
    with pytest.raises(ValueError, match="one template, got 2"):
        RPPObjective(two, soft_weight=0)
    other = ClassPrompts(prompts.class_names[::-1], prompts.templates, prompts.input_ids)
    with pytest.raises(ClassNameError, match="in their order"):
        RPPObjective(prompts, teacher=tiny_clip(), teacher_prompts=other)
    teacher = tiny_clip()
    teacher.config.vision_config.image_size = 24
    objective = RPPObjective(prompts, teacher=teacher)
    with pytest.raises(DataError, match="images of 16 pixels, as the student's, got one for 24"):
        objective.prepare(student(), images())
