"""The results on a model card: scores of an evaluation beside those of the base model."""

import re
from dataclasses import dataclass
from pathlib import Path

from huggingface_hub import EvalResult

from peft_vlm.evaluation.report import EvalReport
from peft_vlm.evaluation.transfer import TransferReport
from peft_vlm.files import BASELINE_NAME, REPORT_NAME, TRANSFER_NAME, file_inside, last_part
from peft_vlm.serving.escape import code_span, markdown, printable

TITLES = {"accuracy": "accuracy", "base": "base accuracy", "new": "new accuracy", "h": "harmonic mean"}


@dataclass(frozen=True)
class Score:
    """One score in percent.

    Args:
        dataset: Name of the test set.
        split: Part of it; empty where the report names none.
        title: Name of the score, for example "base accuracy".
        value: With the adapter.
        baselines: Score without the adapter, by the name of the baseline; empty where that was not measured.
    """

    dataset: str
    split: str
    title: str
    value: float
    baselines: dict[str, float]


@dataclass(frozen=True)
class Evaluation:
    """An evaluation as a card shows it.

    Args:
        scores: Scores.
        facts: How they were measured, a line of Markdown each.
        shots: Training images per class, where known.
        weights_sha256: The weights that were evaluated; None where the report does not say.
    """

    scores: tuple[Score, ...]
    facts: tuple[str, ...]
    shots: int | None = None
    weights_sha256: str | None = None


def read_evaluation(folder: Path) -> Evaluation | None:
    """The evaluation in an adapter folder, None if there is none.

    Args:
        folder: Holds `report.json` and `zero_shot.json`, or `transfer.json`.
    """
    transfer, report, baseline = (file_inside(folder, name) for name in (TRANSFER_NAME, REPORT_NAME, BASELINE_NAME))
    if transfer is not None:
        return _of_transfer(TransferReport.load(transfer))
    if report is None:
        return None
    return _of_report(EvalReport.load(report), EvalReport.load(baseline) if baseline is not None else None)


def _of_report(report: EvalReport, baseline: EvalReport | None) -> Evaluation:
    same = ("protocol", "dataset", "template")
    alike = baseline is not None and all(getattr(report, name) == getattr(baseline, name) for name in same)
    zero_shot = baseline.scores if baseline is not None and alike else {}
    if set(report.scores) != set(zero_shot):
        zero_shot = {}
    sources, _, split = (
        report.dataset.removesuffix(")").partition(" (") if report.dataset.endswith(")") else (report.dataset, "", "")
    )
    name = ", ".join(last_part(source) for source in sources.split(", "))
    scores = []
    for key, value in report.scores.items():
        dataset, title = (name, TITLES[key]) if key in TITLES else (key, "accuracy")
        alone = {"zero-shot": zero_shot[key]} if zero_shot else {}
        scores.append(Score(dataset, split or "", title, value, alone))
    images = {part: f"{facts['num_images']:,} images" for part, facts in report.parts.items()}
    counted = "; ".join(f"{part}: {text}" if len(images) > 1 else text for part, text in images.items())
    facts = [markdown(f"Protocol: {report.protocol}; {counted}."), f"Class prompts: {_quoted(report.template)}."]
    if report.selected_on_test:
        facts.append("**The checkpoint was chosen on these test images: expect lower scores on new ones.**")
    if not zero_shot:
        facts.append(
            "Not compared with zero-shot: the base model alone was not evaluated on the same images and texts."
        )
    facts += [markdown(report.note)] if report.note else []
    return Evaluation(tuple(scores), tuple(facts), report.shots, report.adapter_sha256)


def _of_transfer(report: TransferReport) -> Evaluation:
    scores = []
    for name, effect in report.effects.items():
        title = f"accuracy of {name} ({'trained on' if name in report.sources else 'unseen'})"
        baselines = {"without adapter": effect.full_size, "shrunken, no prompt": effect.shrunken}
        scores.append(Score(report.task, "", title, effect.prompted, baselines))
    gain = report.mean_gain(over="full_size")
    facts = [] if gain is None else [f"Mean gain on unseen models over no adapter: {gain:+.2f} points."]
    return Evaluation(tuple(scores), tuple(facts + ([markdown(report.note)] if report.note else [])))


def score_table(scores: tuple[Score, ...]) -> str:
    """The scores as a Markdown table; beside a single baseline with the gain over it, in points.

    Args:
        scores: Scores, all with the same baselines.
    """
    baselines = list(scores[0].baselines)
    gain = len(baselines) == 1
    head = ["data", "metric", "this adapter %", *(f"{markdown(name)} %" for name in baselines)]
    head += ["gain"] if gain else []
    rows = [head, ["---"] * len(head)]
    for score in scores:
        data = f"{score.dataset}, {score.split}" if score.split else score.dataset
        values = [score.value, *(score.baselines[name] for name in baselines)]
        gains = [f"{values[0] - values[1]:+.2f}"] if gain else []
        rows.append([markdown(data), markdown(score.title), *(f"{value:.2f}" for value in values), *gains])
    return "\n".join(f"| {' | '.join(row)} |" for row in rows)


def index_entries(scores: tuple[Score, ...], *, task: str) -> list[EvalResult]:
    """The scores in the form of the Hub's `model-index`: those of the adapter only, which the Hub ranks models by.

    Args:
        scores: Scores.
        task: The pipeline tag.
    """
    return [
        EvalResult(
            task_type=task,
            dataset_type=re.sub(r"[^\w.-]+", "-", score.dataset).strip("-") or "images",
            dataset_name=printable(score.dataset),
            dataset_split=printable(score.split) or None,
            metric_type="accuracy",
            metric_name=printable(f"{score.title} %"),
            metric_value=score.value,
        )
        for score in scores
    ]


def _quoted(texts: tuple[str, ...]) -> str:
    return ", ".join(map(code_span, texts[:3])) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")
