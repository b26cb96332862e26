"""Official TVP files become adapters with the recorded prompt."""

import json

import pytest
import torch
from safetensors.torch import load_file

from peft_vlm.conversion.formats import convert
from peft_vlm.errors import AdapterError
from tests.conversion.official_files import official
from tests.parity.recorded import tensors


@pytest.mark.parametrize("run", ["readme", "strong"])
def test_the_recorded_prompt_comes_out_of_the_official_file(run, tmp_path):
    """With its border, which is read off the tensor; what the prompt does on a model is `tests/parity/test_tvp.py`."""
    report = convert(official(f"T1_tvp.{run}"), tmp_path / "a", shrink="processor")
    written = load_file(tmp_path / "a" / "adapter_model.safetensors")
    assert torch.equal(written["base_model.model.tvp_prompt"], tensors("T1_tvp")[f"{run}.perturbation.3"])
    assert (report.config.canvas_size, report.config.shape, report.config.shrink) == (32, "border", "processor")
    assert report.used == ("perturbation",)
    assert json.loads((tmp_path / "a" / "conversion.json").read_text()) == report.to_dict()


def test_settings_of_other_kinds_are_refused(tmp_path):
    with pytest.raises(AdapterError, match="checkpoint of TVP. Not for this kind: `class_names`"):
        convert(official("T1_tvp.readme"), tmp_path / "a", class_names=["cat"])
