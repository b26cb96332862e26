"""The empty figure that every plot begins with. matplotlib is imported on use and comes with the extra `plots`."""

from importlib.util import find_spec
from typing import Any


def has_matplotlib() -> bool:
    """Whether plots can be drawn."""
    return find_spec("matplotlib") is not None


def require_matplotlib() -> None:
    """Say how to install matplotlib, before work is done whose plots could not be drawn.

    Raises:
        ImportError: If it is not installed.
    """
    if not has_matplotlib():
        raise ImportError("Plots need matplotlib. Install it with: pip install 'peft-vlm[plots]'")


def new_figure(width: float | int, height: float | int) -> Any:
    """An empty figure that no window and no global state of matplotlib knows of; `savefig(path)` writes it.

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
