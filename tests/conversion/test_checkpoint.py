"""Checkpoints are read without running what is in them, and what cannot be read is named."""

import pathlib

import pytest
import torch
from safetensors.torch import save_file

from peft_vlm.conversion.official_file import read_checkpoint
from peft_vlm.errors import AdapterError


@pytest.mark.parametrize("wrapped", [False, True])
def test_tensors_come_out_of_both_layouts(tmp_path, wrapped):
    tensors = {"a": torch.arange(3.0), "b": torch.ones(2, dtype=torch.int64)}
    torch.save({"state_dict": tensors, "epoch": 7} if wrapped else tensors, tmp_path / "model.pth.tar-7")
    read = read_checkpoint(tmp_path / "model.pth.tar-7")
    assert read.keys() == tensors.keys()
    assert all(torch.equal(read[key], tensors[key]) for key in tensors)


def test_safetensors_are_read(tmp_path):
    save_file({"a": torch.arange(3.0)}, tmp_path / "a.safetensors")
    assert torch.equal(read_checkpoint(tmp_path / "a.safetensors")["a"], torch.arange(3.0))


class Payload:
    """Writes a file when unpickled the ordinary way."""

    def __init__(self, path: pathlib.Path) -> None:
        self.path = path

    def __reduce__(self):
        return pathlib.Path.touch, (self.path,)


def test_code_in_a_checkpoint_is_refused_and_not_run(tmp_path):
    torch.save({"perturbation": torch.ones(1), "x": Payload(tmp_path / "ran")}, tmp_path / "bad.pth")
    with pytest.raises(AdapterError, match=r"bad\.pth.*could run code"):
        read_checkpoint(tmp_path / "bad.pth")
    assert not (tmp_path / "ran").exists()


def test_files_that_are_no_checkpoint_are_named(tmp_path):
    with pytest.raises(AdapterError, match=r"none\.pth.*does not exist"):
        read_checkpoint(tmp_path / "none.pth")
    torch.save({"a": torch.zeros(10_000)}, tmp_path / "cut.pth")
    (tmp_path / "cut.pth").write_bytes((tmp_path / "cut.pth").read_bytes()[:5_000])
    with pytest.raises(AdapterError, match=r"complete checkpoint, got .*cut\.pth"):
        read_checkpoint(tmp_path / "cut.pth")
    (tmp_path / "cut.safetensors").write_bytes(b"\x10")
    with pytest.raises(AdapterError, match=r"complete checkpoint, got .*cut\.safetensors"):
        read_checkpoint(tmp_path / "cut.safetensors")
    torch.save({"epoch": 3}, tmp_path / "empty.pth")
    with pytest.raises(AdapterError, match=r"tensors in .*empty\.pth.*\['epoch'\]"):
        read_checkpoint(tmp_path / "empty.pth")
    torch.save(torch.ones(2), tmp_path / "bare.pth")
    with pytest.raises(AdapterError, match="mapping of names to tensors.*'Tensor'"):
        read_checkpoint(tmp_path / "bare.pth")


def test_mappings_that_hold_themselves_are_read_once(tmp_path):
    """Two entries that are the whole again would double at every level."""
    weights = {"layer_0": {"q_proj": {"w_lora_A": torch.arange(3.0)}}}
    weights["again"] = weights["more"] = weights
    torch.save({"weights": weights}, tmp_path / "loop.pt")
    found = read_checkpoint(tmp_path / "loop.pt")
    assert list(found) == ["layer_0.q_proj.w_lora_A"]
