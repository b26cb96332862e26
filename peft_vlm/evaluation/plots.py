"""Plots: bars, curves, confusion matrices. matplotlib is imported on use and comes with the extra `plots`."""

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Bool, Float, Int
from torch import Tensor

from peft_vlm.evaluation.metrics import expected_calibration_error
from peft_vlm.files import write_bytes

#: Told apart by colour-blind readers and, by their lightness, in print (Okabe and Ito, 2008; black last).
COLOURS = ("#0072B2", "#E69F00", "#009E73", "#CC79A7", "#56B4E9", "#D55E00", "#F0E442", "#000000")


def has_matplotlib() -> bool:
    """True if matplotlib is installed."""
    return find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Refuse to go further without matplotlib, before any work is done.

    Raises:
        ImportError: If it is not installed.
    """
    if not has_matplotlib():
        raise ImportError("Plots need matplotlib. Install it with: pip install matplotlib")


def new_figure(width: float | int, height: float | int) -> Any:
    """An empty figure outside of pyplot's global state; `save_figure` writes it.

    Args:
        width: Inches, of 120 pixels.
        height: Inches.
    """
    require_matplotlib()
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    class Styled(Figure):
        """One look for all plots of the package, whatever the user's own settings of matplotlib are."""

        def add_subplot(self, *args: Any, **kwargs: Any) -> Any:
            axes = super().add_subplot(*args, **kwargs)
            axes.set_prop_cycle(color=COLOURS)
            axes.spines[["top", "right"]].set_visible(False)
            axes.grid(alpha=0.25, linewidth=0.6)
            axes.set_axisbelow(True)
            return axes

    figure = Styled(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


def set_log_scale(axis: Any) -> None:
    """Make an axis logarithmic, with plain numbers at 1, 2 and 5 times the powers of ten.

    Args:
        axis: `axes.xaxis` or `axes.yaxis`.
    """
    from matplotlib.ticker import LogLocator, NullLocator

    (axis.axes.set_yscale if axis.axis_name == "y" else axis.axes.set_xscale)("log")
    axis.set_major_locator(LogLocator(subs=(1.0, 2.0, 5.0)))
    axis.set_minor_locator(NullLocator())
    axis.set_major_formatter(lambda value, _: f"{value:,g}")


def save_figure(figure: Any, path: str | Path) -> None:
    """Write a figure as PNG, its texts in fonts of the system that have their letters.

    Class names come in any script, and matplotlib's own font has no Chinese, Japanese or Korean letters. Letters that
    no font has are drawn as boxes, without a warning for each.

    Args:
        figure: From `new_figure`.
        path: PNG file to write.
    """
    from matplotlib.text import Text

    texts = figure.findobj(Text)
    for text in texts:
        text.set_parse_math(False)  # names with two dollar signs are no formulas
    families = font_families("".join(text.get_text() for text in texts))
    if len(families) > 1:
        for text in texts:
            text.set_fontfamily(families)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", r"Glyph \d+ .* missing from", UserWarning)
        content = io.BytesIO()
        # `savefig` would draw everything a second time, without a result, for the sake of the layout.
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine("none")
        figure.canvas.print_png(content)
    write_bytes(Path(path), content.getvalue())


def font_families(text: str) -> list[str]:
    """Fonts that have the letters of a text: matplotlib's own, and of the system as few as are needed.

    Args:
        text: Any text. Letters that no font has are left out of account.
    """
    from matplotlib.font_manager import fontManager

    families = ["DejaVu Sans"]
    missing = {ord(letter) for letter in text if letter.isprintable()} - _letters(fontManager.findfont(families[0]))
    for font in sorted(fontManager.ttflist, key=lambda font: (font.style != "normal", font.weight != 400, font.name)):
        if not missing:
            break
        try:
            covered = missing & _letters(font.fname)
        except (OSError, RuntimeError):  # removed since matplotlib listed it, or damaged
            continue
        if covered:
            families.append(font.name)
            missing -= covered
    return families


def _letters(font: str) -> set[int]:
    """Code points that a font file has."""
    from matplotlib.ft2font import FT2Font

    return set(FT2Font(font).get_charmap())


#: Up to this many classes the cells have counts; up to `MAX_NAMED_CLASSES` rows and columns have names. Beyond, the
#: most frequent confusions stand beside the matrix, since nobody reads a hundred names at its edge.
MAX_COUNTED_CLASSES = 12
MAX_NAMED_CLASSES = 40
TOP_CONFUSIONS = 20
#: Letters of a class name that are drawn: the figure is as wide as the longest.
MAX_NAME = 80


def _set_title(axes: Any, title: str) -> None:
    inches = axes.figure.get_size_inches()[0]
    axes.set_title(textwrap.fill(title, width=int(9 * inches)), parse_math=False)


def confusion_matrix_png(
    confusion: Int[Tensor, "classes classes"], class_names: Sequence[str], path: str | Path, *, title: str = ""
) -> None:
    """Draw a confusion matrix, rows as shares of the true class; of many classes also the most frequent confusions.

    Args:
        confusion: Images per true class (row) and predicted class (column).
        class_names: Names of rows and columns.
        path: PNG file to write.
        title: Text above.
    """
    counts, number = confusion.numpy(), len(class_names)
    class_names = [name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..." for name in class_names]
    is_named = number <= MAX_NAMED_CLASSES
    cells = max(3.0, (0.4 if number <= MAX_COUNTED_CLASSES else 0.17) * number) if is_named else 7.0
    longest = max(len(name) for name in class_names)
    names = 0.085 * longest if is_named else 0.3
    figure = new_figure(cells + names + 1.6 + (0 if is_named else 4 + 0.14 * longest), cells + names + 0.8)
    if is_named:
        axes = figure.add_subplot()
        _draw_matrix(axes, counts)
        axes.set_xticks(range(number), class_names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(number), class_names, fontsize=8, parse_math=False)
    else:
        axes, beside = figure.subplots(1, 2, width_ratios=[cells, 4])
        _draw_matrix(axes, counts)
        _draw_top_confusions(beside, counts, class_names)
    _set_title(axes, title)
    save_figure(figure, path)


def _draw_matrix(axes: Any, counts: Int[np.ndarray, "classes classes"]) -> None:
    """Shares as shades; counts where there is room for them."""
    from matplotlib.colors import PowerNorm

    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    # Under a square root a rare confusion is still visible beside the diagonal.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    axes.figure.colorbar(
        image, ax=axes, label="share of the true class (%)", shrink=0.8, ticks=[0, 5, 20, 40, 60, 80, 100]
    )
    if len(counts) <= MAX_COUNTED_CLASSES:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 35 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=8, color=colour)
    axes.grid(visible=False)
    axes.set(xlabel="predicted class", ylabel="true class")


def _draw_top_confusions(axes: Any, counts: Int[np.ndarray, "classes classes"], class_names: Sequence[str]) -> None:
    """The most frequent wrong answers, with their numbers of images."""
    wrong = counts - np.diag(np.diag(counts))
    order = np.argsort(-wrong, axis=None, kind="stable")[:TOP_CONFUSIONS]
    pairs = [
        (row, column) for row, column in zip(*np.unravel_index(order, wrong.shape), strict=True) if wrong[row, column]
    ]
    labels = [f"{class_names[row]} as {class_names[column]}" for row, column in pairs]
    bars = axes.barh(range(len(pairs)), [wrong[pair] for pair in pairs], color=COLOURS[5])
    axes.bar_label(bars, padding=2, fontsize=8)
    axes.set_yticks(range(len(pairs)), labels, fontsize=8, parse_math=False)
    axes.invert_yaxis()
    axes.set_xlabel("images")
    axes.set_title(f"most frequent of {int(wrong.sum())} confusions", fontsize=10)


def reliability_png(
    confidence: Float[Tensor, " images"],
    correct: Bool[Tensor, " images"],
    path: str | Path,
    *,
    title: str = "",
    num_bins: int = 15,
) -> None:
    """Draw how often predictions of a confidence are right: on the diagonal where the confidence can be trusted.

    Args:
        confidence: Probability of the predicted class, in [0, 1].
        correct: True where the predicted class is right.
        path: PNG file to write.
        title: Text above.
        num_bins: Bins of equal width, as of `expected_calibration_error`.

    References:
        On Calibration of Modern Neural Networks, 2017, arXiv 1706.04599, Fig. 1.
    """
    edges = np.linspace(0, 1, num_bins + 1)
    values, right = confidence.double().cpu().numpy(), correct.cpu().numpy()
    places = np.searchsorted(edges[1:-1], values, side="left")
    counts = np.bincount(places, minlength=num_bins)
    shares = 100 * np.bincount(places, weights=right, minlength=num_bins) / np.maximum(counts, 1)
    figure = new_figure(5.0, 5.5)
    above, below = figure.subplots(2, 1, height_ratios=[3, 1], sharex=True)
    centres, width = 100 * (edges[:-1] + edges[1:]) / 2, 100 / num_bins
    above.bar(centres[counts > 0], shares[counts > 0], 0.92 * width, color=COLOURS[0], label="accuracy in the bin")
    above.plot([0, 100], [0, 100], color=COLOURS[-1], linestyle="--", linewidth=1, label="confidence = accuracy")
    below.bar(centres, counts, 0.92 * width, color=COLOURS[1])
    error = 100 * expected_calibration_error(confidence, correct, num_bins=num_bins)
    above.legend(loc="upper left", frameon=False, fontsize=8, title=f"calibration error {error:.1f} points")
    above.set(ylabel="accuracy (%)", xlim=(0, 100), ylim=(0, 100))
    below.set(xlabel="confidence (%)", ylabel="images")
    _set_title(above, title)
    save_figure(figure, path)


def bars_png(
    values: Mapping[str, Mapping[str, float]],
    path: str | Path,
    *,
    spread: Mapping[str, Mapping[str, float | None]] | None = None,
    title: str = "",
    label: str = "accuracy (%)",
) -> None:
    """Draw grouped bars, one colour per series, each with its value.

    Args:
        values: `{series: {group: value}}`, for example methods and the scores base, new and h. A series may lack
            groups.
        path: PNG file to write.
        spread: Half-lengths of the error bars in the same layout; None draws none.
        title: Text above.
        label: Name and unit of the values.
    """
    groups = list(dict.fromkeys(group for series in values.values() for group in series))
    width = 0.8 / max(len(values), 1)
    figure = new_figure(min(max(4.0, 1.5 + 0.55 * len(groups) * len(values)), 20.0), 4.0)
    axes = figure.add_subplot()
    for position, (name, series) in enumerate(values.items()):
        present = [index for index, group in enumerate(groups) if group in series]
        left = np.array(present) + (position - (len(values) - 1) / 2) * width
        heights = [series[groups[index]] for index in present]
        axes.bar(left, heights, 0.92 * width, label=name)
        for x, height, index in zip(left, heights, present, strict=True):
            error = (spread or {}).get(name, {}).get(groups[index])
            if error is not None:
                axes.errorbar(x, height, yerr=error, color="black", capsize=3)
            top = (x, height + (error or 0.0))
            axes.annotate(f"{height:.1f}", top, (0, 3), textcoords="offset points", ha="center", fontsize=8)
    axes.set_xticks(range(len(groups)), groups, parse_math=False)
    axes.set_ylabel(label)
    _set_title(axes, title)
    axes.grid(visible=False, axis="x")
    axes.margins(y=0.12)
    if len(values) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    save_figure(figure, path)


def lines_png(
    curves: Mapping[str, Mapping[float, float]],
    path: str | Path,
    *,
    spread: Mapping[str, Mapping[float, float]] | None = None,
    x_label: str,
    label: str = "accuracy (%)",
    title: str = "",
    logarithmic: bool = False,
) -> None:
    """Draw curves with a mark at every value, and bands around them.

    Args:
        curves: `{name: {x: y}}`, for example conditions and their accuracy per corruption level.
        path: PNG file to write.
        spread: Half-heights of the bands in the same layout, for example deviations over seeds; None draws none.
        x_label: Name of the horizontal axis.
        label: Name and unit of the values.
        title: Text above.
        logarithmic: Draw the horizontal axis with equal distances for equal factors (sizes of training sets).
    """
    figure = new_figure(6.0, 4.0)
    axes = figure.add_subplot()
    for name, values in curves.items():
        (line,) = axes.plot(list(values), list(values.values()), marker="o", label=name)
        half = np.array([(spread or {}).get(name, {}).get(x, 0.0) for x in values])
        if half.any():
            middle = np.array(list(values.values()))
            axes.fill_between(
                list(values), middle - half, middle + half, color=line.get_color(), alpha=0.2, linewidth=0
            )
    ticks = sorted({x for values in curves.values() for x in values})
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set(xlabel=x_label, ylabel=label)
    _set_title(axes, title)
    if len(curves) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    save_figure(figure, path)
