"""Official files of ATPrompt's CoOp become CoOp adapters with attribute words, read off the file."""

import pytest
import torch
from torch.testing import assert_close

from peft_vlm.conversion.formats import convert
from peft_vlm.errors import AdapterError
from tests.conversion.official_files import adapter, logits
from tests.parity.recorded import facts, recorded_clip, tensors

#: The recorded classes have digits and punctuation, whose spelling no file holds: see `test_class_names.py`.
pytestmark = pytest.mark.filterwarnings("ignore:Class names were read off")

CASES = ("AT1_coop_two_attributes", "AT2_coop_three_attributes", "AT3_coop_two_token_attribute")


def official_file(name, path, *, prefix="", without=""):
    """Tensors of the official prompt learner: three groups of attribute vectors, slices of the placeholder prompt."""
    case, recorded = facts(name), tensors(name)
    counts, n_ctx, width = case["num_attribute_ctx"], case["n_ctx"], 64
    embedded = recorded_clip("weights_student").text_model.embeddings.token_embedding(recorded["in.input_ids"])
    content = {"ctx": recorded["in.text_ctx"], "token_prefix": embedded[:, :1]}
    place = 1
    for number, count in enumerate(counts, 1):
        content[f"ctx_att{number}"] = recorded[f"in.attribute_ctx.{number - 1}"]
        content[f"token_middle{number}"] = embedded[:, place + count : place + count + 1]  # one token per attribute
        place += count + 1
    for number in range(len(counts) + 1, 4):
        content[f"ctx_att{number}"] = torch.randn(2, width)
    content["token_suffix"] = embedded[:, place + n_ctx :]
    kept = {f"{prefix}{key}": t.detach().clone() for key, t in content.items() if not without or without not in key}
    torch.save({"state_dict": kept}, path)
    return path


@pytest.mark.parametrize("prefix", ["", "prompt_learner."])
@pytest.mark.parametrize("name", CASES)
def test_words_vectors_and_the_recorded_logits(name, prefix, student_folder, tmp_path):
    """A file of a two-token attribute gives what its training had: fillers where the official code slips."""
    case, recorded = facts(name), tensors(name)
    report = convert(official_file(name, tmp_path / "a.pth", prefix=prefix), tmp_path / "a", base_model=student_folder)
    assert report.kind == "ATPrompt"
    assert len(report.used) == 1 + len(case["attributes"])
    model = adapter(tmp_path / "a")
    config = model.active_peft_config
    leaks = name.startswith("AT3")
    assert config.attributes == (["rough", "x"] if leaks else case["attributes"])
    assert config.num_attribute_tokens == case["num_attribute_ctx"]
    assert config.template == ("X {}." if leaks else "{}.")
    assert any("fillers" in note for note in report.notes) == leaks
    expected, atol = recorded["expected.logits"], case["tolerance"]["logits_atol"]
    assert_close(logits(model, recorded["in.images"][0]), expected, rtol=0, atol=atol)


def test_a_file_without_its_words_is_refused(student_folder, tmp_path):
    """Vectors without the words between them would be another prompt."""
    file = official_file(CASES[0], tmp_path / "a.pth", without="middle")
    with pytest.raises(AdapterError, match="the attribute words as 'token_middle1'"):
        convert(file, tmp_path / "a", base_model=student_folder)
    assert not (tmp_path / "a").exists()
