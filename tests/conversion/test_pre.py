"""Official PRE files become ordinary CoOp adapters with the recorded outputs."""

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from peft_vlm.conversion.formats import convert
from peft_vlm.errors import AdapterError
from tests.conversion.official_files import adapter, logits, official_tensors
from tests.parity.recorded import facts, tensors

#: The recorded classes have digits and punctuation, whose spelling no file holds: see `test_class_names.py`.
pytestmark = pytest.mark.filterwarnings("ignore:Class names were read off")


def official_file(name, path, *, prefix="", **more):
    """A file of PRE with the recorded tensors, and the buffers of a CoOp file of the same classes."""
    case, recorded = facts(name), tensors(name)
    content = {official: recorded[f"in.{own}"] for own, official in case["official_state_dict"].items()}
    content |= {part: official_tensors("E1_coop_words4_end")[part] for part in ("token_prefix", "token_suffix")}
    torch.save({"state_dict": {f"{prefix}{key}": tensor for key, tensor in (content | more).items()}}, path)
    return path


@pytest.mark.parametrize("name", ["RE1_pre_lstm_words4", "RE2_pre_mlp_random6", "RE3_pre_lstm_csc3"])
@pytest.mark.parametrize("prefix", ["", "prompt_learner."])
def test_the_encoded_context_and_the_recorded_logits(name, prefix, student_folder, tmp_path):
    """A context without the residual, or of the other direction, is another one."""
    case, recorded = facts(name), tensors(name)
    file = official_file(name, tmp_path / "pre.pth", prefix=prefix)
    position = case["class_token_position"]
    report = convert(file, tmp_path / "adapter", base_model=student_folder, class_position=position)
    assert report.kind == "PRE"
    assert len(report.used) == len(case["official_state_dict"])
    (context,) = load_file(tmp_path / "adapter" / "adapter_model.safetensors").values()
    assert_close(context, recorded["expected.encoded_ctx"], rtol=0, atol=1e-5)
    model = adapter(tmp_path / "adapter")
    assert model.active_peft_config.network is None
    actual, expected = logits(model, recorded["in.images"][0]), recorded["expected.logits"]
    assert_close(actual, expected, rtol=0, atol=case["tolerance"]["logits_atol"])


def test_other_networks_are_refused(student_folder, tmp_path):
    """A second LSTM layer that were left out would change the outputs without an error."""
    second = {"encoder_network.lstm_head.weight_ih_l1": torch.zeros(128, 64)}
    file = official_file("RE1_pre_lstm_words4", tmp_path / "two.pth", **second)
    with pytest.raises(AdapterError, match="1 tensors that those do not have.*weight_ih_l1"):
        convert(file, tmp_path / "a", base_model=student_folder)
    wide = {"encoder_network.module.0.weight": torch.zeros(32, 64)}
    file = official_file("RE2_pre_mlp_random6", tmp_path / "wide.pth", **wide)
    with pytest.raises(AdapterError, match=r"module.0.weight' of shape \(64, 64\), got \(32, 64\)"):
        convert(file, tmp_path / "a", base_model=student_folder)
    assert not (tmp_path / "a").exists()
