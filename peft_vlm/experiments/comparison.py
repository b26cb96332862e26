"""The table of a reproduction: our results beside the paper's, with a verdict by our own spread."""

import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from peft_vlm.evaluation.metrics import harmonic_mean
from peft_vlm.evaluation.plots import bars_png, has_matplotlib
from peft_vlm.experiments.recipes import TEACHER, Grid
from peft_vlm.files import write_bytes, write_json
from peft_vlm.serving.escape import markdown

TABLE_NAME = "table.json"
#: Smallest half-width of "within": papers print one or two decimals.
ROUNDING = 0.05
#: Rows that a plot has room for; of more only the averages are drawn.
MOST_BARS = 24
NAMES = {"base": "base", "new": "new", "h": "H", "accuracy": "accuracy", "prompted": "prompted"}

RULE = (
    "Ours: mean +- standard deviation over seeds, percent. Verdict: `within` if the difference to the paper is at "
    "most twice our standard deviation, else `above` or `below`; it needs two seeds or more, and all of the grid's. "
    "The paper's own spread is not known. `not recorded`: the recipe holds no number of this row."
)
STAND_IN_NOTE = (
    "**Stand-in**: bundled models and data, few shots and steps. The paper has no number for them, so there is "
    "nothing to compare with, and no verdict."
)


@dataclass(frozen=True)
class Line:
    """One score of one row.

    Args:
        row: Data set, or an average.
        column: Score.
        values: Percent by seed.
        mean: Mean over the seeds; for H the harmonic mean of the mean base and the mean new accuracy.
        paper: The paper's number; None where it is not published.
        wanted: Number of seeds of the grid.
    """

    row: str
    column: str
    values: dict[int, float]
    mean: float | None
    paper: float | None
    wanted: int

    @property
    def std(self) -> float | None:
        """Sample standard deviation over the seeds; None with fewer than two."""
        return statistics.stdev(self.values.values()) if len(self.values) > 1 else None

    @property
    def difference(self) -> float | None:
        """Ours minus the paper's, in percentage points."""
        return None if self.mean is None or self.paper is None else self.mean - self.paper

    @property
    def verdict(self) -> str:
        """`within`, `above`, `below` or `not run`; `-` where there is nothing to judge by."""
        if self.mean is None:
            return "not run"
        if self.difference is None or self.std is None or len(self.values) < self.wanted:
            return "-"
        if abs(self.difference) <= max(2 * self.std, ROUNDING):
            return "within"
        return "above" if self.difference > 0 else "below"


def lines_of(grid: Grid, cells: Mapping[str, Mapping[str, Any]]) -> list[Line]:
    """All lines of a grid's table.

    Args:
        grid: The grid.
        cells: Scores of its finished cells, `{row: {column: percent}}`, by name.
    """
    values: dict[tuple[str, str], dict[int, float]] = {}
    wanted: dict[str, set[int]] = {}
    for cell in grid.cells:
        for row in (*cell.targets, cell.row):
            wanted.setdefault(row, set()).add(cell.seed)
        for row, scores in cells.get(cell.name, {}).items():
            for column, score in scores.items():
                values.setdefault((row, column), {})[cell.seed] = score
    for name, rows in grid.averages.items():
        wanted[name] = set().union(*(wanted.get(row, set()) for row in rows))
        for column in grid.columns:
            parts = [values.get((row, column), {}) for row in rows]
            for seed in sorted(wanted[name]) if all(parts) else ():
                if all(seed in part for part in parts):
                    values.setdefault((name, column), {})[seed] = statistics.fmean(part[seed] for part in parts)
        _set_harmonic(values, name)
    order = [row for row in grid.rows if not row.startswith(TEACHER)]
    order += [*grid.averages, *(row for row in grid.rows if row.startswith(TEACHER))]
    return [
        Line(row, column, found, _mean(values, row, column), paper, len(wanted.get(row, ())))
        for row in order
        for column in grid.columns
        for found, paper in [(values.get((row, column), {}), grid.published.get(row, {}).get(column))]
    ]


def _set_harmonic(values: dict[tuple[str, str], dict[int, float]], row: str) -> None:
    """H of an average comes from the averaged accuracies, seed by seed, as in the papers."""
    base, new = values.get((row, "base"), {}), values.get((row, "new"), {})
    if base:
        values[row, "h"] = {seed: harmonic_mean(base[seed], new[seed]) for seed in base if seed in new}


def _mean(values: Mapping[tuple[str, str], dict[int, float]], row: str, column: str) -> float | None:
    """Mean over seeds; H is that of the mean accuracies."""
    found = values.get((row, column))
    if not found:
        return None
    if column == "h":
        return harmonic_mean(*(statistics.fmean(values[row, part].values()) for part in ("base", "new")))
    return statistics.fmean(found.values())


def write_table(
    folder: Path, grid: Grid, lines: Sequence[Line], *, notes: Sequence[str], failed: Mapping[str, str], missing: int
) -> str:
    """Write `table.json`, `table.md` and, with matplotlib, `table.png`.

    Args:
        folder: Output folder.
        grid: The grid.
        lines: Its lines.
        notes: Whole sentences for readers.
        failed: Errors by name of the cell.
        missing: Number of cells that are not finished.

    Returns:
        The table as Markdown.
    """
    rows = [
        {
            "row": line.row,
            "column": line.column,
            "ours": None
            if line.mean is None
            else {"mean": line.mean, "std": line.std, "values": {str(seed): v for seed, v in line.values.items()}},
            "paper": line.paper,
            "difference": line.difference,
            "verdict": line.verdict,
        }
        for line in lines
    ]
    head = {"method": grid.method, "protocol": grid.protocol, "stand_in": grid.stand_in, "citation": grid.citation}
    table = _markdown(grid, lines, notes=notes, failed=failed, missing=missing)
    write_bytes(folder / "table.md", table.encode(errors="backslashreplace"))
    series = _series(grid, lines)
    if has_matplotlib() and series["ours"]:
        drawn = {name: values for name, values in series.items() if values and name != "spread"}
        title = f"{grid.method}, {grid.protocol}" + (" (stand-in)" if grid.stand_in else "")
        label = "H of base and new (%)" if grid.protocol == "base_to_new" else "accuracy (%)"
        bars_png(drawn, folder / "table.png", spread={"ours": series["spread"]}, title=title, label=label)
    write_json(folder / TABLE_NAME, {**head, "notes": list(notes), "failed": dict(failed), "rows": rows})
    return table


def _markdown(
    grid: Grid, lines: Sequence[Line], *, notes: Sequence[str], failed: Mapping[str, str], missing: int
) -> str:
    """The table with its remarks."""
    done = len(grid.cells) - missing
    text = [f"# {markdown(grid.method)}, {markdown(grid.protocol)}: {done} of {len(grid.cells)} runs", ""]
    text += [f"Paper: {markdown(grid.citation)}.", ""] if grid.citation else []
    text += [f"{note}\n" for note in notes]
    text += ["| data set | score | ours | paper | difference | verdict |", "|---" * 6 + "|"]
    for line in lines:
        ours = "" if line.mean is None else f"{line.mean:.2f}" + ("" if line.std is None else f" +- {line.std:.2f}")
        if line.mean is not None and len(line.values) < line.wanted:
            ours += f" ({len(line.values)} of {line.wanted} seeds)"
        paper = grid.missing if line.paper is None else f"{line.paper:.2f}"
        paper = "nothing to compare" if grid.stand_in else paper
        difference = "" if line.difference is None else f"{line.difference:+.2f}"
        column = NAMES.get(line.column, line.column.replace("_", " "))
        text.append(f"| {markdown(line.row)} | {column} | {ours} | {paper} | {difference} | {line.verdict} |")
    text += ["", RULE]
    if failed:
        text += ["", "Failed runs:", ""]
        text += [f"- {markdown(name)}: {markdown(error)}" for name, error in failed.items()]
    return "\n".join(text) + "\n"


def _series(grid: Grid, lines: Sequence[Line]) -> dict[str, dict[str, Any]]:
    """Bars of the headline score: H, accuracy, or that of the prompted model."""
    headline = [line for line in lines if line.column == grid.columns[-1] and line.mean is not None]
    headline = [line for line in headline if not line.row.startswith(TEACHER)]
    if len(headline) > MOST_BARS:
        headline = [line for line in headline if line.row in grid.averages] or headline[:MOST_BARS]
    names = {line.row: line.row.replace("_", "\n").replace(", ", "\n") for line in headline}
    return {
        "ours": {names[line.row]: line.mean for line in headline},
        "paper": {names[line.row]: line.paper for line in headline if line.paper is not None},
        "spread": {names[line.row]: line.std for line in headline},
    }
