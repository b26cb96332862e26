"""PromptKD's teachers: precision, several of them, another family, cached views."""

from pathlib import Path

import pytest
import torch
from torch.testing import assert_close

from peft_vlm import PromptKDObjective
from peft_vlm.data.dataset import collate
from peft_vlm.errors import ClassNameError, DataError, PeftVLMError
from peft_vlm.methods.promptkd import Teacher
from peft_vlm.text import encode_classes
from peft_vlm.text.prompts import tokenize_for_model
from tests.cases import TEACHER_DIM, class_prompts, images, pixels
from tests.methods.promptkd_models import NAMES, augmented, fresh, teacher
from tests.tiny import clip_processor, siglip_processor, tiny_siglip, tiny_tokenizer


def test_views_differ_and_come_back():
    dataset, objective = (
        augmented(),
        PromptKDObjective(class_prompts(), teacher=teacher(), teacher_cache="views", num_views=2),
    )
    model = fresh()
    objective.prepare(model, dataset)
    seen = []
    for epoch in range(4):
        dataset.set_epoch(epoch)
        objective.epoch_start(model, dataset, epoch)
        seen.append((dataset[3]["pixel_values"], objective.cache.read(torch.tensor([3]))))
        expected = objective.teachers.features(seen[-1][0][None], dataset.transform)
        assert_close(seen[-1][1], expected, rtol=0, atol=1e-6)
    assert not torch.equal(seen[0][0], seen[1][0])
    assert torch.equal(seen[0][0], seen[2][0])
    assert torch.equal(seen[1][1], seen[3][1])


def test_the_disk_cache_holds_what_the_ram_cache_holds(tmp_path):
    dataset, rows = augmented(), []
    for options in ({"cache_storage": "ram"}, {"cache_storage": "disk", "cache_folder": tmp_path}):
        objective = PromptKDObjective(
            class_prompts(), teacher=teacher(), teacher_cache="views", num_views=3, **options
        )
        objective.prepare(fresh(), dataset)
        for epoch in range(3):
            objective.epoch_start(fresh(), dataset, epoch)
        rows.append(objective.cache.store.rows.clone())
    assert torch.equal(*rows)
    assert rows[0].shape == (3 * 24, TEACHER_DIM)
    assert f"{tmp_path}/peft_vlm_cache_" in Path("/proc/self/maps").read_text()


def test_the_cache_announces_its_size(capsys):
    objective = PromptKDObjective(class_prompts(), teacher=teacher(), teacher_cache="views", num_views=500)
    objective.prepare(fresh(), augmented())
    objective.epoch_start(fresh(), augmented(), 0)
    shown = capsys.readouterr().err
    assert "view 1 of 500" in shown
    assert "1.1 MB in ram" in shown


def test_a_teacher_is_stored_by_itself_where_every_epoch_sees_the_same_pixels():
    """Its forward pass is most of the time; with new augmentation in every epoch a store would only take memory."""
    objective = PromptKDObjective(class_prompts(), teacher=teacher())
    for dataset, stored in ((images(), True), (augmented(), False), (images(), True)):
        objective.prepare(fresh(), dataset)
        assert (objective.cache is not None) == stored


def test_fixed_pixels_need_one_view_only():
    objective = PromptKDObjective(class_prompts(), teacher=teacher(), teacher_cache="views", num_views=4)
    objective.prepare(fresh(), images())
    for epoch in range(3):
        objective.epoch_start(fresh(), images(), epoch)
    assert objective.cache.store.rows.shape == (24, TEACHER_DIM)


def test_the_student_cannot_teach_itself():
    model = fresh()
    with pytest.raises(PeftVLMError, match="Load it a second time"):
        PromptKDObjective(class_prompts(), teacher=model.get_base_model()).prepare(model, images())


def test_class_vectors_are_those_of_the_weights_at_preparation():
    """Computed at construction they would be those of a teacher whose weights are loaded later."""
    guide, model = teacher(seed=1), fresh()
    objective = PromptKDObjective(class_prompts(), teacher=guide)
    guide.load_state_dict(teacher(seed=5).state_dict())
    objective.prepare(model, images())
    assert torch.equal(encode_classes(model, class_prompts()), encode_classes(teacher(seed=5), class_prompts()))


def test_a_half_precision_teacher_keeps_its_type():
    guide, model, dataset = teacher().to(torch.bfloat16), fresh(), images()
    objective = PromptKDObjective(class_prompts(), teacher=guide, teacher_cache="none")
    objective.prepare(model, dataset)
    output = objective(model.train(), collate([dataset[i] for i in range(6)]))
    assert next(guide.parameters()).dtype == torch.bfloat16
    assert output.loss.dtype == output.logits.dtype == torch.float32
    assert objective.teachers.classes[0].dtype == torch.float32


def test_several_teachers_are_averaged_and_the_first_gives_the_vectors():
    guides = [teacher(5), teacher(6, dim=20)]
    dataset, alone = images(), []
    for guide in guides:
        single = PromptKDObjective(class_prompts(), teacher=guide)
        single.teachers.prepare(class_prompts(), torch.device("cpu"))
        alone.append(single.teachers.logits(single.teachers.features(pixels(), None)))
    for weighting in ("equal", "confidence"):
        model = fresh()
        objective = PromptKDObjective(class_prompts(), teacher=guides, teacher_weighting=weighting)
        objective.prepare(model, dataset)
        together = objective.teachers.logits(objective.teachers.features(pixels(), None))
        if weighting == "equal":
            assert_close(together, (alone[0] + alone[1]) / 2, rtol=1e-5, atol=1e-5)
        else:
            sure = torch.stack([logits.softmax(dim=-1).amax(dim=-1, keepdim=True) for logits in alone])
            expected = (sure[0] * alone[0] + sure[1] * alone[1]) / sure.sum(dim=0)
            assert_close(together, expected, rtol=1e-5, atol=1e-5)
        assert torch.equal(encode_classes(model, class_prompts()), encode_classes(guides[0], class_prompts()))


def test_a_teacher_of_another_family_with_its_own_tokenizer_and_pixels():
    """SigLIP: bidirectional text of full length, another mean and standard deviation."""
    guide = tiny_siglip()
    prompts = tokenize_for_model(guide, tiny_tokenizer(), NAMES, template="a {}.")
    wrapped = Teacher(guide, prompts=prompts, image_processor=siglip_processor(), name="siglip")
    model, dataset = fresh(class_dim=32), images()
    objective = PromptKDObjective(class_prompts(), teacher=wrapped)
    objective.prepare(model, dataset)
    transform = dataset.transform
    raw = torch.rand(2, 3, 16, 16)
    mean, std = (torch.tensor(v)[:, None, None] for v in (transform.image_mean, transform.image_std))
    found = wrapped.image_features((raw - mean) / std, transform)
    with torch.no_grad():
        expected = guide.get_image_features(pixel_values=(raw - 0.5) / 0.5).pooler_output
    assert_close(found, torch.nn.functional.normalize(expected, dim=-1), rtol=0, atol=1e-5)
    assert model.active_peft_config.teacher_name_or_path == "siglip"
    with pytest.raises(ClassNameError, match="6 classes"):
        PromptKDObjective(class_prompts(NAMES[:5] + ["pink"]), teacher=wrapped).prepare(fresh(class_dim=32), dataset)


def test_teachers_of_different_vocabularies_need_prompts_of_their_own():
    """The second one would read other words, or ids that it does not have."""
    config = teacher().config
    config.text_config.vocab_size = 520
    other = type(teacher())(config)
    pair = [Teacher(teacher(), name="small"), Teacher(other, name="large")]
    with pytest.raises(ClassNameError, match=r"\('small', 514\), \('large', 520\).*Teacher\(model, prompts"):
        PromptKDObjective(class_prompts(), teacher=pair).prepare(fresh(), images())
    own = Teacher(other, prompts=class_prompts(), name="large")
    PromptKDObjective(class_prompts(), teacher=[teacher(), own]).prepare(fresh(), images())


def test_another_image_size_needs_the_teachers_processor():
    config = teacher().config
    config.vision_config.image_size = 32
    large = type(teacher())(config).eval()
    with pytest.raises(DataError, match=r"32 pixels, the student's have 16.*image_processor"):
        Teacher(large).image_features(pixels(), None)
    assert Teacher(large, image_processor=clip_processor(32)).image_features(pixels(), None).shape == (4, TEACHER_DIM)


def test_wrong_settings_are_refused():
    for settings, message in (
        ({"reduction": "mean"}, "'official', 'batchmean'"),
        ({"teacher_cache": "ram"}, "'none', 'views'"),
        ({"teacher_weighting": "best"}, "'equal', 'confidence'"),
        ({"cache_storage": "tape"}, "'ram', 'disk'"),
        ({"temperature": 0}, "`temperature` above 0"),
        ({"num_views": 0}, "`num_views` above 0"),
        ({"teacher": []}, "at least one `teacher`"),
    ):
        with pytest.raises(ValueError, match=message):
            PromptKDObjective(class_prompts(), **({"teacher": teacher()} | settings))
