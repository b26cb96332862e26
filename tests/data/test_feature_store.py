"""Room for stored tensors."""

import pytest
import torch

from peft_vlm.data import feature_store
from peft_vlm.data.feature_store import RowStore
from peft_vlm.errors import DataError

ROWS = (2**40, 2**10)  # 4 PB in float32


def test_what_memory_does_not_hold_is_refused_before_the_work_begins(tmp_path, monkeypatch):
    """The system grants such an allocation and kills the process when it is filled."""
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal: 4096 kB\nMemAvailable: 2048 kB\n")
    monkeypatch.setattr(feature_store, "_MEMORY", memory)
    with pytest.raises(DataError, match=r"room for 4194304.0 GB of states, got 0.0 GB free in RAM.*'none'"):
        RowStore("ram", name="states").allocate(ROWS, torch.float32)
    store = RowStore("ram", name="states")
    store.allocate((512, 1024), torch.float32)  # 2048 kB
    with pytest.raises(DataError):
        RowStore("ram", name="states").allocate((513, 1024), torch.float32)


def test_what_the_disk_does_not_hold_is_refused(tmp_path):
    """The file would be made, and the process would die of a bus error on the way."""
    folder = tmp_path / "not" / "made" / "yet"
    with pytest.raises(DataError, match=r"room for 4194304.0 GB of states, got .* free in "):
        RowStore("disk", name="states", folder=folder).allocate(ROWS, torch.float32)
    assert len(list(tmp_path.rglob("*.bin"))) == 0
