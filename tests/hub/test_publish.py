"""Publishing an adapter folder: what is refused, where it goes, and what the Hub's failures leave behind."""

import json
import shutil
import warnings
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard, constants
from peft import AutoPeftModel, LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from transformers import CLIPModel, pipeline

import peft_vlm
from peft_vlm import PromptedClassifier, publish
from peft_vlm.cli import main
from peft_vlm.cli.program import _quiet
from peft_vlm.errors import AdapterError, HubError, PeftVLMWarning
from peft_vlm.evaluation.report import EvalReport
from tests.cases import base_model, logits_of
from tests.hub.adapters import BASE, SKIP_TUNING, put_base_model, trained, write_images
from tests.hub.conftest import connected
from tests.hub.server import Fault
from tests.tiny import noise_image

pytestmark = pytest.mark.plots

NAME = "me/adapter"


@pytest.fixture(scope="module")
def run(running_hub, tmp_path_factory) -> Path:
    """A trained and evaluated adapter."""
    folder = tmp_path_factory.mktemp("run")
    with connected(running_hub) as hub:
        put_base_model(hub)
        trained(SKIP_TUNING, folder / "adapter", write_images(folder / "colours"))
    return folder / "adapter"


@pytest.fixture
def adapter(run, hub, tmp_path) -> Path:
    """A copy of it that a test may spoil; the Hub has the base model."""
    put_base_model(hub)
    return Path(shutil.copytree(run, tmp_path / "adapter"))


def test_the_folder_stays_as_it_is(adapter, hub):
    before = {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()}
    published = publish(adapter, NAME, license="mit")
    assert len(before) > 5
    assert {path: path.read_bytes() for path in adapter.rglob("*") if path.is_file()} == before
    assert published.url.endswith(f"{NAME}/commit/{published.commit}")
    assert hub.model(NAME).messages == ["adapter: skip_tuning adapter"]


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda folder: change_weights(folder, lambda t: t * float("nan")), "finite weights, got NaN"),
        (
            lambda folder: change_config(folder, base_model_name_or_path="a/b/c"),
            "base model .*'a/b/c': pass its Hub id as `base_model`",
        ),
    ],
)
def test_what_nobody_could_use_is_refused_before_any_request(adapter, hub, spoil, message):
    spoil(adapter)
    hub.requests.clear()
    with pytest.raises(AdapterError, match=message):
        publish(adapter, NAME, license="mit")
    assert hub.requests == []


@pytest.mark.parametrize(
    ("spoil", "warning", "line"),
    [
        (lambda folder: (folder / "training_summary.json").unlink(), "training_summary.json", "Nothing is recorded"),
        (
            lambda folder: (folder / "report.json").unlink(),
            "an evaluation .*evaluate --baseline",
            "\nNot evaluated.\n",
        ),
        (
            lambda folder: (folder / "zero_shot.json").unlink(),
            "scores of the base model",
            "Not compared with zero-shot",
        ),
        (
            lambda folder: change_weights(folder, lambda t: t + 1),
            "an evaluation, since 'report.json' is about other weights",
            "Not evaluated: the evaluation in the folder is about other weights.",
        ),
    ],
)
def test_what_users_will_miss_is_a_warning_and_a_line_on_the_card(adapter, hub, spoil, warning, line):
    """Refusing these made people pass `incomplete=True`, which also lets through what nobody can use."""
    spoil(adapter)
    with pytest.warns(PeftVLMWarning, match=f"Publishing without .*{warning}"):
        publish(adapter, NAME, license="mit")
    card = hub.model(NAME).files["README.md"].decode()
    assert line in card
    if line.startswith("Not evaluated:"):
        assert "report.json" not in hub.model(NAME).files
        assert "model-index" not in card


def test_the_command_warns_in_a_line_with_its_flags(adapter, hub, capsys):
    change_config(adapter, base_model_name_or_path=str(adapter))
    assert main(["publish", str(adapter), NAME]) == 2
    error = capsys.readouterr().err
    assert error.count("\n") == 1
    assert "pass its Hub id as `--base_model`" in error
    assert "pass `--incomplete`" in error
    with pytest.warns(PeftVLMWarning, match="a licence"):
        assert main(["publish", str(adapter), NAME, "--base_model", BASE]) == 0
    with _quiet(lambda text: text.replace("`license`", "`--license`")):
        shown = warnings.formatwarning("Pass `license`.", PeftVLMWarning, "file.py", 1)
    assert shown == "Warning: Pass `--license`.\n", "no file, no line of ours"


def test_told_so_it_publishes_what_there_is_and_the_card_says_so(adapter, hub):
    for name in ("report.json", "training_summary.json"):
        (adapter / name).unlink()
    publish(adapter, NAME, incomplete=True)
    card = hub.model(NAME).files["README.md"].decode()
    for sentence in ("Not evaluated.", "It was not evaluated.", "Nothing is recorded about the training", "gave none"):
        assert sentence in card
    assert "More Information Needed" not in card
    assert ModelCard(card).data.license is None


def test_what_is_no_adapter_is_refused_even_so(adapter, hub, tmp_path):
    (adapter / "adapter_model.safetensors").write_bytes(b"cut off")
    with pytest.raises(AdapterError, match="cut off or damaged"):
        publish(adapter, NAME, license="mit", incomplete=True)
    (adapter / "adapter_model.safetensors").unlink()
    with pytest.raises(AdapterError, match=r"Expected 'adapter_model.safetensors'.*got none"):
        publish(adapter, NAME, license="mit", incomplete=True)
    get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path / "lora")
    with pytest.raises(AdapterError, match="got one of PEFT's 'LORA'"):
        publish(tmp_path / "lora", NAME, license="mit")
    assert ("model", NAME) not in hub.repositories


@pytest.mark.parametrize("name", ["a/b/c", "no-owner", "me/a b"])
def test_an_impossible_name_is_refused(adapter, hub, name):
    """Without an owner, the code on the card could not name the repository."""
    with pytest.raises(HubError, match=f"'owner/name', got '{name}'"):
        publish(adapter, name, license="mit")


def test_another_base_model_name_is_written_into_the_published_configuration(adapter, hub):
    change_config(adapter, base_model_name_or_path=str(adapter))
    publish(adapter, NAME, license="mit", base_model=BASE)
    assert json.loads(hub.model(NAME).files["adapter_config.json"])["base_model_name_or_path"] == BASE
    assert ModelCard(hub.model(NAME).files["README.md"].decode()).data.base_model == BASE


def test_many_adapters_branches_and_private_repositories(adapter, hub, monkeypatch):
    """Loaded by subfolder, by branch, by commit, with a token, and afterwards without a connection."""
    publish(adapter, NAME, license="mit", subfolder="first", private=True)
    change_weights(adapter, lambda tensor: 1.5 * tensor)
    publish(adapter, NAME, license="mit", revision="v2", incomplete=True)
    picture = noise_image(20, 20)
    by_folder = PromptedClassifier.from_pretrained(adapter).predict(picture)
    by_branch = PromptedClassifier.from_pretrained(NAME, revision="v2")
    assert by_branch.predict(picture) == by_folder
    commit = hub.model(NAME).branches["v2"][-1].oid
    assert PromptedClassifier.from_pretrained(NAME, revision=commit).predict(picture) == by_folder
    first = PromptedClassifier.from_pretrained(NAME, subfolder="first")
    assert first.predict(picture) != by_folder
    assert 'from_pretrained("me/adapter", subfolder="first")' in hub.model(NAME).files["first/README.md"].decode()
    monkeypatch.delenv("HF_TOKEN")
    with pytest.raises(HubError, match="no such repository, or it is private. Log in"):
        PromptedClassifier.from_pretrained(NAME, revision="v3")
    hub.repositories["model", BASE].private = False
    assert PromptedClassifier.from_pretrained(NAME, subfolder="first", token="hf_dummy").predict(picture)
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    hub.requests.clear()
    assert PromptedClassifier.from_pretrained(NAME, revision="v2").predict(picture) == by_folder
    assert hub.requests == []


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("POST /api/repos/create", status=401), r"does not know you\. Log in with `hf auth login`"),
        (Fault("POST /api/repos/create", status=403), "with write permission"),
        (Fault("POST .*/preupload/", status=404), "no such repository"),
        (Fault("POST .*/commit/", status=409), "something else is changing the repository"),
        (Fault("POST .*/commit/", status=429), "fewer requests. Wait some minutes"),
        (Fault("POST .*/lfs/objects/batch", status=500), "the Hub has a problem. Call again later"),
        (Fault("POST .*/validate-yaml", status=400), "card invalid"),
        (Fault("PUT /lfs/", cut=True), "the connection failed"),
        (Fault("POST .*/commit/", cut=True), "the connection failed"),
    ],
)
def test_a_failure_says_what_to_do_and_leaves_nothing_half_done(adapter, hub, fault, message):
    hub.faults.append(fault)
    with pytest.raises(HubError, match=f"'{NAME}' was not published: .*{message}"):
        publish(adapter, NAME, license="mit")
    stored = hub.repositories.get(("model", NAME))
    assert stored is None or stored.files == {} or fault.pattern == "POST .*/commit/", "no commit, or all of it"
    hub.faults.clear()
    publish(adapter, NAME, license="mit")
    assert len(hub.model(NAME).messages) == 1
    assert len(hub.model(NAME).files) == 9


@pytest.mark.parametrize(
    ("fault", "message"),
    [
        (Fault("HEAD .*/adapter_config.json", status=401), "does not know you|private"),
        (Fault("HEAD .*/adapter_config.json", status=500), "the Hub has a problem"),
        (Fault("GET .*adapter_model.safetensors", cut=True), "the connection failed"),
    ],
)
def test_a_failing_download_says_what_to_do(adapter, hub, fault, message):
    publish(adapter, NAME, license="mit")
    hub.faults.append(fault)
    with pytest.raises(peft_vlm.errors.PeftVLMError, match=message):
        PromptedClassifier.from_pretrained(NAME)
    hub.faults.clear()
    assert PromptedClassifier.from_pretrained(NAME).class_names


def test_loading_what_is_not_there_names_it(adapter, hub):
    publish(adapter, NAME, license="mit")
    with pytest.raises(HubError, match="no such revision"):
        PromptedClassifier.from_pretrained(NAME, revision="v7")
    with pytest.raises(AdapterError, match="Expected 'adapter_config.json' in 'me/adapter/elsewhere', got none"):
        PromptedClassifier.from_pretrained(NAME, subfolder="elsewhere")
    with pytest.raises(HubError, match="no such repository"):
        PromptedClassifier.from_pretrained("me/nothing")


def test_the_numbers_of_every_protocol_reach_the_card(adapter, hub):
    """Base, new and harmonic mean, one figure each beside its baseline."""
    for name, scores in (("report", (71.25, 64.5, 67.7)), ("zero_shot", (68.0, 67.0, 67.5))):
        report = EvalReport.load(adapter / f"{name}.json")
        values = dict(zip(("base", "new", "h"), scores, strict=True))
        parts = {part: report.parts["all"] for part in ("base", "new")}
        EvalReport(**{**vars(report), "protocol": "base-to-new", "scores": values, "parts": parts}).save(
            adapter / f"{name}.json"
        )
    publish(adapter, NAME, license="mit")
    text = hub.model(NAME).files["README.md"].decode()
    assert "| colours, test | new accuracy | 64.50 | 67.00 | -2.50 |" in text
    results = ModelCard(text).data.eval_results
    assert [result.metric_value for result in results] == [71.25, 64.5, 67.7], "not those of the base model"


def test_all_adapters_of_a_table_are_published_at_once(adapter, hub, tmp_path, capsys):
    """Thirty commands for thirty prompts, or one that leaves half of them behind."""
    grid = tmp_path / "grid"
    for name in ("dtd/seed1", "dtd/seed2", "sun397/seed1"):
        shutil.copytree(adapter, grid / name)
    shutil.copytree(adapter, grid / "dtd/seed1/checkpoint-3")
    (grid / "table.md").write_text("| data set | ours |\n|---|---|\n| dtd | 70.00 |\n")
    words = ["--collection", NAME, "--license", "mit", "--base_model", BASE]
    assert main(["publish", str(grid / "dtd"), *words, str(grid / "sun397"), str(grid / "table.md")]) == 0
    files = hub.model(NAME).files
    assert len(hub.model(NAME).messages) == 1
    folders = {name.rpartition("/")[0] for name in files if name.endswith("adapter_model.safetensors")}
    assert folders == {"dtd/seed1", "dtd/seed2", "sun397/seed1"}
    card = files["README.md"].decode()
    assert ModelCard(card).data.base_model == BASE
    assert "| dtd | 70.00 |" in card
    assert 'subfolder="dtd/seed1"' in card
    assert 'subfolder="sun397/seed1"' in files["sun397/seed1/README.md"].decode()
    assert isinstance(
        PeftModel.from_pretrained(CLIPModel.from_pretrained(BASE), NAME, subfolder="dtd/seed2"), PeftModel
    )
    (grid / "sun397/seed1/adapter_model.safetensors").write_bytes(b"half")
    hub.requests.clear()
    assert main(["publish", str(grid), *words]) == 2
    assert hub.requests == [], "nothing is uploaded where one adapter is damaged"
    assert main(["publish", str(grid), "a/b", "c"]) == 2
    assert "For several folders pass `--collection`" in capsys.readouterr().err
    assert main(["publish", str(grid / "none"), *words]) == 2
    assert main(["publish", str(grid / "table.md"), *words]) == 2


def test_models_are_published_with_the_reports_of_their_run(adapter, hub):
    """`model.push_to_hub`, which in PEFT uploads a card full of gaps."""
    model = PeftModel.from_pretrained(base_model(), adapter)
    with pytest.warns(PeftVLMWarning, match="training_summary.json"):
        model.push_to_hub("me/alone", license="mit", base_model=BASE)
    published = model.push_to_hub(NAME, run_folder=adapter, license="mit", base_model=BASE)
    assert published.changed
    assert not publish(adapter, NAME, license="mit").changed
    loaded = PeftModel.from_pretrained(base_model(), NAME)
    assert torch.equal(logits_of(SKIP_TUNING, loaded), logits_of(SKIP_TUNING, model))


def test_other_adapters_keep_the_upload_of_peft(hub):
    get_peft_model(base_model(), LoraConfig(target_modules=["q_proj"], r=2)).push_to_hub("me/lora")
    assert {"adapter_config.json", "adapter_model.safetensors", "README.md"} <= set(hub.model("me/lora").files)


def test_auto_classes_pipeline_and_transformers_load_by_id(adapter, hub):
    """Tokenizer and image processor are the base model's: beside an adapter they would break `AutoPeftModel`."""
    publish(adapter, NAME, license="mit")
    expected = logits_of(SKIP_TUNING, PeftModel.from_pretrained(base_model(), adapter))
    assert torch.equal(logits_of(SKIP_TUNING, AutoPeftModel.from_pretrained(NAME)), expected)
    plain = CLIPModel.from_pretrained(BASE)
    plain.load_adapter(NAME, adapter_name="published")
    assert torch.equal(logits_of(SKIP_TUNING, plain), expected)
    classify = pipeline("zero-shot-image-classification", model=NAME, tokenizer=BASE, image_processor=BASE)
    picture, names = noise_image(20, 20), ["red", "green"]
    scores = {row["label"]: row["score"] for row in classify(picture, names, hypothesis_template="a {}.")}
    predicted = PromptedClassifier.from_pretrained(NAME).predict(picture, class_names=names)
    assert scores == pytest.approx({p.label: p.probability for p in predicted}, rel=1e-4)


def change_weights(folder: Path, change) -> None:
    path = folder / "adapter_model.safetensors"
    save_file({name: change(tensor) for name, tensor in load_file(path).items()}, path)


def change_config(folder: Path, **values) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | values))
