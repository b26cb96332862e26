"""PromptKD's stored classes: logits, refusals, adding and keeping classes, files that do not fit."""

import json
import math
import warnings

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file, save_file
from torch.testing import assert_close
from transformers import pipeline

from peft_vlm import PromptedClassifier, PromptKDObjective
from peft_vlm.errors import AdapterError, ClassNameError, PeftVLMWarning
from peft_vlm.methods.promptkd import Teacher, texts_are_stored_classes
from peft_vlm.text import encode_classes
from peft_vlm.text.class_features import ClassFeatureCache
from tests.cases import TEACHER_DIM, base_model, class_prompts, images, perturb, pixels
from tests.methods.promptkd_models import NAMES, fresh, logits, student, teacher
from tests.tiny import clip_processor, tiny_tokenizer


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


def test_classes_changed_after_training_survive_saving_by_the_trainer(tmp_path):
    """The objective's class list would overwrite the names beside the vectors, and loading would call it damage."""
    from peft import PeftConfig

    from peft_vlm.training.reports import describe_adapter

    model, target = fresh(), PromptKDObjective(class_prompts(), teacher=teacher())
    target.prepare(model, images())
    model.keep_classes(["green", "red"])
    describe_adapter(model, target, images())
    model.save_pretrained(tmp_path)
    assert PeftConfig.from_pretrained(tmp_path).class_names == ["green", "red"]
