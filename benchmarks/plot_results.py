"""Draws docs/results.png, the plot of the README, from the recorded numbers in docs/results.json.

    python benchmarks/plot_results.py [--output docs/results.png]

Nothing is trained or measured here. Each entry of the file names the command that measured it, the number of seeds,
and the page that reports it.
"""

import argparse
import json
from pathlib import Path

from peft_vlm.evaluation.plots import new_figure

DOCS = Path(__file__).parents[1] / "docs"
BASELINES = ("linear probe", "full fine-tuning")


def main() -> None:
    """Read the numbers and draw a bar with its spread for each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--output", type=Path, default=DOCS / "results.png")
    args = parser.parse_args()
    entries = json.loads((DOCS / "results.json").read_text(encoding="utf-8"))[::-1]
    figure = new_figure(6.0, 0.6 + 0.26 * len(entries))
    axes = figure.add_subplot()
    colours = ["0.65" if entry["method"] in BASELINES else "tab:blue" for entry in entries]
    labels = [entry["method"] + (" (colours, unseen models)" if entry["method"] == "TVP" else "") for entry in entries]
    gains, spreads = [entry["gain"] for entry in entries], [entry["std"] for entry in entries]
    axes.barh(labels, gains, xerr=spreads, color=colours, capsize=2)
    for row, (gain, spread) in enumerate(zip(gains, spreads, strict=True)):
        axes.text(max(gain + spread, 0) + 0.4, row, f"{gain:+.1f}", va="center", fontsize=8)
    axes.axvline(0, color="black", linewidth=0.8)
    axes.set_xlim(-1.5, max(gains) + 6)
    axes.tick_params(labelsize=8)
    axes.set_xlabel("gain over zero-shot, points of accuracy; mean and spread of 3 seeds", fontsize=8)
    figure.savefig(args.output)
    print(f"Written: {args.output}")


if __name__ == "__main__":
    main()
