"""Official files of Bayesian prompts become adapters with the recorded outputs, and adapters become such files."""

import pytest
import torch
from torch import Tensor
from torch.testing import assert_close

from peft_vlm.conversion.formats import convert, export
from peft_vlm.errors import AdapterError
from tests.conversion.official_files import adapter, logits
from tests.parity.recorded import facts, recorded_clip, recorded_tokenizer, tensors
from tests.parity.test_bayesian import CASES, set_noise

#: The recorded classes have digits and punctuation, whose spelling no file holds: see `test_class_names.py`.
pytestmark = pytest.mark.filterwarnings("ignore:Class names were read off")


def official_state(name: str) -> dict[str, Tensor]:
    """The recorded tensors under the names of the official file, with its embeddings of the class prompts."""
    case, recorded = facts(name), tensors(name)
    state = {official: recorded[f"in.{part}"] for part, official in case["official_state_dict"].items()}
    embedding = recorded_clip("weights_student").text_model.embeddings.token_embedding.weight.detach()
    embedded = embedding[recorded["in.input_ids"]]
    return state | {"token_prefix": embedded[:, :1], "token_suffix": embedded[:, 1 + case["n_ctx"] :]}


@pytest.mark.parametrize("name", CASES)
def test_official_files_there_and_back(name, student_folder, tmp_path):
    """`std_posterior` is a log-variance of shape (1, width); read as a deviation it gives other probabilities."""
    case, recorded, state = facts(name), tensors(name), official_state(name)
    torch.save({"state_dict": state, "epoch": 3}, tmp_path / "model.pth.tar-3")
    samples = case["num_samples"]
    report = convert(tmp_path / "model.pth.tar-3", tmp_path / "a", base_model=student_folder, num_samples=samples)
    assert report.kind == "Bayesian prompts"
    model = adapter(tmp_path / "a")
    assert model.active_peft_config.num_samples == samples
    settings = export(model, tmp_path / "back.pth", tokenizer=recorded_tokenizer())
    assert settings == {"VPT_TYPE": case["variant"], "L": samples, "N_CTX": 4}
    written = torch.load(tmp_path / "back.pth", weights_only=True)["state_dict"]
    assert written.keys() == state.keys()
    for key in case["official_state_dict"].values():
        assert torch.equal(written[key], state[key]), key
    set_noise(model, recorded["in.noise"][0])
    actual = logits(model, recorded["in.images"][0])
    assert_close(actual, recorded["expected.log_probs"], rtol=0, atol=case["tolerance"]["logits_atol"])


def test_words_of_another_number_are_refused(student_folder, tmp_path):
    torch.save({"state_dict": official_state(CASES[0])}, tmp_path / "model.pth.tar-3")
    with pytest.raises(AdapterError, match="`context_init` of 4 tokens.*'a photo' with 2"):
        convert(tmp_path / "model.pth.tar-3", tmp_path / "a", base_model=student_folder, context_init="a photo")
    assert not (tmp_path / "a").exists()
