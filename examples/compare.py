"""All methods on the same images: each with the settings that it recommends for the model, several seeds, one table.

    python examples/compare.py                                    # bundled CLIPs and data, no network
    python examples/compare.py --methods coop maple --seeds 1     # some of them
    python examples/compare.py --model openai/clip-vit-base-patch16 --teacher openai/clip-vit-large-patch14 \
        --tasks few_shot --datasets <Hub id or folder> --templates "a photo of a {}." --augmentation scale=[0.08,1]

A cell (data x method x seed) is one `peft-vlm train` without `--preset`, in a folder of its own with adapter, reports
and card. A run that ended early goes on with the cells that are missing. Nothing is tuned per method beyond its rule,
and PromptKD learns from a larger teacher, so the table says what a first try gives, not which method is best.
Hardware and time: about 40 minutes per seed on 2 CPU cores.

Written below --output_dir: metrics.json, table.md, results.png, and costs.png (accuracy against trainable parameters,
seconds and memory).
"""

import argparse
import statistics
from dataclasses import asdict
from pathlib import Path
from typing import Any

import peft_vlm  # noqa: F401 - registers the methods
from peft_vlm.cli.console import add_console_flags, calm, start_console
from peft_vlm.evaluation.plots import COLOURS, new_figure, save_figure
from peft_vlm.experiments.cells import finished_cell, run_cell
from peft_vlm.experiments.report import COSTS, show_results
from peft_vlm.files import write_json
from peft_vlm.registry import METHODS
from peft_vlm.settings import RunSettings
from peft_vlm.training.arguments import VLMTrainingArguments

ASSETS = Path(__file__).parent / "assets"
#: Pretraining on thousands of classes, and a prompt for other models: measured by their own examples.
ELSEWHERE = ("rpp", "tvp")


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    choices = sorted(set(METHODS) - set(ELSEWHERE))
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--methods", nargs="+", default=["all"], choices=["all", *choices])
    parser.add_argument("--model", default=str(ASSETS / "clip_student"), help="CLIP: folder or Hub id")
    parser.add_argument("--teacher", default=str(ASSETS / "clip_teacher"), help="of PromptKD: folder or Hub id")
    parser.add_argument("--tasks", nargs="+", default=["few_shot", "base_to_new"], help="protocol of each data set")
    parser.add_argument("--datasets", nargs="+", default=[str(ASSETS / "emoji"), str(ASSETS / "icons")])
    parser.add_argument("--templates", nargs="+", default=["{} emoji", "a {} icon"], help="of each data set")
    parser.add_argument("--augmentation", nargs="+", default=["scale=[0.9,1]", "flip_probability=0"])
    parser.add_argument("--shots", type=int, default=16, help="images per class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=float, help="instead of the recommended number")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/compare"))
    add_console_flags(parser)
    args = parser.parse_args()
    if not len(args.tasks) == len(args.datasets) == len(args.templates):
        parser.error("expected one protocol and one template for each data set")
    args.methods = choices if "all" in args.methods else args.methods
    return args


def cell_of(
    args: argparse.Namespace, task: tuple[str, str, str], method: str, seed: int, folder: Path
) -> dict[str, Any]:
    """Scores and costs of one run: trained now, or read where it was finished with the same settings."""
    protocol, dataset, template = task
    settings = RunSettings(
        method=method,
        model=args.model,
        dataset=dataset,
        template=template,
        protocol=protocol,
        shots=args.shots,
        augmentation=args.augmentation,
        teacher=args.teacher if method == "promptkd" else None,
        # a PromptKD student knows the classes whose images it saw, as in its paper
        transductive=method == "promptkd" and protocol == "base_to_new",
    )
    wanted = asdict(settings) | {"seed": seed, "epochs": args.epochs}
    if (cell := finished_cell(folder, wanted)) is not None:
        return cell

    def arguments(recommended: dict[str, Any]) -> VLMTrainingArguments:
        if args.epochs is not None:
            recommended = recommended | {"num_train_epochs": args.epochs, "warmup_epochs": 0}
        own = {"seed": seed, "use_cpu": args.use_cpu, "disable_tqdm": True, "save_strategy": "no", "report_to": "none"}
        return VLMTrainingArguments(str(folder), **recommended, **own)

    with calm():
        cell = run_cell(settings, arguments, folder, wanted=wanted)
    assert cell is not None, "the comparison runs in one process"
    return cell


def rows_of(cells: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    """Rows of a task's table, zero-shot first."""
    first = next(iter(cells.values()))
    nothing = {"trainable_parameters": 0, "seconds": [0.0] * len(first), "peak_memory_mb": [0.0] * len(first)}
    rows: dict[str, Any] = {
        "zero_shot": {name: [cell["zero_shot"][name] for cell in first] for name in first[0]["zero_shot"]} | nothing
    }
    for method, runs in cells.items():
        rows[method] = {name: [run["scores"][name] for run in runs] for name in runs[0]["scores"]}
        rows[method] |= {name: [run[name] for run in runs if run[name] is not None] for name in COSTS}
        rows[method]["trainable_parameters"] = runs[0]["trainable_parameters"]
        rows[method]["transductive"] = runs[0]["settings"]["transductive"]
    return rows


def costs_png(report: dict[str, Any], path: Path) -> None:
    """Accuracy (base classes or all) against what it costs, a panel per cost and a row per data set."""
    from matplotlib.lines import Line2D  # comes with the extra `plots`

    costs = {
        "trainable_parameters": "trainable parameters",
        "seconds": "training, seconds",
        "peak_memory_mb": "peak MB",
    }
    tasks = {report["task"]: report["methods"], **{name: task["methods"] for name, task in report["tasks"].items()}}
    figure = new_figure(13, 3.6 * len(tasks))
    numbers = {method: place for place, method in enumerate((m for m in report["methods"] if m != "zero_shot"), 1)}
    seeds = f"{len(report['seeds'])} seed{'s' * (len(report['seeds']) > 1)}"
    for line, (name, methods) in zip(figure.subplots(len(tasks), 3, squeeze=False), tasks.items(), strict=True):
        score = "h" if "h" in methods["zero_shot"] else "accuracy"
        for axes, (cost, label) in zip(line, costs.items(), strict=True):
            for method, row in methods.items():
                values = row[cost] if isinstance(row[cost], list) else [row[cost]]
                if method == "zero_shot":
                    axes.axhline(statistics.mean(row[score]), color="0.6", linestyle="--", linewidth=1)
                elif values:
                    spread = statistics.stdev(row[score]) if len(row[score]) > 1 else 0.0
                    place = statistics.mean(values), statistics.mean(row[score])
                    axes.errorbar(*place, yerr=spread, color="0.6", fmt="none", capsize=2)
                    circle = {"boxstyle": "circle,pad=0.2", "linewidth": 0, "alpha": 0.85}
                    circle["facecolor"] = COLOURS[(numbers[method] - 1) % 7]
                    axes.plot(*place, alpha=0)  # a text alone does not widen the axes
                    axes.annotate(str(numbers[method]), place, ha="center", va="center", fontsize=7, bbox=circle)
            if cost == "trainable_parameters":
                axes.set_xscale("log")
                axes.xaxis.set_major_formatter(lambda value, _: f"{value:.0e}".replace("e+0", "e"))
            axes.margins(x=0.1, y=0.15)
            axes.set_xlabel(label)
            axes.set_ylabel("H of base and new (%)" if score == "h" else "top-1 accuracy (%)")
            axes.set_title(f"{name}, {seeds}; dashed: zero-shot", fontsize=9)
    names = [f"{number}  {method.replace('_', ' ')}" for method, number in numbers.items()]
    handles = [Line2D([], [], linestyle="", marker="o", color=COLOURS[place % 7]) for place in range(len(names))]
    figure.legend(handles, names, loc="outside right center", frameon=False, fontsize=9)
    save_figure(figure, path)


def main() -> None:
    """Run the missing cells, and write table and plots."""
    args = parse_arguments()
    start_console(args)
    tasks = list(zip(args.tasks, args.datasets, args.templates, strict=True))
    total, done = len(tasks) * len(args.methods) * len(args.seeds), 0
    report: dict[str, Any] = {"seeds": args.seeds, "methods": {}, "tasks": {}}
    for position, task in enumerate(tasks):
        name = Path(task[1]).name
        cells: dict[str, list[dict[str, Any]]] = {method: [] for method in args.methods}
        for seed in args.seeds:
            for method in args.methods:
                cell = cell_of(args, task, method, seed, args.output_dir / name / method / f"seed{seed}")
                cells[method].append(cell)
                done += 1
                scores = ", ".join(f"{key} {value:.1f} %" for key, value in cell["scores"].items())
                print(f"{done}/{total} {name}, {method}, seed {seed}: {scores}, {cell['seconds']:.0f} s", flush=True)
        rows = rows_of(cells)
        if position == 0:
            report |= {"task": name, "methods": rows}
        else:
            report["tasks"][name] = {"methods": rows}
    write_json(args.output_dir / "metrics.json", report)
    costs_png(report, args.output_dir / "costs.png")
    show_results(report, args.output_dir, learner=args.methods[0])


if __name__ == "__main__":
    main()
