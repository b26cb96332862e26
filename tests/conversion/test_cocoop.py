"""Official CoCoOp files become adapters that give the recorded outputs, and adapters become such files."""

import pytest
import torch
from torch.testing import assert_close

from peft_vlm.conversion.formats import convert, export
from peft_vlm.errors import AdapterError
from tests.conversion.official_files import adapter, logits, official, official_tensors
from tests.parity.recorded import facts, recorded_clip, recorded_tokenizer, tensors

#: The recorded classes have digits and punctuation, whose spelling no file holds: see `test_class_names.py`.
pytestmark = pytest.mark.filterwarnings("ignore:Class names were read off")

NAME = "F_cocoop"


@pytest.mark.parametrize("words", [None, "a photo of a"])
def test_the_recorded_logits_come_out_of_the_official_file(words, student_folder, tmp_path):
    report = convert(official(NAME), tmp_path / "a", base_model=student_folder, context_init=words)
    assert report.kind == "CoCoOp"
    assert len(report.used) == 5
    recorded, atol = tensors(NAME), facts(NAME)["tolerance"]["logits_atol"]
    actual = logits(adapter(tmp_path / "a"), recorded["in.images"])
    assert_close(actual, recorded["expected.logits"], rtol=0, atol=atol)


def test_there_and_back_gives_the_same_tensors(student_folder, tmp_path):
    convert(official(NAME), tmp_path / "a", base_model=student_folder, context_init="a photo of a")
    settings = export(adapter(tmp_path / "a"), tmp_path / "back.pth", tokenizer=recorded_tokenizer())
    assert settings == {"N_CTX": 4, "CTX_INIT": "a photo of a"}
    back = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    expected = official_tensors(NAME)
    assert back.keys() == expected.keys()
    for name, tensor in expected.items():
        if "token_suffix" not in name:
            assert torch.equal(back[name], tensor), name


def test_a_file_of_cpl_is_one_of_cocoop_with_a_mask(student_folder, tmp_path):
    """The mask of its training has no use afterwards; a converter that knows it not would refuse the file."""
    case, recorded = facts("CF2_cpl_elementwise"), tensors("CF2_cpl_elementwise")
    state = {official: recorded[f"expected.final.{part}"] for part, official in case["official_state_dict"].items()}
    embedding = recorded_clip("weights_student").text_model.embeddings.token_embedding.weight.detach()
    embedded = embedding[recorded["in.input_ids"]]
    state |= {"token_prefix": embedded[:, :1], "token_suffix": embedded[:, 1 + case["n_ctx"] :]}
    torch.save({"state_dict": state}, tmp_path / "model.pth.tar-3")
    report = convert(tmp_path / "model.pth.tar-3", tmp_path / "a", base_model=student_folder)
    assert report.kind == "CoCoOp"
    assert len(report.used) == 5
    actual = logits(adapter(tmp_path / "a"), recorded["in.eval_images"])
    atol = case["tolerance"]["logits_atol"]
    assert_close(actual, recorded["expected.final.eval_logits"], rtol=0, atol=atol)


def test_words_of_another_number_are_refused(student_folder, tmp_path):
    with pytest.raises(AdapterError, match="`context_init` of 4 tokens.*'a photo' with 2"):
        convert(official(NAME), tmp_path / "a", base_model=student_folder, context_init="a photo")
    assert not (tmp_path / "a").exists()
