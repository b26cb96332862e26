"""Every method from training to use elsewhere: train, evaluate, card, publish, load by id in a fresh process."""

import os
import subprocess
import sys
from types import SimpleNamespace

import pytest
import torch
from huggingface_hub import ModelCard
from safetensors.torch import load_file, save_file
from torch.testing import assert_close

from peft_vlm import publish
from peft_vlm.cli import main
from peft_vlm.evaluation.report import EvalReport
from peft_vlm.evaluation.run import load_model
from peft_vlm.export import export_classifier, write_export
from peft_vlm.serving.onnx import OnnxClassifier
from peft_vlm.text import tokenize_for_model
from tests.cases import CASES, logits_of
from tests.hub.adapters import BASE, put_base_model, trained, write_images
from tests.hub.conftest import connected
from tests.hub.server import TOKEN
from tests.hub.storage import LFS_SUFFIXES, File, Repository
from tests.source_tree import ROOT

pytestmark = pytest.mark.plots

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
    expected |= {"tvp": {"prompt.png"}, "clip_lora": {"peft_vlm.json"}}.get(method, set())
    assert set(life.files[method]) == expected
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


def test_a_lora_of_the_bundled_clip_needs_only_peft_and_becomes_onnx(hub, tmp_path):
    """Trained by name, published, loaded by `PeftModel` in a process without peft_vlm, merged there, exported here."""
    base, adapter = "me/student", tmp_path / "run"
    student = ROOT / "examples" / "assets" / "clip_student"
    files = {p.name: File(p.read_bytes(), p.name.endswith(LFS_SUFFIXES)) for p in student.iterdir() if p.is_file()}
    hub.repositories["model", base] = Repository(base)
    hub.repositories["model", base].commit("main", "the base model", files)
    words = [
        "train",
        "--method",
        "clip_lora",
        "--model",
        str(student),
        "--dataset",
        str(write_images(tmp_path / "data")),
    ]
    words += ["--split", "test", "--no_evaluate", "--template", "a photo of a {}.", "--max_steps", "3", "--use_cpu"]
    words += ["--learning_rate", "0.001", "--output_dir", str(adapter), "--json"]
    assert main(words) == 0
    publish(adapter, "me/lora", license="mit", base_model=base, incomplete=True)
    loaded = load_model("me/lora")
    inputs = {"pixel_values": torch.randn(3, 3, 48, 48, generator=torch.Generator().manual_seed(0))}
    prompts = tokenize_for_model(
        loaded.model, loaded.tokenizer, loaded.class_names or (), template=loaded.template or ""
    )
    inputs["input_ids"] = prompts.input_ids
    save_file(inputs, tmp_path / "inputs.safetensors")
    with torch.no_grad():
        expected = loaded.model(**inputs).logits_per_image
        frozen = loaded.model.get_base_model()
        with loaded.model.disable_adapter():
            assert (frozen(**inputs).logits_per_image - expected).abs().max() > 1e-3
    code = (
        "import sys\n"
        "from peft import PeftModel\n"
        "from safetensors.torch import load_file, save_file\n"
        "from transformers import CLIPModel\n"
        "model = PeftModel.from_pretrained(CLIPModel.from_pretrained('me/student'), 'me/lora').eval()\n"
        "inputs = load_file(sys.argv[1])\n"
        "logits = {'adapter': model(**inputs).logits_per_image}\n"
        "logits['merged'] = model.merge_and_unload()(**inputs).logits_per_image\n"
        "assert not any(name.startswith('peft_vlm') for name in sys.modules)\n"
        "save_file({name: t.detach().contiguous() for name, t in logits.items()}, sys.argv[2])\n"
    )
    environment = {**os.environ, "HF_HUB_OFFLINE": "0", "HF_HUB_CACHE": str(tmp_path / "empty")}
    command = [sys.executable, "-c", code, *(str(tmp_path / f"{name}.safetensors") for name in ("inputs", "logits"))]
    result = subprocess.run(command, env=environment, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    for logits in load_file(tmp_path / "logits.safetensors").values():
        assert_close(logits, expected, rtol=1e-4, atol=1e-4)
    write_export(export_classifier("me/lora"), tmp_path / "exported", ["onnx"])
    onnx = OnnxClassifier(tmp_path / "exported" / "classifier.onnx", threads=1)
    assert_close(torch.from_numpy(onnx(inputs["pixel_values"].numpy())), expected, rtol=1e-3, atol=1e-3)
