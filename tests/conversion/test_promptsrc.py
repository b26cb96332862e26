"""Official IVLP and PromptSRC files become adapters that give the recorded outputs."""

import pytest
import torch
from torch.testing import assert_close

from peft_vlm.conversion.formats import convert
from peft_vlm.errors import AdapterError
from tests.conversion.official_files import adapter, logits, official, official_tensors
from tests.parity.recorded import facts, prompt_tensors, stacked, tensors

#: The recorded classes have digits and punctuation, whose spelling no file holds: see `test_class_names.py`.
pytestmark = pytest.mark.filterwarnings("ignore:Class names were read off")

NAMES = facts("B_ivlp_forward")["classnames"]


@pytest.mark.parametrize("words", [None, "a photo of a"])
def test_ivlp_gives_the_recorded_logits(words, student_folder, tmp_path):
    report = convert(official("B_ivlp_forward"), tmp_path / "a", base_model=student_folder, context_init=words)
    config = report.config
    assert (config.num_text_tokens, config.text_depth, config.num_vision_tokens, config.vision_depth) == (4, 3, 4, 3)
    assert len(report.used) == 6
    assert len(report.used) + len(report.unused) == len(official_tensors("B_ivlp_forward"))
    assert not report.missing
    assert all(why.endswith("model's") or "prompts, from the base model" in why for why in report.unused.values())
    recorded, case = tensors("B_ivlp_forward"), facts("B_ivlp_forward")
    actual = logits(adapter(tmp_path / "a"), recorded["in.images"])
    assert_close(actual, recorded["expected.logits"], rtol=0, atol=case["tolerance"]["logits_atol"])


def test_promptsrc_after_aggregation_gives_the_recorded_logits(student_folder, tmp_path):
    """Its frozen weights, buffers and logit scale are averages: off by rounding, which the report says."""
    name = "C2_promptsrc_training_gpa"
    report = convert(official(name), tmp_path / "a", base_model=student_folder, class_names=NAMES)
    recorded, case = tensors(name), facts(name)
    assert any("within" in why for why in report.unused.values())
    assert sum("copy of the frozen vision tower" in why for why in report.unused.values()) == 56
    model = adapter(tmp_path / "a")
    for part, found in prompt_tensors(model, prefix="promptsrc_").items():
        expected = recorded[f"expected.gpa_final.{part}"]
        assert torch.equal(stacked(list(found), expected), expected)
    actual = logits(model, recorded["in.images"][0])
    expected = recorded["expected.gpa_final.logits_of_first_batch"]
    assert_close(actual, expected, rtol=0, atol=case["tolerance"]["logits_atol"])


def test_half_precision(student_folder, tmp_path):
    """All tensors in half, as the official default writes most of them; the base model stays in full precision."""
    content = {key: value.half() for key, value in official_tensors("B_ivlp_forward").items()}
    torch.save({"state_dict": content}, tmp_path / "half.pth")
    convert(tmp_path / "half.pth", tmp_path / "a", base_model=student_folder)
    recorded = tensors("B_ivlp_forward")
    actual = logits(adapter(tmp_path / "a"), recorded["in.images"])
    assert_close(
        actual, recorded["expected.logits"], rtol=0, atol=2e-3 * float(recorded["expected.logits"].abs().max())
    )


def test_the_prompts_alone_will_do_and_the_rest_is_listed_as_missing(teacher_folder, tmp_path):
    """The teacher that the PromptKD trainer loaded."""
    report = convert(
        official("D_promptkd_teacher"), tmp_path / "a", base_model=teacher_folder, context_init="a photo of a"
    )
    assert len(report.used) == 6
    assert len(report.missing) > 100
    assert any("no 'prompt_learner.token_suffix' in the file" in note for note in report.notes)
    assert report.config.class_names is None


def test_fewer_tokens_than_words_leave_the_rest_in_the_prompt(student_folder, tmp_path):
    """Official `CTX_INIT` "a photo of a" with `N_CTX_TEXT` 2: "of a" stays, and belongs to no class name."""
    content = official_tensors("B_ivlp_forward")
    words = content["prompt_learner.ctx"]
    content["prompt_learner.token_suffix"] = torch.cat(
        [words[2:].expand(7, -1, -1), content["prompt_learner.token_suffix"]], dim=1
    )
    for name, tensor in content.items():
        if name == "prompt_learner.ctx" or (name.startswith("text_encoder.") and name.endswith("VPT_shallow")):
            content[name] = tensor[:2]
    torch.save({"state_dict": content}, tmp_path / "two.pth")
    settings = {"base_model": student_folder}
    report = convert(tmp_path / "two.pth", tmp_path / "a", context_init="a photo of a", **settings)
    assert report.config.class_names == [name.lower().replace("_", " ") for name in NAMES]
    assert report.config.template == "a photo of a {}."
    bare = convert(tmp_path / "two.pth", tmp_path / "b", **settings)
    assert bare.config.class_names == [f"of a {name}" for name in report.config.class_names]
    pixels = tensors("B_ivlp_forward")["in.images"]
    expected = logits(adapter(tmp_path / "b"), pixels)
    assert_close(logits(adapter(tmp_path / "a"), pixels), expected, rtol=0, atol=1e-4)
    with pytest.raises(AdapterError, match="continue with the rest of `context_init`"):
        convert(official("B_ivlp_forward"), tmp_path / "c", context_init="a photo of a photo", **settings)


def test_vision_tokens_alone_need_a_template(student_folder, tmp_path):
    content = {k: v for k, v in official_tensors("B_ivlp_forward").items() if "VPT" not in k or "image" in k}
    torch.save({k: v for k, v in content.items() if "prompt_learner" not in k}, tmp_path / "vpt.pth")
    with pytest.raises(AdapterError, match="`template` for a file without text context"):
        convert(tmp_path / "vpt.pth", tmp_path / "a", base_model=student_folder)
    report = convert(tmp_path / "vpt.pth", tmp_path / "a", base_model=student_folder, template="a photo of a {}.")
    assert report.config.depths == (0, 3)
    with pytest.raises(AdapterError, match="`template` for a file without text context only"):
        convert(official("B_ivlp_forward"), tmp_path / "b", base_model=student_folder, template="a {}.")


def test_other_base_models_gaps_and_foreign_tensors_are_refused(student_folder, teacher_folder, tmp_path):
    content = official_tensors("B_ivlp_forward")
    with pytest.raises(AdapterError, match="was made on another CLIP than"):
        convert(official("B_ivlp_forward"), tmp_path / "a", base_model=teacher_folder)

    def refused(changed: dict, message: str) -> None:
        torch.save({"state_dict": changed}, tmp_path / "changed.pth")
        with pytest.raises(AdapterError, match=message):
            convert(tmp_path / "changed.pth", tmp_path / "a", base_model=student_folder)

    deep = "image_encoder.transformer.resblocks.{}.VPT_shallow"
    refused({k: v for k, v in content.items() if k != deep.format(1)}, r"vision layers 1, 2, .* got layers \[2\]")
    refused(content | {"adapter.weight": torch.ones(2)}, r"tensors that those do not have: \['adapter\.weight'\]")
    refused(content | {deep.format(1): torch.zeros(3, 96)}, r"one shape \(tokens, width\)")
    frozen = "image_encoder.ln_post.weight"
    refused(content | {frozen: 1.5 * content[frozen]}, r"frozen tensor 'image_encoder\.ln_post\.weight'.*50% of its")
    assert not (tmp_path / "a").exists()
