"""A data root on the Hub: CoOp's folders in a dataset repository."""

from pathlib import Path

import pytest
from huggingface_hub import HfApi

from peft_vlm.data import load_benchmark
from peft_vlm.errors import DataError, HubError
from tests.benchmark_trees import write_trees
from tests.hub.server import LoopbackHub


def test_one_folder_of_a_dataset_is_downloaded_and_no_pickle(hub: LoopbackHub, tmp_path: Path) -> None:
    """All of ImageNet for the sake of DTD would fill a disk; a pickle runs code."""
    write_trees(tmp_path / "DATA")
    (tmp_path / "DATA" / "dtd" / "split_fewshot").mkdir()
    (tmp_path / "DATA" / "dtd" / "split_fewshot" / "shot_2-seed_1.pkl").write_bytes(b"code")
    for folder in ("dtd", "eurosat"):
        (tmp_path / "up" / folder).parent.mkdir(exist_ok=True)
        (tmp_path / "DATA" / folder).rename(tmp_path / "up" / folder)
    HfApi().create_repo("me/data", repo_type="dataset")
    HfApi().upload_folder(repo_id="me/data", folder_path=tmp_path / "up", repo_type="dataset")
    here, there = (load_benchmark("dtd", root, shots=2) for root in (tmp_path / "up", "me/data"))
    assert (here.labels, here.class_names) == (there.labels, there.class_names)
    assert [Path(here.path_of(i)).name for i in range(6)] == [Path(there.path_of(i)).name for i in range(6)]
    cached = Path(there.path_of(0)).parents[3]
    assert sorted(path.name for path in cached.iterdir()) == ["dtd"]
    assert not list(cached.rglob("*.pkl"))
    with pytest.raises(DataError, match=r"The benchmark 'ucf101' lacks 'UCF-101-midframes'"):
        load_benchmark("ucf101", "me/data")


def test_a_root_that_is_nowhere_is_said(hub: LoopbackHub) -> None:
    """A misspelt folder looks like an id."""
    with pytest.raises(HubError, match="'data/coop' is no folder here, and on the Hub: there is no such repository"):
        load_benchmark("dtd", "data/coop")
