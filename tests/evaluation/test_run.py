"""An evaluation with plain arguments, from folders to a report with plots."""

import csv
from pathlib import Path
from typing import Any

import pytest
from datasets import ClassLabel, DatasetDict, Features, Value
from datasets import Dataset as HFDataset
from datasets import Image as ImageFeature
from peft import get_peft_model
from transformers import HfArgumentParser

from peft_vlm.errors import ClassNameError, DataError
from peft_vlm.evaluation import EvalReport
from peft_vlm.evaluation.run import EvaluationArguments, run_evaluation
from tests.cases import skip_tuning_config
from tests.tiny import clip_processor, colour_names, colour_rows, tiny_clip, tiny_tokenizer


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with tokenizer and image processor."""
    folder = tmp_path_factory.mktemp("model") / "clip"
    tiny_clip().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    clip_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def dataset(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four colours in two domains, saved to disk."""
    rows = colour_rows(4, classes=4)
    columns = {key: [row[key] for row in rows] for key in ("image", "label")}
    columns["domain"] = [("flat", "3d")[index % 2] for index in range(len(rows))]
    label = ClassLabel(names=list(colour_names(4)))
    features = Features({"image": ImageFeature(), "label": label, "domain": Value("string")})
    folder = tmp_path_factory.mktemp("data") / "colours"
    DatasetDict({"test": HFDataset.from_dict(columns, features=features)}).save_to_disk(folder)
    return folder


def run(protocol: str, dataset: Path, model: Path, output: Path, **options: Any) -> EvalReport:
    """One evaluation."""
    return run_evaluation(
        EvaluationArguments(
            protocol=protocol, dataset=[str(dataset)], model=str(model), output_dir=str(output), **options
        )
    )


def test_base_to_new_writes_report_plots_and_predictions(dataset: Path, model: Path, tmp_path: Path) -> None:
    """Everything a reader of the result needs, in one folder."""
    options: dict[str, Any] = {"template": ["a {}.", "the {}."], "shots": 16, "seed": 2, "note": "test"}
    report = run("base-to-new", dataset, model, tmp_path / "out", save_predictions=True, **options)
    assert EvalReport.load(tmp_path / "out" / "report.json") == report
    assert set(report.scores) == {"base", "new", "h"}
    assert report.template == ("a {}.", "the {}.")
    assert (report.shots, report.seed, report.note, report.adapter) == (16, 2, "test", None)
    assert report.dataset == f"{dataset} (test)"
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    plots = [f"{kind}_{part}.png" for kind in ("confusion", "reliability") for part in ("base", "new")]
    assert written == sorted([*plots, "predictions.csv", "report.json", "scores.png"])
    with (tmp_path / "out" / "predictions.csv").open(newline="") as file:
        rows = list(csv.DictReader(file))
    assert len(rows) == 16
    base = [row for row in rows if row["part"] == "base"]
    accuracy = 100 * sum(row["label"] == row["predicted"] for row in base) / len(base)
    assert accuracy == pytest.approx(report.scores["base"])


def test_domains_come_from_a_column(dataset: Path, model: Path, tmp_path: Path) -> None:
    """One evaluation per value."""
    report = run("domain-shift", dataset, model, tmp_path, domain_column="domain", source_domain="flat", plots=False)
    assert list(report.scores) == ["3d", "flat", "average"]
    assert report.scores["average"] == report.scores["3d"]
    assert [part["num_images"] for part in report.parts.values()] == [8, 8]
    assert sorted(path.name for path in tmp_path.iterdir()) == ["report.json"]
    assert report.template == ("a photo of a {}.",)


def test_domains_may_be_parts_of_one_dataset(tmp_path: Path, model: Path) -> None:
    """Styles of one drawing set are often stored as splits."""
    for index, split in enumerate(("test", "test_3d")):
        rows = colour_rows(2, classes=2, seed=index)
        columns = {key: [row[key] for row in rows] for key in ("image", "label")}
        features = Features({"image": ImageFeature(), "label": ClassLabel(names=list(colour_names(2)))})
        HFDataset.from_dict(columns, features=features).to_parquet(tmp_path / f"{split}.parquet")
    report = run("domain-shift", tmp_path, model, tmp_path / "out", split=["test", "test_3d"], source_domain="test")
    assert list(report.scores) == ["test", "test_3d", "average"]
    assert report.dataset == f"{tmp_path} (test, test_3d)"


def test_the_arguments_can_be_parsed_from_flags(dataset: Path, model: Path, tmp_path: Path) -> None:
    """The command line is this dataclass."""
    flags = ["--protocol", "zero-shot", "--dataset", str(dataset), "--model", str(model)]
    (arguments,) = HfArgumentParser(EvaluationArguments).parse_args_into_dataclasses(
        [*flags, "--output_dir", str(tmp_path), "--no_plots"]
    )
    assert set(run_evaluation(arguments).scores) == {"accuracy"}


def test_an_unknown_protocol_is_named_with_the_known_ones(model: Path, tmp_path: Path) -> None:
    """Otherwise a typing error would evaluate something else, or fail in a look-up."""
    arguments = EvaluationArguments("zeroshot", dataset=["x"], model=str(model), output_dir=str(tmp_path))
    with pytest.raises(ValueError, match=r"one of \('zero-shot', .*got 'zeroshot'"):
        run_evaluation(arguments)


@pytest.mark.parametrize(
    ("protocol", "options", "message"),
    [
        ("zero-shot", {"dataset": ["a", "b"]}, "takes one dataset, got"),
        ("zero-shot", {"source_domain": "flat"}, "`source_domain` belongs to the protocol 'domain-shift'"),
        ("zero-shot", {"split": ["test", "val"]}, "Expected one `split`, got"),
        ("zero-shot", {"domain_column": "domain"}, "`domain_column` parts one dataset"),
        ("cross-dataset", {"dataset": ["a/test", "b/test"]}, "There is no 'a/test'|could not be loaded"),
    ],
)
def test_arguments_that_do_not_fit_are_explained(
    protocol: str, options: dict[str, Any], message: str, model: Path, tmp_path: Path
) -> None:
    """Before anything is loaded, where that is possible."""
    settings = {"dataset": ["x"], "model": str(model), "output_dir": str(tmp_path), **options}
    with pytest.raises(DataError, match=message):
        run_evaluation(EvaluationArguments(protocol=protocol, **settings))


def colours(folder: Path, names: list[str], images: dict[str, int]) -> Path:
    """A test split with some of the classes, as names."""
    rows = colour_rows(1, classes=4)
    chosen = [name for name in names for _ in range(images.get(name, 0))]
    columns = {"image": [rows[names.index(name)]["image"] for name in chosen], "label": chosen}
    features = Features({"image": ImageFeature(), "label": Value("string")})
    folder.mkdir()
    HFDataset.from_dict(columns, features=features).to_parquet(folder / "test.parquet")
    return folder


def saved_adapter(folder: Path, model: Path, names: list[str]) -> Path:
    """An adapter that records some classes."""
    adapter = get_peft_model(tiny_clip().from_pretrained(model), skip_tuning_config())
    adapter.active_peft_config.class_names = names
    adapter.save_pretrained(folder)
    return folder


def test_classes_are_those_that_the_adapter_was_trained_on(model: Path, tmp_path: Path) -> None:
    """A test split without one class was scored over the other seven, and their first half was called base."""
    adapter = saved_adapter(tmp_path / "adapter", model, ["red", "ant", "owl", "bee"])
    names = ["ant", "bee", "owl", "red"]
    data = colours(tmp_path / "three", names, {"bee": 2, "owl": 1, "red": 1})
    options: dict[str, Any] = {"adapter": str(adapter), "plots": False, "save_predictions": True}
    report = run("few-shot", data, model, tmp_path / "few", **options)
    assert list(report.parts["all"]["per_class_accuracy"]) == ["red", "ant", "owl", "bee"]
    with (tmp_path / "few" / "predictions.csv").open(newline="") as file:
        assert [row["label"] for row in csv.DictReader(file)] == ["bee", "bee", "owl", "red"]
    half = saved_adapter(tmp_path / "half", model, ["ant", "bee"])
    report = run("base-to-new", data, model, tmp_path / "new", **options | {"adapter": str(half)})
    assert {part: list(values["per_class_accuracy"]) for part, values in report.parts.items()} == {
        "base": ["ant", "bee"],
        "new": ["owl", "red"],
    }
    assert {part: values["num_images"] for part, values in report.parts.items()} == {"base": 2, "new": 2}


def test_images_of_other_classes_than_the_adapter_are_refused(model: Path, tmp_path: Path) -> None:
    """They would be scored as if it had been trained on them."""
    adapter = saved_adapter(tmp_path / "adapter", model, ["ant", "bee"])
    data = colours(tmp_path / "data", ["ant", "bee", "owl", "red"], {"bee": 1, "owl": 1})
    with pytest.raises(
        ClassNameError, match="the 2 classes that the adapter was trained on, got 1 other classes.*'owl'"
    ):
        run("few-shot", data, model, tmp_path / "out", adapter=str(adapter), plots=False)
    others = colours(tmp_path / "others", ["ant", "bee", "owl", "red"], {"red": 1, "owl": 1})
    with pytest.raises(ClassNameError, match="got 2 other classes"):
        run("base-to-new", others, model, tmp_path / "out", adapter=str(adapter), plots=False)
    assert run("zero-shot", data, model, tmp_path / "out", adapter=str(adapter), plots=False).scores
