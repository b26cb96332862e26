"""Whole training checkpoints and TorchScript archives are read without running anything."""

import pathlib
import warnings
from collections import defaultdict

import pytest
import torch
from torch import nn

from peft_vlm.conversion.formats import convert
from peft_vlm.conversion.official_file import read_checkpoint
from peft_vlm.errors import AdapterError
from tests.conversion.official_files import official


class Payload:
    """Writes a file when unpickled the ordinary way."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_optimizers_and_schedulers_are_read_as_shells(tmp_path):
    """Dassl pickles both into its checkpoints; torch alone refuses such a file."""
    with pytest.raises(Exception, match="CosineAnnealingLR"):
        torch.load(official("E1_coop_words4_end.verbatim"), weights_only=True)
    verbatim = read_checkpoint(official("E1_coop_words4_end.verbatim"))
    plain = read_checkpoint(official("E1_coop_words4_end"))
    assert verbatim.keys() == plain.keys()
    assert all(torch.equal(verbatim[name], plain[name]) for name in plain)
    adam = torch.optim.Adam([nn.Parameter(torch.ones(2))])
    schedule = torch.optim.lr_scheduler.OneCycleLR(adam, 0.1, total_steps=3)
    torch.save(
        {"state_dict": {"a": torch.ones(2)}, "optimizer": adam, "scheduler": [schedule]}, tmp_path / "whole.pth"
    )
    assert list(read_checkpoint(tmp_path / "whole.pth")) == ["a"]


@pytest.mark.parametrize("hidden_in", ["tensors", "optimizer", "scheduler", "defaultdict"])
def test_code_is_refused_wherever_it_hides(hidden_in, tmp_path, student_folder):
    """What is allowed for real files must not open a way in for others."""
    payload, optimizer = Payload(tmp_path / "ran"), torch.optim.SGD([nn.Parameter(torch.ones(1))])
    content = {"state_dict": {"ctx": torch.ones(4, 64)}, "optimizer": optimizer}
    content["scheduler"] = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 3)
    if hidden_in == "tensors":
        content["state_dict"]["x"] = payload
    elif hidden_in == "optimizer":
        optimizer.defaults["x"] = payload
    elif hidden_in == "scheduler":
        content["scheduler"].x = payload
    else:
        content["optimizer"] = defaultdict(pathlib.Path.touch, {1: payload})
    torch.save(content, tmp_path / "bad.pth.tar-50")
    with pytest.raises(AdapterError, match=r"bad\.pth\.tar-50.*could run code"):
        convert(tmp_path / "bad.pth.tar-50", tmp_path / "out", base_model=student_folder, class_position="end")
    assert not (tmp_path / "ran").exists()
    assert not (tmp_path / "out").exists()


def test_files_from_before_zip_archives_are_read(tmp_path):
    """torch up to 1.5 wrote plain pickles."""
    torch.save({"state_dict": {"ctx": torch.ones(4, 2)}}, tmp_path / "old.pth", _use_new_zipfile_serialization=False)
    assert torch.equal(read_checkpoint(tmp_path / "old.pth")["ctx"], torch.ones(4, 2))
    content = {"ctx": Payload(tmp_path / "ran")}
    torch.save(content, tmp_path / "bad.pth", _use_new_zipfile_serialization=False)
    with pytest.raises(AdapterError, match="could run code"):
        read_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


class Tower(nn.Module):
    """Something with nested parts, as a scripted CLIP has."""

    def __init__(self) -> None:
        super().__init__()
        self.ln_post = nn.LayerNorm(4)
        self.layers = nn.Sequential(nn.Linear(4, 8), nn.Linear(8, 4))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Anything."""
        return self.layers(self.ln_post(hidden))


class Scripted(nn.Module):
    """A module with a tower, a parameter and a buffer, in half precision."""

    def __init__(self) -> None:
        super().__init__()
        self.visual = Tower()
        self.logit_scale = nn.Parameter(torch.tensor(4.6))
        self.register_buffer("input_resolution", torch.tensor(224))

    def forward(self, hidden: torch.Tensor) -> torch.Tensor:
        """Anything."""
        return self.logit_scale * self.visual(hidden)


def test_tensors_of_a_torchscript_archive_are_read_without_its_code(tmp_path):
    """OpenAI publishes its CLIPs this way; `torch.load(weights_only=True)` refuses them."""
    module = Scripted().half()
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", DeprecationWarning)  # torch.jit, which others' files were made with
        torch.jit.script(module).save(tmp_path / "archive.pt")
    read = read_checkpoint(tmp_path / "archive.pt")
    expected = module.state_dict()
    assert read.keys() == expected.keys()
    assert all(torch.equal(read[name], expected[name]) for name in expected)
    assert read["visual.ln_post.weight"].dtype == torch.float16
