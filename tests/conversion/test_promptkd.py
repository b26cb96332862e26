"""Official PromptKD files, student and teacher, become adapters that give the recorded outputs."""

import pytest
import torch
from torch.testing import assert_close

from peft_vlm.conversion.formats import convert
from peft_vlm.errors import AdapterError, PeftVLMError
from peft_vlm.methods.promptkd import Teacher
from peft_vlm.text.prompts import tokenize_for_model
from tests.conversion.official_files import adapter, logits, official, official_tensors
from tests.parity.recorded import facts, recorded_tokenizer, tensors

NAME = "D2_promptkd_5steps"
NAMES = facts(NAME)["classnames"]


@pytest.fixture(scope="module")
def teacher(teacher_folder, tmp_path_factory) -> Teacher:
    """The teacher's official file as an adapter on the larger CLIP."""
    folder = tmp_path_factory.mktemp("teacher") / "adapter"
    convert(official("D_promptkd_teacher"), folder, base_model=teacher_folder, context_init="a photo of a")
    return Teacher(adapter(folder, clip="weights_teacher"), name="the teacher")


@pytest.fixture(scope="module")
def vectors(teacher) -> torch.Tensor:
    """Its class vectors."""
    prompts = tokenize_for_model(teacher.model, recorded_tokenizer(), NAMES, template="a photo of a {}.")
    return teacher.class_features(prompts)


def test_the_teacher_gives_the_recorded_features(teacher, vectors):
    recorded, atol = tensors("D_promptkd_step"), facts("D_promptkd_step")["tolerance"]["features_atol"]
    images = teacher.image_features(recorded["in.images"], None)
    assert_close(images, recorded["expected.teacher.image_features"], rtol=0, atol=atol)
    assert_close(vectors, recorded["expected.teacher.text_features"], rtol=0, atol=atol)


@pytest.mark.parametrize("precision", ["float32", "float16"])
def test_the_student_gives_the_recorded_logits(precision, student_folder, vectors, tmp_path):
    """BatchNorm's statistics included. In half precision, BatchNorm's tensors stay in full, as in official files."""
    path, recorded = official(NAME), tensors(NAME)
    if precision == "float16":
        content = {k: v if "conv1.1." in k else v.half() for k, v in official_tensors(NAME).items()}
        path = tmp_path / "half.pth"
        torch.save({"state_dict": content}, path)
    report = convert(
        path,
        tmp_path / "a",
        base_model=student_folder,
        class_names=NAMES,
        class_vectors=vectors,
        teacher_name="the teacher",
        template="a photo of a {}.",
    )
    assert report.kind == "PromptKD"
    assert len(report.used) == 3 + 9
    assert len(report.used) + len(report.unused) == 69
    config = report.config
    assert (config.class_dim, config.vision_depth, config.num_classes) == (96, 3, len(NAMES))
    assert (config.class_names, config.teacher_name_or_path) == (NAMES, "the teacher")
    model, expected = adapter(tmp_path / "a"), recorded["expected.final.eval_logits"]
    atol = (
        facts(NAME)["tolerance"]["eval_logits_atol"] if precision == "float32" else 5e-3 * float(expected.abs().max())
    )
    assert_close(logits(model, recorded["in.eval_images"]), expected, rtol=0, atol=atol)
    with torch.no_grad():
        assert_close(model(pixel_values=recorded["in.eval_images"]).logits_per_image, expected, rtol=0, atol=atol)
    layer = model.get_base_model().visual_projection.promptkd_norm1["default"]
    assert int(layer.num_batches_tracked) == 5


def test_what_the_file_does_not_hold_is_asked_for(student_folder, vectors, tmp_path):
    settings = {"base_model": student_folder, "class_names": NAMES}
    with pytest.raises(AdapterError, match=r"checkpoint of PromptKD\. Missing: `class_vectors`"):
        convert(official(NAME), tmp_path / "a", **settings)
    with pytest.raises(PeftVLMError, match="one per name, of `class_dim`=96 numbers, got \\(7, 95\\)"):
        convert(official(NAME), tmp_path / "a", class_vectors=vectors[:, 1:], **settings)
    content = official_tensors(NAME)
    content.pop("VPT_image_trans.conv1.1.running_var")
    torch.save(content, tmp_path / "short.pth")
    with pytest.raises(AdapterError, match="missing .*running_var"):
        convert(tmp_path / "short.pth", tmp_path / "a", class_vectors=vectors, **settings)
    assert not (tmp_path / "a").exists()
