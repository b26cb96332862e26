"""Reports survive JSON; summaries follow the papers' arithmetic."""

import json
from pathlib import Path

import pytest
import torch

from peft_vlm.errors import DataError
from peft_vlm.evaluation import EvalReport, EvalResult, ProtocolResult, harmonic_mean, paired_difference, summarize


def result() -> ProtocolResult:
    """Two classes with images and one without."""
    part = EvalResult(
        ("cat", "\u732b", "ox"), torch.tensor([0, 0, 1]), torch.tensor([0, 1, 1]), torch.tensor([0.9, 0.8, 0.7])
    )
    return ProtocolResult("zero-shot", {"accuracy": part.accuracy}, {"all": part})


def test_a_report_survives_json(tmp_path: Path) -> None:
    """A class without images must not write NaN, which is no JSON."""
    facts = {
        "model": "clip",
        "adapter": None,
        "dataset": "icons (test)",
        "template": ("a {}.",),
        "shots": 16,
        "seed": 1,
    }
    report = EvalReport.from_result(result(), **facts, note="n")
    report.save(tmp_path / "report.json")
    assert EvalReport.load(tmp_path / "report.json") == report
    written = json.loads((tmp_path / "report.json").read_text("utf-8"))
    assert written["scores"] == {"accuracy": pytest.approx(200 / 3)}
    part = written["parts"]["all"]
    assert part["per_class_accuracy"] == {"cat": 50.0, "\u732b": 100.0, "ox": None}
    assert (part["num_images"], part["num_classes"], part["mean_class_accuracy"]) == (3, 3, 75.0)
    # Bins (0.6, 0.667..0.733] ..: |1 - 0.7| / 3 + |0 - 0.8| / 3 + |1 - 0.9| / 3
    assert part["expected_calibration_error"] == pytest.approx(0.4, abs=1e-6)
    assert set(written["versions"]) == {"torch", "transformers", "peft"}


def test_other_files_are_no_reports(tmp_path: Path) -> None:
    """A card made from a wrong file would state wrong numbers."""
    (tmp_path / "x.json").write_text('{"template": [], "f1": 3}')
    with pytest.raises(DataError, match="x.json' to be an evaluation report of peft_vlm"):
        EvalReport.load(tmp_path / "x.json")


def test_the_harmonic_mean_is_taken_of_the_averages() -> None:
    """The average of the harmonic means is another number (66.27 here)."""
    runs = [{"base": 80.0, "new": 60.0, "h": 68.571}, {"base": 90.0, "new": 50.0, "h": 64.286}]
    summary = summarize(runs)
    assert summary.mean == {"base": 85.0, "new": 55.0, "h": harmonic_mean(85.0, 55.0)}
    assert summary.mean["h"] == pytest.approx(66.786, abs=1e-3)
    assert summary.std["base"] == pytest.approx(50**0.5)
    assert summary.num_seeds == 2


def test_an_average_over_data_sets_is_that_of_the_papers() -> None:
    """Base and new accuracy of CoCoOp on the 11 data sets and their printed average (arXiv 2203.05557, Table 1): every
    data set counts once, and H is taken of the averages; the average of the H column would be 75.4.
    """
    base = (75.98, 97.96, 95.20, 70.49, 94.87, 90.70, 33.41, 79.74, 77.01, 87.49, 82.33)
    new = (70.43, 93.81, 97.69, 73.59, 71.75, 91.29, 23.71, 76.86, 56.00, 60.04, 73.45)
    rows = [{"base": b, "new": n, "h": harmonic_mean(b, n)} for b, n in zip(base, new, strict=True)]
    mean = summarize(rows).mean
    assert {name: round(value, 2) for name, value in mean.items()} == {"base": 80.47, "new": 71.69, "h": 75.83}


def test_one_seed_has_no_spread() -> None:
    """0 would claim that the result does not vary."""
    assert summarize([{"accuracy": 50.0}]).std == {"accuracy": None}
    assert paired_difference([3.0], [1.0]).standard_error is None


def test_runs_must_hold_the_same_scores() -> None:
    """A missing score would be averaged over fewer seeds."""
    with pytest.raises(DataError, match="same scores"):
        summarize([{"base": 1.0}, {"new": 1.0}])
    with pytest.raises(DataError, match="same scores"):
        summarize([])


def test_paired_differences_by_hand() -> None:
    """Differences 2, 4, 3: mean 3, standard deviation 1, standard error 1 / sqrt(3)."""
    difference = paired_difference([52.0, 74.0, 63.0], [50.0, 70.0, 60.0])
    assert (difference.mean, difference.std, difference.num_seeds) == (3.0, 1.0, 3)
    assert difference.standard_error == pytest.approx(3**-0.5)
    with pytest.raises(DataError, match="same number of seeds.*got 1 and 2"):
        paired_difference([1.0], [1.0, 2.0])
