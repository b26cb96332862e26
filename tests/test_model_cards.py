"""Every adapter of model_cards/ is what its card says: reloaded, measured again, compared with the printed numbers."""

import json
from pathlib import Path

import pytest
from huggingface_hub import ModelCard

from peft_vlm import PromptedClassifier
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.loading import load_image_dataset
from peft_vlm.data.splits import base_and_new_classes
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.evaluation.classify import TextClassifier, classify
from peft_vlm.evaluation.report import EvalReport
from peft_vlm.evaluation.run import load_model
from peft_vlm.files import REPORT_NAME, TRANSFER_NAME, weights_sha256
from peft_vlm.hub import AdapterFolder, write_folder
from peft_vlm.registry import ADAPTERS
from tests.hub.card_rules import card_problems
from tests.source_tree import ROOT

FOLDERS = sorted(path.parent for path in (ROOT / "model_cards").glob("*/adapter_config.json"))
MEASURED = [folder for folder in FOLDERS if (folder / REPORT_NAME).is_file()]
FEW_CLASSES = 6


@pytest.fixture(autouse=True)
def _in_a_clone(monkeypatch: pytest.MonkeyPatch) -> None:
    """The paths in the adapters are those of the repository."""
    monkeypatch.chdir(ROOT)


def name_of(folder: Path) -> str:
    return folder.name


def test_every_adapter_type_has_a_published_adapter() -> None:
    published = {AdapterFolder.read(folder).method for folder in FOLDERS}
    assert len(FOLDERS) >= 6
    assert published == set(ADAPTERS)


@pytest.mark.parametrize("folder", FOLDERS, ids=name_of)
def test_the_card_is_what_the_folder_renders_to(folder: Path, tmp_path: Path) -> None:
    """A number edited by hand, or a report of other weights, would stand out here."""
    text = (folder / "README.md").read_text("utf-8")
    adapter = AdapterFolder.read(folder)
    note = text.split("\n\n")[3]  # after metadata, title and summary
    place = {"repo_id": f"model_cards/{folder.name}", "license": "apache-2.0", "title": folder.name, "note": note}
    write_folder(adapter, tmp_path, **place)
    written = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert len(written) >= 5
    published = {path.name: path.read_bytes() for path in folder.iterdir()}
    for content in (written, published):  # a later release may write further settings with their defaults
        del content["adapter_config.json"]
    assert written == published
    assert card_problems(text) == []
    assert "More Information Needed" not in text
    assert adapter.evaluation.weights_sha256 in (None, weights_sha256(folder))
    assert ModelCard(text).data.eval_results


@pytest.mark.parametrize("folder", MEASURED, ids=name_of)
def test_the_numbers_are_those_of_the_report(folder: Path) -> None:
    text = (folder / "README.md").read_text("utf-8")
    report, baseline = (EvalReport.load(folder / name) for name in (REPORT_NAME, "zero_shot.json"))
    pairs = [(report.scores[key], baseline.scores[key]) for key in report.scores]
    assert [r.metric_value for r in ModelCard(text).data.eval_results] == [value for value, _ in pairs]
    assert all(f"| {value:.2f} | {base:.2f} |" in text for value, base in pairs)


def measured_again(folder: Path, *, classes: int | None) -> None:
    """Accuracy per class as in the report: of the first classes of each part among all of them, or of every class.

    Another number of threads or another processor may turn over an image at the border of two classes: one image per
    class may differ, and a hundredth of all.
    """
    report = EvalReport.load(folder / REPORT_NAME)
    loaded = load_model(report.adapter)
    source, split = report.dataset.removesuffix(")").split(" (")
    dataset = load_image_dataset(source, split=split, transform=EvalTransform(loaded.image_processor))
    logits = TextClassifier(loaded.model, loaded.tokenizer, template=report.template).logits_for
    halves = dict(zip(("base", "new"), base_and_new_classes(len(dataset.class_names)), strict=True))
    for part, facts in report.parts.items():
        images: ImageClassificationDataset = dataset.restrict(halves[part]) if part in halves else dataset
        names = images.class_names
        expected = facts["per_class_accuracy"]
        few = [i for i, label in enumerate(images.labels) if classes is None or label < classes]
        result = classify(logits(names), images.select(few))
        counts = [images.labels.count(label) for label in range(classes or len(names))]
        off = [abs(result.per_class[n] - expected[n]) * c / 100 for n, c in zip(names, counts, strict=False)]
        assert len(off) == len(counts)
        assert max(off) < 1.5
        assert sum(off) <= max(0.01 * sum(counts), 0.5)


@pytest.mark.parametrize("folder", MEASURED, ids=name_of)
def test_the_adapter_repeats_the_accuracy_of_its_first_classes(folder: Path) -> None:
    """Images of the first classes of each part, told apart from all classes of the part."""
    measured_again(folder, classes=FEW_CLASSES)


@pytest.mark.slow
@pytest.mark.parametrize("folder", MEASURED, ids=name_of)
def test_the_adapter_repeats_every_accuracy(folder: Path) -> None:
    measured_again(folder, classes=None)


@pytest.mark.parametrize("folder", MEASURED, ids=name_of)
def test_the_code_of_the_card_runs(folder: Path, tmp_path: Path) -> None:
    code = (folder / "README.md").read_text("utf-8").partition("```python\n")[2].partition("```")[0]
    photo = tmp_path / "photo.png"
    load_image_dataset("examples/assets/icons", split="test").image(0).save(photo)
    names: dict[str, object] = {}
    exec(code.replace("photo.png", str(photo)), names)  # noqa: S102 - the card's own code
    assert isinstance(names["classifier"], PromptedClassifier)


def test_measured_or_compared_on_several_models() -> None:
    """Each has figures with a baseline: of its test set, or per multimodal model."""
    assert len(FOLDERS) >= 6
    for folder in FOLDERS:
        assert folder in MEASURED or json.loads((folder / TRANSFER_NAME).read_text())["effects"]
