"""The loopback Hub against the real client: what the other tests of this folder rely on."""

import socket
from pathlib import Path

import pytest
from huggingface_hub import HfApi, ModelCard, file_exists, hf_hub_download, snapshot_download
from huggingface_hub.errors import (
    EntryNotFoundError,
    HfHubHTTPError,
    RepositoryNotFoundError,
    RevisionNotFoundError,
)

from tests.hub.card_rules import card_problems
from tests.hub.server import Fault

CARD = "---\nlicense: mit\ntags:\n- test\n---\n# A repository\n"


@pytest.fixture
def folder(tmp_path):
    """A folder with a card, a small file in a subfolder and a file that is stored as an LFS object."""
    (tmp_path / "inside").mkdir()
    (tmp_path / "README.md").write_text(CARD)
    (tmp_path / "inside" / "note \u00e9.txt").write_text("hello")
    (tmp_path / "weights.safetensors").write_bytes(bytes(range(256)) * 100)
    return tmp_path


def upload(folder, **options) -> HfApi:
    api = HfApi()
    api.create_repo("me/demo", exist_ok=True, private=options.pop("private", None))
    api.upload_folder(repo_id="me/demo", folder_path=folder, **options)
    return api


def test_a_folder_goes_up_and_comes_down_again(hub, folder):
    upload(folder)
    copy = snapshot_download("me/demo")
    for path in ("README.md", "inside/note \u00e9.txt", "weights.safetensors"):
        assert Path(copy, path).read_bytes() == (folder / path).read_bytes()
    assert file_exists("me/demo", "weights.safetensors")
    assert not file_exists("me/demo", "other.txt")
    assert ModelCard.load("me/demo").data.license == "mit"
    assert hub.model("me/demo").branches["main"][-1].files["weights.safetensors"].lfs


def test_an_unchanged_folder_makes_no_commit_and_a_change_makes_one(hub, folder):
    upload(folder)
    upload(folder)
    assert len(hub.model("me/demo").messages) == 1
    (folder / "inside" / "note \u00e9.txt").unlink()
    upload(folder, delete_patterns="inside/*")
    assert len(hub.model("me/demo").messages) == 2
    assert sorted(hub.model("me/demo").files) == ["README.md", "weights.safetensors"]


def test_revisions_are_kept_apart(hub, folder):
    api = upload(folder)
    first = api.model_info("me/demo").sha
    api.create_branch("me/demo", branch="v2")
    (folder / "README.md").write_text(CARD + "changed\n")
    api.upload_folder(repo_id="me/demo", folder_path=folder, revision="v2")
    readme = [hf_hub_download("me/demo", "README.md", revision=revision) for revision in ("main", first, "v2")]
    assert [Path(path).read_text().endswith("changed\n") for path in readme] == [False, False, True]
    with pytest.raises(RevisionNotFoundError):
        hf_hub_download("me/demo", "README.md", revision="v3")


def test_private_repositories_need_a_token(hub, folder, monkeypatch):
    upload(folder, private=True)
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("me/demo", "README.md")
    with pytest.raises(HfHubHTTPError, match="401"):
        HfApi().create_repo("me/other")
    assert hf_hub_download("me/demo", "README.md", token="hf_dummy")


def test_missing_things_have_their_own_errors(hub, folder):
    upload(folder)
    with pytest.raises(EntryNotFoundError):
        hf_hub_download("me/demo", "other.txt")
    with pytest.raises(RepositoryNotFoundError):
        hf_hub_download("me/nothing", "README.md")
    with pytest.raises(HfHubHTTPError, match="403"):
        HfApi().create_repo("someone-else/demo")


def test_invalid_cards_are_refused(hub, folder):
    (folder / "README.md").write_text("---\nlicense: none of yours\n---\n")
    with pytest.raises(ValueError, match="license"):
        upload(folder)
    assert hub.model("me/demo").files == {}
    assert card_problems(CARD) == []
    assert "base_model" in card_problems("---\nbase_model: a/local/folder\n---\n")[0]
    assert "dataset.type" in card_problems("---\nmodel-index: [{name: a, results: [{task: {type: b}}]}]\n---\n")[0]


@pytest.mark.parametrize("status", [401, 404, 409, 429, 500])
def test_told_to_fail_it_fails_and_keeps_nothing(hub, folder, status):
    hub.faults.append(Fault("POST .*/commit/", status=status))
    with pytest.raises(HfHubHTTPError, match=str(status)):
        upload(folder)
    assert hub.model("me/demo").files == {}
    hub.faults.clear()
    upload(folder)
    assert len(hub.model("me/demo").files) == 3


def test_a_cut_download_goes_on_where_it_stopped(hub, folder):
    upload(folder)
    hub.faults.append(Fault("GET .*/resolve/.*weights", cut=True, times=1))
    path = hf_hub_download("me/demo", "weights.safetensors")
    assert Path(path).read_bytes() == (folder / "weights.safetensors").read_bytes()
    assert sum("GET" in line and "weights" in line for line in hub.requests) == 2


def test_a_slow_answer_is_asked_for_again_and_waited_for(hub, folder):
    upload(folder)
    hub.faults.append(Fault("HEAD .*/resolve/", delay=0.3))
    assert hf_hub_download("me/demo", "README.md", etag_timeout=0.05)
    assert sum("HEAD" in line for line in hub.requests) == 2


def test_no_request_can_leave_this_computer(hub):
    with pytest.raises(AssertionError, match="left this computer, to 'example.com'"):
        socket.create_connection(("example.com", 80))
    with socket.socket() as one, pytest.raises(AssertionError, match="left this computer"):
        one.connect(("192.0.2.1", 80))
