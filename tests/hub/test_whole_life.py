"""Every method from training to use elsewhere: train, evaluate, card, publish, load by id in a fresh process."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file

from peft_vlm import publish
from peft_vlm.evaluation.report import EvalReport
from tests.cases import CASES, logits_of
from tests.hub.adapters import BASE, put_base_model, trained, write_images
from tests.hub.conftest import connected
from tests.hub.server import TOKEN
from tests.source_tree import ROOT

METHODS = [case.method for case in CASES]


@pytest.fixture(scope="module")
def life(running_hub, tmp_path_factory):
    """All methods trained, evaluated and published twice; then one new process with an empty cache loads them all."""
    folder = tmp_path_factory.mktemp("life")
    dataset = write_images(folder / "colours")
    expected, first, second = {}, {}, {}
    with connected(running_hub) as hub:
        put_base_model(hub)
        for case in CASES:
            model = trained(case, folder / case.method, dataset)
            expected[case.method] = logits_of(case, model)
            for published in (first, second):
                published[case.method] = publish(folder / case.method, f"me/{case.method}", license="mit")
        environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_TOKEN": TOKEN, "HF_HUB_CACHE": str(folder / "empty")}
        command = [sys.executable, "-m", "tests.hub.fresh_process", str(folder), *METHODS]
        result = subprocess.run(command, env=environment, cwd=ROOT, capture_output=True, text=True)
        assert result.returncode == 0, result.stderr
        files = {name: hub.model(f"me/{name}").files for name in METHODS}
        commits = {name: hub.model(f"me/{name}").messages for name in METHODS}
    return SimpleNamespace(
        folder=folder,
        expected=expected,
        loaded=load_file(folder / "logits.safetensors"),
        first=first,
        second=second,
        files=files,
        commits=commits,
    )


@pytest.mark.parametrize("method", METHODS)
def test_a_fresh_process_gets_the_same_logits_by_id(life, method):
    assert torch.equal(life.loaded[method], life.expected[method])


@pytest.mark.parametrize("method", METHODS)
def test_publishing_again_makes_no_commit(life, method):
    assert life.first[method].changed
    assert not life.second[method].changed
    assert life.second[method].commit == life.first[method].commit
    assert len(life.commits[method]) == 1


@pytest.mark.parametrize("method", METHODS)
def test_all_that_users_need_is_published_and_nothing_else(life, method):
    """Optimizer states and checkpoints of the run stay at home."""
    expected = {"README.md", "adapter_config.json", "adapter_model.safetensors", "class_names.txt", "metrics.json"}
    expected |= {"report.json", "training_curve.png", "training_summary.json", "zero_shot.json"}
    assert set(life.files[method]) == expected | ({"prompt.png"} if method == "tvp" else set())
    assert life.files[method]["class_names.txt"].decode().split() == [
        "red",
        "orange",
        "yellow",
        "green",
        "blue",
        "purple",
    ]


@pytest.mark.parametrize("method", METHODS)
def test_the_card_is_valid_and_its_numbers_are_those_of_the_evaluation(life, method):
    text = life.files[method]["README.md"].decode()
    card = ModelCard(text)
    assert "More Information Needed" not in text
    assert card.data.base_model == BASE
    assert card.data.license == "mit"
    report, baseline = (EvalReport.load(life.folder / method / f"{name}.json") for name in ("report", "zero_shot"))
    (own,) = card.data.eval_results
    assert (own.metric_name, own.metric_value) == ("accuracy %", report.scores["accuracy"])
    assert f"| accuracy | {report.scores['accuracy']:.2f} | {baseline.scores['accuracy']:.2f} |" in text
    code = text.partition("```python\n")[2].partition("```")[0]
    assert code.splitlines()[0].startswith("import peft_vlm")
    assert f'"me/{method}"' in code
    compile(code, "card", "exec")
