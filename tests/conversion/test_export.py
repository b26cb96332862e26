"""Adapters become files that the official trainers load; from an official file there and back nothing changes."""

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor

from peft_vlm import CoOpConfig, PromptKDConfig
from peft_vlm.conversion.formats import convert, export
from peft_vlm.conversion.official_file import read_checkpoint
from peft_vlm.errors import AdapterError
from peft_vlm.methods.tvp import TVPConfig, prompt_layer_of
from tests.cases import base_model, perturb
from tests.conversion.official_files import official, official_tensors
from tests.parity.recorded import facts, recorded_clip, recorded_tokenizer, tensors
from tests.tiny_mllm import tiny_mllm

#: The recorded classes have digits and punctuation, whose spelling no file holds: see `test_class_names.py`.
pytestmark = pytest.mark.filterwarnings("ignore:Class names were read off")

CASES = {
    "E1_coop_words4_end": ("student_folder", {"class_position": "end", "context_init": "a photo of a"}),
    "E3_coop_random16_middle": ("student_folder", {"class_position": "middle"}),
    "B_ivlp_forward": ("student_folder", {}),
    "C2_promptsrc_training_gpa": ("student_folder", {"context_init": "a photo of a"}),
    "D2_promptkd_5steps": ("student_folder", {}),
    "S3_sgd.flat_1e-3": ("skip_folder", {"template": "a photo of a {}."}),
}
SETTINGS = {
    "E1_coop_words4_end": {"N_CTX": 4, "CTX_INIT": "a photo of a", "CSC": False, "CLASS_TOKEN_POSITION": "end"},
    "D2_promptkd_5steps": {"N_CTX_VISION": 4, "PROMPT_DEPTH_VISION": 3},
    "S3_sgd.flat_1e-3": {"START_LAYER": 2},
}


@pytest.mark.parametrize("name", CASES)
def test_there_and_back_gives_the_official_file_again(name, request, tmp_path):
    """Bit for bit, class prompts included; PromptSRC's frozen averages come back as the base model's weights."""
    fixture, settings = CASES[name]
    folder = request.getfixturevalue(fixture)
    if name.startswith("D2"):
        vectors = tensors("D_promptkd_step")["expected.teacher.text_features"]
        settings = {"class_names": facts(name)["classnames"], "class_vectors": vectors}
    convert(official(name), tmp_path / "a", base_model=folder, **settings)
    model = PeftModel.from_pretrained(adapter_base(name), tmp_path / "a")
    flags = export(model, tmp_path / "b" / "model.pth.tar-3", tokenizer=recorded_tokenizer(), epoch=3)
    assert flags == SETTINGS.get(name, flags)
    content = torch.load(tmp_path / "b" / "model.pth.tar-3", weights_only=True)
    assert content["epoch"] == 3
    written, expected = content["state_dict"], official_tensors(name)
    if name.startswith("B_"):  # IVLP's file is PromptSRC's without the copy of the vision tower
        written = {key: value for key, value in written.items() if "ZS_image_encoder" not in key}
    assert written.keys() == expected.keys()
    averaged = name.startswith("C2")
    for key, value in expected.items():
        trained = key.endswith(("ctx", "VPT", "VPT_shallow"))
        if averaged and not trained:
            torch.testing.assert_close(written[key], value, rtol=1e-6, atol=1e-6)
        else:
            assert torch.equal(written[key], value), key
    assert not list((tmp_path / "b").glob("*.part"))
    convert(tmp_path / "b" / "model.pth.tar-3", tmp_path / "c", base_model=folder, **settings)
    assert same_tensors(tmp_path / "a", tmp_path / "c")


def adapter_base(name: str):
    """The recorded CLIP of a case."""
    return recorded_clip("tiny_clip" if name.startswith("S3") else "weights_student")


def same_tensors(one, other) -> bool:
    """Whether two adapter folders hold the same bits."""
    first, second = (load_file(folder / "adapter_model.safetensors") for folder in (one, other))
    return first.keys() == second.keys() and all(torch.equal(first[key], second[key]) for key in first)


def test_a_pixel_prompt_there_and_back(tmp_path):
    border = convert(official("T1_tvp.strong"), tmp_path / "a").config.border
    prompt: Tensor = tensors("T1_tvp")["strong.perturbation.3"]
    config = TVPConfig(canvas_size=32, border=border, image_mean=[0.5] * 3, image_std=[0.5] * 3)
    model = get_peft_model(tiny_mllm("llava").model, config)
    prompt_layer_of(model).prompts["default"].data.copy_(prompt)
    export(model, tmp_path / "checkpoint_best.pth")
    assert list(read_checkpoint(tmp_path / "checkpoint_best.pth")) == ["perturbation"]
    convert(tmp_path / "checkpoint_best.pth", tmp_path / "b")
    assert same_tensors(tmp_path / "a", tmp_path / "b")


def test_what_the_official_codes_cannot_say_is_refused(tmp_path):
    model = get_peft_model(base_model(), CoOpConfig(num_text_tokens=2, template="a {} icon"))
    with pytest.raises(AdapterError, match="context, class name and full stop.* `template`='a {} icon'"):
        export(model, tmp_path / "x.pth")
    student = get_peft_model(base_model(), PromptKDConfig(class_dim=8, vision_depth=1, projector_norm="layernorm"))
    perturb(student)
    with pytest.raises(AdapterError, match="2 layers with BatchNorm.*`projector_norm`='layernorm'"):
        export(student, tmp_path / "x.pth")
    with_head = CoOpConfig(num_text_tokens=2, template="{}.", modules_to_save=["visual_projection"])
    with pytest.raises(AdapterError, match=r"without `modules_to_save`, got \['visual_projection'\]"):
        export(get_peft_model(base_model(), with_head), tmp_path / "x.pth")
    clamped = TVPConfig(canvas_size=32, border=5, image_mean=[0.5] * 3, image_std=[0.5] * 3, clamp=True)
    with pytest.raises(AdapterError, match="`clamp`=False"):
        export(get_peft_model(base_model(), clamped), tmp_path / "x.pth")
    assert not (tmp_path / "x.pth").exists()
