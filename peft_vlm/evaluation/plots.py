"""Plots: bars, curves, confusion matrices. matplotlib is imported on use and comes with the extra `plots`."""

import io
import textwrap
import warnings
from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import numpy as np
from jaxtyping import Int
from torch import Tensor

from peft_vlm.files import write_bytes


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

    figure = Figure(figsize=(width, height), dpi=120, layout="constrained")
    FigureCanvasAgg(figure)
    return figure


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
        figure.savefig(content, format="png")
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


#: Beyond this many classes neither names nor counts can be read, and only the matrix is drawn.
MAX_NAMED_CLASSES = 120
MAX_COUNTED_CLASSES = 12
#: Letters of a class name that are drawn: the figure is as wide as the longest.
MAX_NAME = 80


def _set_title(axes: Any, title: str) -> None:
    inches = axes.figure.get_size_inches()[0]
    axes.set_title(textwrap.fill(title, width=int(9 * inches)), parse_math=False)


def confusion_matrix_png(
    confusion: Int[Tensor, "classes classes"], class_names: Sequence[str], path: str | Path, *, title: str = ""
) -> None:
    """Draw a confusion matrix, each row as shares of its true class.

    Args:
        confusion: Images per true class (row) and predicted class (column).
        class_names: Names of rows and columns.
        path: PNG file to write.
        title: Text above.
    """
    counts = confusion.numpy()
    shares = 100 * counts / np.maximum(counts.sum(axis=1, keepdims=True), 1)
    number = len(class_names)
    is_named = number <= MAX_NAMED_CLASSES
    cells = max(3.0, (0.4 if number <= MAX_COUNTED_CLASSES else 0.17) * number) if is_named else 8.0
    class_names = [name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}..." for name in class_names]
    names = 0.085 * max(len(name) for name in class_names) if is_named else 0.3
    figure = new_figure(cells + names + 1.6, cells + names + 0.8)
    from matplotlib.colors import PowerNorm

    axes = figure.add_subplot()
    # Under a square root a rare confusion is still visible beside the diagonal.
    image = axes.imshow(shares, cmap="Blues", norm=PowerNorm(0.5, 0, 100), interpolation="nearest")
    figure.colorbar(image, label="share of the true class (%)", shrink=0.8, ticks=[0, 5, 20, 40, 60, 80, 100])
    if is_named:
        axes.set_xticks(range(number), class_names, rotation=90, fontsize=8, parse_math=False)
        axes.set_yticks(range(number), class_names, fontsize=8, parse_math=False)
    if number <= MAX_COUNTED_CLASSES:
        for row, column in np.argwhere(counts > 0):
            colour = "white" if shares[row, column] > 35 else "black"
            axes.text(column, row, counts[row, column], ha="center", va="center", fontsize=8, color=colour)
    axes.set(xlabel="predicted class", ylabel="true class")
    _set_title(axes, title)
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
    axes.spines[["top", "right"]].set_visible(False)
    axes.margins(y=0.12)
    if len(values) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    save_figure(figure, path)


def lines_png(
    curves: Mapping[str, Mapping[float, float]],
    path: str | Path,
    *,
    x_label: str,
    label: str = "accuracy (%)",
    title: str = "",
    logarithmic: bool = False,
) -> None:
    """Draw curves with a mark at every value.

    Args:
        curves: `{name: {x: y}}`, for example conditions and their accuracy per corruption level.
        path: PNG file to write.
        x_label: Name of the horizontal axis.
        label: Name and unit of the values.
        title: Text above.
        logarithmic: Draw the horizontal axis with equal distances for equal factors (sizes of training sets).
    """
    figure = new_figure(6.0, 4.0)
    axes = figure.add_subplot()
    for name, values in curves.items():
        axes.plot(list(values), list(values.values()), marker="o", label=name)
    ticks = sorted({x for values in curves.values() for x in values})
    if logarithmic:
        axes.set_xscale("log")
    axes.set_xticks(ticks, [f"{x:g}" for x in ticks])
    axes.minorticks_off()
    axes.set(xlabel=x_label, ylabel=label)
    _set_title(axes, title)
    axes.spines[["top", "right"]].set_visible(False)
    if len(curves) > 1:
        axes.legend(loc="upper left", bbox_to_anchor=(1, 1), frameon=False)
    save_figure(figure, path)
