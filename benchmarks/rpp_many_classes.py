"""CPU time and memory of a pretraining step as the number of classes grows, at a fixed number of sampled classes.

    python benchmarks/rpp_many_classes.py [--json] [--output FOLDER] [--models student vit_b16] [--steps 2]

Names have the same distribution of lengths whatever their number. Beside POMP's sampling: the plain objective over
all classes, measured at 100 and 1,000 classes; its text part grows with their number. Each value is measured in a
process of its own; memory is the peak of the process less what it held before the steps. The bundled student samples
256 and 1,000 classes, the ViT-B/16 256.
"""

import argparse
import json
import statistics
import sys
from pathlib import Path
from typing import Any

import torch

from measuring import measure, process_mb, random_clip, random_prompts, timed_steps

ASSETS = Path(__file__).parent.parent / "examples" / "assets"
CLASSES = (1_000, 5_000, 21_841)
PLAIN = (100, 1_000)
SAMPLED = {"student": (256, 1000), "vit_b16": (256,)}
BATCH = {"student": 32, "vit_b16": 8}


def load(name: str) -> tuple[Any, Any, Any]:
    """Student, a teacher, and the configuration of the prompts, in the text tower alone as in POMP."""
    from transformers import CLIPModel

    from peft_vlm import RPPConfig

    own = {"num_vision_tokens": 0, "context_init": None}
    if name == "student":
        models = [CLIPModel.from_pretrained(ASSETS / folder) for folder in ("clip_student", "clip_teacher")]
        return models[0], models[1], RPPConfig(text_depth=3, **own)
    return random_clip(), random_clip(), RPPConfig(text_depth=9, **own)


def class_prompts(name: str, num_classes: int) -> Any:
    """Prompts of random tokens in the model's vocabulary."""
    prompts = random_prompts(num_classes, full_length=False)
    if name == "student":  # 4,263 tokens, the last two of which are start and end
        ids = prompts.input_ids
        special = ids >= 49406
        ids[special] -= 49406 - 4261
        ids[~special] %= 4000
    return prompts


def child(variant: str, steps: int) -> dict[str, float]:
    """One measurement."""
    from peft import get_peft_model

    from peft_vlm import RPPObjective

    torch.manual_seed(0)
    torch.set_num_threads(1)
    name, kind, count = variant.split(":")
    base, teacher, config = load(name)
    prompts, size = class_prompts(name, int(count)), BATCH[name]
    model = get_peft_model(base, config).train()
    sampled, chunk = (int(count), int(count)) if kind == "plain" else (int(kind), 128)
    options = {"num_sampled_classes": sampled, "text_chunk_size": chunk}
    objective = RPPObjective(prompts, soft_weight=0.5, teacher=teacher, **options)
    objective.teacher.classes = random_store(int(count), teacher.config.projection_dim)
    objective.prepare(model, None)
    optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=0.01)
    pixels = torch.randn(size, 3, *[base.config.vision_config.image_size] * 2)

    def step() -> None:
        labels = torch.randint(int(count), (size,))
        batch = {"pixel_values": pixels, "labels": labels, "index": labels}
        optimizer.zero_grad()
        objective(model, batch).loss.backward()
        optimizer.step()

    held = process_mb()
    seconds = timed_steps(step, steps)
    return {"cpu_seconds": seconds, "peak_mb": process_mb() - held, "process_mb": process_mb()}


def random_store(count: int, dim: int) -> Any:
    """Class features of the teacher: computing them once is no part of a step."""
    from peft_vlm.data.feature_store import RowStore

    store = RowStore("disk", name="class features")
    store.allocate((count, dim), torch.float32)
    for rows in torch.arange(count).split(1000):
        store.write(rows, torch.randn(len(rows), dim))
    return store


def growth(results: dict[str, dict[str, float]], name: str, sampled: int, key: str) -> float:
    """A quantity at the most classes over that at the fewest."""
    return results[f"{name}:{sampled}:{CLASSES[-1]}"][key] / results[f"{name}:{sampled}:{CLASSES[0]}"][key]


def plot(results: dict[str, dict[str, float]], models: list[str], path: Path) -> None:
    """CPU time and memory over the number of classes."""
    from peft_vlm.evaluation.plots import new_figure

    figure = new_figure(9.0, 3.6)
    axes = figure.subplots(1, 2)
    shown = {"cpu_seconds": "CPU seconds per step", "peak_mb": "peak MB of the steps"}
    for axis, (key, label) in zip(axes, shown.items(), strict=True):
        for name in models:
            for kind, counts, style in (*((k, CLASSES, "o-") for k in SAMPLED[name]), ("plain", PLAIN, "s--")):
                values = [results[f"{name}:{kind}:{count}"][key] for count in counts]
                axis.plot(counts, values, style, label=f"{name}, {kind if kind == 'plain' else f'K = {kind}'}")
        axis.set(xscale="log", yscale="log", xlabel="classes", ylabel=label)
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside lower center", ncols=5)
    figure.savefig(path)


def main() -> None:
    """Measure, print, plot."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--child", help=argparse.SUPPRESS)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--models", nargs="+", choices=sorted(SAMPLED), default=sorted(SAMPLED))
    parser.add_argument("--rounds", type=int, default=1)
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--output", type=Path, default=Path("outputs/rpp_many_classes"))
    args = parser.parse_args()
    if args.child:
        print(json.dumps(child(args.child, args.steps)))
        return
    variants = [f"{name}:{k}:{count}" for name in args.models for k in SAMPLED[name] for count in CLASSES]
    variants += [f"{name}:plain:{count}" for name in args.models for count in PLAIN]
    samples = measure(__file__, variants, rounds=args.rounds, options=["--steps", str(args.steps)])
    results = {
        variant: {key: statistics.median(row[key] for row in rows) for key in rows[0]}
        for variant, rows in samples.items()
    }
    report: dict[str, Any] = {"results": results}
    for key, quantity in (("time_growth", "cpu_seconds"), ("memory_growth", "peak_mb")):
        report[f"{key}_by_model"] = {
            f"{name}, K = {k}": round(growth(results, name, k, quantity), 3)
            for name in args.models
            for k in SAMPLED[name]
        }
        report[key] = max(report[f"{key}_by_model"].values())
    args.output.mkdir(parents=True, exist_ok=True)
    (args.output / "metrics.json").write_text(json.dumps(report, indent=1) + "\n")
    plot(results, args.models, args.output / "growth.png")
    if args.json:
        print(json.dumps(report))
        return
    for variant, row in results.items():
        print(f"{variant:28} {row['cpu_seconds']:8.2f} CPU s per step {row['peak_mb']:8.0f} MB", file=sys.stdout)
    print(f"time x {report['time_growth']}, memory x {report['memory_growth']} from 1,000 to 21,841 classes")


if __name__ == "__main__":
    main()
