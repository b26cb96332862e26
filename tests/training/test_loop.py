"""The loop of docs/loop.md: as printed, and its lines with the objective of every method."""

import json

import pytest
import torch
from torch.utils.data import DataLoader

from peft_vlm import PromptedClassifier
from tests.cases import CASES
from tests.readme_blocks import fenced_blocks
from tests.short_run import parts
from tests.source_tree import ROOT

(PAGE,) = fenced_blocks(ROOT / "docs" / "loop.md")
LOOP = PAGE.code[PAGE.code.index("objective.prepare") :]


@pytest.mark.parametrize("method", [case.method for case in CASES])
def test_the_lines_of_the_page_train_every_method(method, tmp_path, monkeypatch) -> None:
    """A hook that only the trainer calls would make a loop that trains something else, or nothing."""
    monkeypatch.chdir(tmp_path)
    torch.manual_seed(0)
    model, objective, dataset = parts(method)
    trained = {name: p.detach().clone() for name, p in model.named_parameters() if p.requires_grad}
    names = {"model": model, "objective": objective, "dataset": dataset, "torch": torch, "DataLoader": DataLoader}
    exec(LOOP, names)  # noqa: S102 - the page's own code
    after = dict(model.named_parameters())
    assert trained
    unchanged = [name for name, value in trained.items() if torch.equal(value, after[name])]
    assert [name for name in unchanged if "k_proj" not in name] == [], "softmax is blind to a bias of all keys"
    assert names["loss"].isfinite()
    config = json.loads((tmp_path / "outputs" / "loop" / "adapter_config.json").read_text())
    if config["peft_type"] == "LORA":  # PEFT's own configuration has no place for them
        return
    assert config["class_names"] == list(objective.prompts.class_names)
    assert config["template"] == "a {}."
    assert config["image_size"] == [16, 16]


def test_the_page_runs_as_printed(tmp_path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "examples").symlink_to(ROOT / "examples", target_is_directory=True)
    code = PAGE.code.replace("range(2)", "range(1)").replace("shuffle=True", "sampler=range(64)")
    exec(code, {"__name__": "page"})  # noqa: S102 - the page's own code, with two steps
    classifier = PromptedClassifier.from_pretrained("outputs/loop", device="cpu")
    assert len(classifier.class_names or ()) > 10
    assert classifier.template == "a photo of a {}."
