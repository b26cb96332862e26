"""Official MaPLe files become adapters that give the recorded outputs, and adapters become such files."""

import pytest
import torch
from torch.testing import assert_close

from peft_vlm.conversion.formats import convert, export
from peft_vlm.errors import AdapterError
from tests.conversion.official_files import adapter, logits, official, official_tensors
from tests.parity.recorded import facts, recorded_tokenizer, tensors

#: The recorded classes have digits and punctuation, whose spelling no file holds: see `test_class_names.py`.
pytestmark = pytest.mark.filterwarnings("ignore:Class names were read off")

NAME = "G_maple"
SETTINGS = {"context_init": "a photo of a"}


def test_the_recorded_logits_come_out_of_the_official_file(student_folder, tmp_path):
    """Two of the four words stay in the prompt: read without them, every class name would begin with "of a"."""
    report = convert(official(NAME), tmp_path / "a", base_model=student_folder, **SETTINGS)
    assert report.kind == "MaPLe"
    assert len(report.used) == 9
    assert report.config.depth == 3
    assert report.config.class_names[2] == "boeing 747-400"
    recorded, atol = tensors(NAME), facts(NAME)["tolerance"]["logits_atol"]
    actual = logits(adapter(tmp_path / "a"), recorded["in.images"])
    assert_close(actual, recorded["expected.logits"], rtol=0, atol=atol)


def test_there_and_back_gives_the_same_tensors(student_folder, tmp_path):
    convert(official(NAME), tmp_path / "a", base_model=student_folder, **SETTINGS)
    settings = export(adapter(tmp_path / "a"), tmp_path / "back.pth", tokenizer=recorded_tokenizer())
    assert settings == {"N_CTX": 2, "PROMPT_DEPTH": 3, "CTX_INIT": "a photo of a"}
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    expected = official_tensors(NAME)
    assert expected.keys() <= back.keys()
    assert any(name.startswith("image_encoder.") for name in back), "frozen weights are written too"
    for name, tensor in expected.items():
        if "token_suffix" not in name:
            assert torch.equal(back[name], tensor), name


def test_a_file_without_a_projection_is_refused(student_folder, tmp_path):
    content = official_tensors(NAME)
    del content["prompt_learner.compound_prompt_projections.1.bias"]
    torch.save({"state_dict": content}, tmp_path / "cut.pth")
    with pytest.raises(AdapterError, match=r"'prompt_learner.compound_prompt_projections.1.bias' .*depth 3, got none"):
        convert(tmp_path / "cut.pth", tmp_path / "a", base_model=student_folder, **SETTINGS)
    assert not (tmp_path / "a").exists()
