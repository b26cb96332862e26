"""One prompt on many models: scores per model, mean gain on unseen models, as JSON, tables and plots."""

import io
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib.metadata import version
from pathlib import Path
from typing import Any

from PIL import Image
from torch import nn

from peft_vlm.adapters.pixel_prompt import active_name, draw_prompt, prompt_layer_of, prompt_of
from peft_vlm.errors import AdapterError, DataError, check_choice
from peft_vlm.evaluation.mllm import PromptEffect
from peft_vlm.evaluation.plots import bars_png
from peft_vlm.evaluation.report import checked_fields, summarize
from peft_vlm.files import read_json, write_bytes, write_json
from peft_vlm.serving.escape import markdown

#: Conditions of `PromptEffect` as tables and plots name them.
CONDITIONS = {"full_size": "full size", "shrunken": "shrunken, no prompt", "prompted": "prompted"}


@dataclass(frozen=True)
class TransferReport:
    """One trained prompt on several models, with everything needed to understand the scores; written as JSON.

    Args:
        task: Data and question, for example "emoji, pixel art, 40 classes".
        sources: Models the prompt was trained on.
        effects: Figures in percent per model, sources and unseen ones.
        seed: Seed of the training.
        settings: Objective and run, as JSON values.
        note: Remark for readers.
        versions: Versions of the packages involved.

    Raises:
        DataError: If a source has no figures.
    """

    task: str
    sources: tuple[str, ...]
    effects: dict[str, PromptEffect]
    seed: int | None = None
    settings: dict[str, Any] = field(default_factory=dict)
    note: str = ""
    versions: dict[str, str] = field(
        default_factory=lambda: {n: version(n) for n in ("torch", "transformers", "peft")}
    )

    def __post_init__(self) -> None:
        missing = [name for name in self.sources if name not in self.effects]
        if missing or not self.sources:
            raise DataError(
                f"Expected figures of every source model, got {sorted(self.effects)!r} without {missing!r}."
            )

    @property
    def unseen(self) -> tuple[str, ...]:
        """Models the prompt was not trained on."""
        return tuple(name for name in self.effects if name not in self.sources)

    def mean_gain(self, *, over: str = "shrunken") -> float | None:
        """Mean gain of the prompt on unseen models, in percentage points; None without unseen models.

        Args:
            over: `"shrunken"` or `"full_size"`, the condition it is compared with.

        Raises:
            ValueError: If there is no such condition.
        """
        check_choice("over", over, ("shrunken", "full_size"))
        gains = [asdict(self.effects[name]) for name in self.unseen]
        return statistics.fmean(one["prompted"] - one[over] for one in gains) if gains else None

    def scores(self) -> dict[str, float]:
        """All scores by name: `"<model>/<condition>"` and the mean gains on unseen models."""
        flat = {f"{name}/{key}": v for name, effect in self.effects.items() for key, v in asdict(effect).items()}
        gains = {f"unseen_gain_over_{over}": self.mean_gain(over=over) for over in ("shrunken", "full_size")}
        return flat | {name: gain for name, gain in gains.items() if gain is not None}

    def save(self, path: str | Path) -> None:
        """Write the report as JSON, with the mean gains.

        Args:
            path: File to write; its folder must exist.
        """
        gains = {over: self.mean_gain(over=over) for over in ("shrunken", "full_size")}
        write_json(Path(path), asdict(self) | {"mean_gain_on_unseen": gains}, allow_nan=False)

    @classmethod
    def load(cls, path: str | Path) -> "TransferReport":
        """Read a report.

        Args:
            path: File that `save` wrote.

        Raises:
            DataError: If the file holds something else.
        """
        try:
            values = read_json(Path(path))
            values.pop("mean_gain_on_unseen")
            effects = {n: PromptEffect(**checked_fields(PromptEffect, e)) for n, e in values.pop("effects").items()}
            values = checked_fields(cls, values)
            return cls(**{**values, "effects": effects, "sources": tuple(values["sources"])})
        except (TypeError, KeyError, AttributeError, AdapterError) as error:
            raise DataError(f"Expected {str(path)!r} to be a transfer report of peft_vlm; {error}.") from error

    def table(self) -> str:
        """The scores as a Markdown table."""
        return transfer_table([self])


def transfer_table(reports: Sequence[TransferReport]) -> str:
    """Means over seeds, with their spread, as a Markdown table: one row per model and one for the unseen ones.

    Args:
        reports: Runs of several seeds with the same models and sources.

    Raises:
        DataError: If the models differ.
    """
    first = _checked(reports)
    summary = summarize([report.scores() for report in reports])

    def cell(name: str) -> str:
        spread = summary.std[name]
        return f"{summary.mean[name]:.1f}" + ("" if spread is None else f" +- {spread:.1f}")

    def gain(values: Sequence[float]) -> str:
        spread = f" +- {statistics.stdev(values):.1f}" if len(values) > 1 else ""
        return f"{statistics.fmean(values):+.1f}{spread}"

    rows = ["| model | " + " | ".join(CONDITIONS.values()) + " | gain | gain over full size |", "|---" * 6 + "|"]
    for name in first.effects:
        cells = [cell(f"{name}/{key}") for key in CONDITIONS]
        effects = [report.effects[name] for report in reports]
        gains = [gain([e.gain for e in effects]), gain([e.gain_over_full_size for e in effects])]
        role = "source" if name in first.sources else "unseen"
        rows.append(f"| {markdown(name)} ({role}) | " + " | ".join(cells + gains) + " |")
    if first.unseen:
        gains = [gain(_column(reports, f"unseen_gain_over_{over}")) for over in ("shrunken", "full_size")]
        rows.append(f"| mean of {len(first.unseen)} unseen | | | | " + " | ".join(gains) + " |")
    seeds = "1 seed" if len(reports) == 1 else f"{len(reports)} seeds, mean +- standard deviation"
    return "\n".join([*rows, "", f"{markdown(first.task)}; {seeds}; percent."])


def comparison_table(variants: Mapping[str, Sequence[TransferReport]]) -> str:
    """Gains of several ways to train, as a Markdown table: source models, unseen models, and seeds that gained.

    Args:
        variants: Runs of several seeds per variant, for example with and without a loss term.

    Raises:
        DataError: If a variant has no run, or no unseen model.
    """
    rows = ["| variant | gain on source | gain on unseen | worst seed on unseen | seeds |", "|---" * 5 + "|"]
    for name, reports in variants.items():
        first = _checked(reports)
        if not first.unseen:
            raise DataError(f"Expected unseen models in the runs of {name!r}, got sources only.")
        source = [statistics.fmean(r.effects[model].gain for model in r.sources) for r in reports]
        unseen = _column(reports, "unseen_gain_over_shrunken")
        means = f"{statistics.fmean(source):+.1f} | {statistics.fmean(unseen):+.1f} | {min(unseen):+.1f}"
        rows.append(f"| {markdown(name)} | {means} | {len(reports)} |")
    return "\n".join(rows)


def transfer_png(reports: Sequence[TransferReport], path: str | Path, *, title: str = "") -> None:
    """Draw the three conditions of every model as bars, means over seeds with their spread.

    Args:
        reports: Runs of several seeds with the same models and sources.
        path: PNG file to write.
        title: Text above.
    """
    first = _checked(reports)
    summary = summarize([report.scores() for report in reports])
    labels = {name: f"{name}\n({'source' if name in first.sources else 'unseen'})" for name in first.effects}
    values, spread = (
        {text: {labels[n]: column[f"{n}/{key}"] for n in first.effects} for key, text in CONDITIONS.items()}
        for column in (summary.mean, summary.std)
    )
    bars_png(values, path, spread=spread, title=title or first.task)


def prompt_png(model: nn.Module, path: str | Path, *, side: int = 448, limit: float | None = None) -> Image.Image:
    """Write the active prompt as an image, enlarged without smoothing.

    Args:
        model: `PeftModel` with a pixel prompt.
        path: PNG file to write.
        side: Minimum rows and columns of the image; it becomes an integer multiple of the canvas.
        limit: Value shown as full brightness, as in `draw_prompt`.

    Returns:
        The image.
    """
    layer = prompt_layer_of(model)
    image = draw_prompt(prompt_of(model), layer.settings[active_name(layer)].mask(), limit=limit, side=side)
    content = io.BytesIO()
    image.save(content, "PNG")
    write_bytes(Path(path), content.getvalue())
    return image


def effect_curves(effects: Mapping[int, PromptEffect]) -> dict[str, dict[float, float]]:
    """One curve per condition, for `lines_png`.

    Args:
        effects: Effect per corruption level or training-set size.
    """
    return {text: {float(x): asdict(effect)[key] for x, effect in effects.items()} for key, text in CONDITIONS.items()}


def _checked(reports: Sequence[TransferReport]) -> TransferReport:
    if not reports or any(
        (r.sources, set(r.effects)) != (reports[0].sources, set(reports[0].effects)) for r in reports
    ):
        got = [(report.sources, sorted(report.effects)) for report in reports]
        raise DataError(f"Expected runs with the same sources and models, at least one, got {got!r}.")
    return reports[0]


def _column(reports: Sequence[TransferReport], name: str) -> list[float]:
    return [report.scores()[name] for report in reports]
