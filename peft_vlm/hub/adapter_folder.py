"""An adapter folder as data: configuration, training summary, evaluation, and missing parts."""

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftConfig
from PIL import Image
from safetensors.torch import load_file

from peft_vlm.adapters.adapter_files import AdapterSource
from peft_vlm.adapters.config import VLMConfig, check_adapter_file, config_of, facts_of
from peft_vlm.errors import AdapterError
from peft_vlm.evaluation.report import EvalReport
from peft_vlm.evaluation.transfer import TransferReport
from peft_vlm.files import (
    BASELINE_NAME,
    CONFIG_NAME,
    FACTS_NAME,
    REPORT_NAME,
    SUMMARY_NAME,
    TRANSFER_NAME,
    WEIGHTS_NAME,
    file_inside,
    last_part,
    read_summary,
    weights_sha256,
)
from peft_vlm.registry import AdapterType, adapter_type_of
from peft_vlm.serving.escape import code_span, markdown

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?")

#: Plots that an evaluation writes for each of its parts.
PLOT = re.compile(r"(confusion|reliability)_[A-Za-z0-9][\w.-]{0,80}\.png", re.ASCII)
MAX_PLOTS = 8


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
class _Evaluation:
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


def _read_evaluation(folder: Path) -> _Evaluation | None:
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


def _of_report(report: EvalReport, baseline: EvalReport | None) -> _Evaluation:
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
    return _Evaluation(tuple(scores), tuple(facts), report.shots, report.adapter_sha256)


def _of_transfer(report: TransferReport) -> _Evaluation:
    scores = []
    for name, effect in report.effects.items():
        title = f"accuracy of {name} ({'trained on' if name in report.sources else 'unseen'})"
        baselines = {"without adapter": effect.full_size, "shrunken, no prompt": effect.shrunken}
        scores.append(Score(report.task, "", title, effect.prompted, baselines))
    gain = report.mean_gain(over="full_size")
    facts = [] if gain is None else [f"Mean gain on unseen models over no adapter: {gain:+.2f} points."]
    return _Evaluation(tuple(scores), tuple(facts + ([markdown(report.note)] if report.note else [])))


def _quoted(texts: tuple[str, ...]) -> str:
    return ", ".join(map(code_span, texts[:3])) + (f" and {len(texts) - 3} more" if len(texts) > 3 else "")


@dataclass(frozen=True)
class AdapterFolder:
    """Contents of an adapter folder.

    Args:
        path: The folder.
        config: Configuration, or, where that is of one of PEFT's own types, what is recorded beside it.
        peft_config: Configuration.
        num_parameters: Parameters in the weights file.
        finite: True if all of them are finite.
        prompt_image: The adapter as an image; None where there is nothing to see.
        summary: Training summary; None without one.
        evaluation: Evaluation results of these weights; None without any.
        evaluated_others: True if the folder holds the evaluation of other weights, which says nothing about these.
    """

    path: Path
    config: VLMConfig
    peft_config: PeftConfig
    num_parameters: int
    finite: bool
    prompt_image: Image.Image | None
    summary: dict[str, Any] | None
    evaluation: _Evaluation | None
    evaluated_others: bool = False

    @property
    def plots(self) -> list[str]:
        """Names of the plots of the evaluation, at most eight; none where it is of other weights."""
        if self.evaluation is None or self.evaluated_others:
            return []
        return sorted(path.name for path in self.path.iterdir() if PLOT.fullmatch(path.name))[:MAX_PLOTS]

    @classmethod
    def read(cls, folder: str | Path) -> "AdapterFolder":
        """Read a folder that `VLMTrainer`, `save_pretrained` or a converter wrote.

        Args:
            folder: Local folder.

        Raises:
            AdapterError: If it holds no adapter of this package, or a damaged one.
        """
        path = Path(folder)
        for name in (CONFIG_NAME, WEIGHTS_NAME):
            if not (path / name).is_file():
                raise AdapterError(
                    f"Expected {name!r} in {str(folder)!r}, got none. Pass the folder that `save_pretrained` or the "
                    "trainer wrote; an adapter that is not called `default` is in a subfolder of its name."
                )
        check_adapter_file(path)
        source = AdapterSource.find(path)
        peft_config = config_of(source)
        config = facts_of(source, peft_config)
        if config is not peft_config and not (path / FACTS_NAME).is_file():
            raise AdapterError(
                f"Expected an adapter that peft_vlm has trained in {str(folder)!r}, got one of PEFT's "
                f"{peft_config.peft_type.value!r} without {FACTS_NAME!r}. Publish it with PEFT's own `push_to_hub`."
            )
        tensors = load_file(path / WEIGHTS_NAME)
        evaluation = _read_evaluation(path)
        of_others = evaluation is not None and evaluation.weights_sha256 not in (None, weights_sha256(path))
        return cls(
            path,
            config,
            peft_config,
            sum(tensor.numel() for tensor in tensors.values()),
            all(bool(torch.isfinite(tensor).all()) for tensor in tensors.values()),
            config.prompt_image(tensors),
            read_summary(path),
            None if of_others else evaluation,
            of_others,
        )

    @property
    def method(self) -> str:
        """Name of the adapter type."""
        return self.kind.name

    @property
    def kind(self) -> AdapterType:
        """Facts of the adapter type."""
        return adapter_type_of(self.peft_config)

    def obstacles(self, *, base_model: str | None) -> list[str]:
        """Parts without which nobody could use the adapter, as ends of the sentence "Expected ...".

        Args:
            base_model: Hub id of the base model; None for what the configuration names.
        """
        base, problems = base_model or self.config.base_model_name_or_path, []
        if not self.finite:
            problems.append("finite weights, got NaN or infinity: the training has failed")
        if not base or not HUB_ID.fullmatch(base) or (base_model is None and Path(base).exists()):
            problems.append(f"a base model that others can load, got {base!r}: pass its Hub id as `base_model`")
        return problems

    def gaps(self, *, license: str | None) -> list[str]:
        """Parts that users of a published adapter will miss; the card mentions each.

        Args:
            license: Licence that it is to be published under.
        """
        gaps, evaluate = [], "`peft-vlm evaluate --baseline --adapter FOLDER --output_dir FOLDER ...`"
        if not license:
            gaps.append("a licence, so that nobody may use it: pass `license`, for example 'apache-2.0'")
        if self.summary is None:
            gaps.append(f"{SUMMARY_NAME!r}, the settings of its training, which the trainer writes")
        if self.evaluated_others:
            gaps.append(f"an evaluation, since {REPORT_NAME!r} is about other weights: run {evaluate} again")
        elif self.evaluation is None:
            gaps.append(f"an evaluation ({REPORT_NAME!r} or {TRANSFER_NAME!r}): run {evaluate}")
        elif not self.evaluation.scores[0].baselines:
            gaps.append(f"the scores of the base model alone, to compare with: run {evaluate}")
        return gaps
