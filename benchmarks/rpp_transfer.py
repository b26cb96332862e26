"""The grid of RPP: what sharing, soft labels, depth and classes per step change in transfer and few-shot training.

    python benchmarks/rpp_transfer.py [--json] [--variants rpp shared hard ...] [--seeds 1 2 3] [--shots 1 4 16]

Every variant has the same settings except the one in its name: it pretrains, transfers to the three bundled test sets,
and starts few-shot training on emoji and icons. `half` is the same as `rpp` on a CLIP that was trained on half of the
names (`--half_model`, made by `train_clip.py --half`). An interrupted run continues. Hours on two CPU cores.
Take variants one by one.
"""

import argparse
import json
import statistics
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import CLIPModel, set_seed

from peft_vlm import RPPConfig, RPPObjective
from peft_vlm.experiments.compare import Experiment
from peft_vlm.files import write_json
from peft_vlm.methods.rpp import PRESETS

EXAMPLES = Path(__file__).parents[1] / "examples"
sys.path.append(str(EXAMPLES))

from train_rpp import (  # noqa: E402
    ASSETS,
    TEMPLATE,
    TEST_SETS,
    few_shot,
    load_test_sets,
    load_training_images,
    pretrain,
    transfer,
)

#: What a variant changes: settings of the adapter and of the objective.
VARIANTS: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "rpp": ({}, {}),
    "shared": ({"share_qkv": "all"}, {}),
    "shared_replaced": ({"share_qkv": "all", "slot_residual": "replaced"}, {}),
    "pomp": (
        {"share_qkv": "all", "slot_residual": "replaced", "text_depth": 1, "vision_depth": 0},
        {"soft_weight": 0.0},
    ),
    "hard": ({}, {"soft_weight": 0.0}),
    "soft": ({}, {"soft_weight": 1.0}),
    "text_only": ({"vision_depth": 0}, {}),
    "vision_only": ({"text_depth": 0}, {}),
    "depth_1": ({"text_depth": 1, "vision_depth": 1}, {}),
    "k_16": ({}, {"num_sampled_classes": 16}),
    "k_512": ({}, {"num_sampled_classes": 512}),
    "no_correction": ({}, {"correction": "none"}),
    "half": ({}, {}),
}


def run_variant(name: str, args: argparse.Namespace) -> dict[str, Any]:
    """Pretrain, transfer and train few-shot; one report."""
    changed, objective_changes = VARIANTS[name]
    preset = PRESETS["demo"]
    config, options = preset["config"] | changed, preset["objective"] | objective_changes
    folder, source = args.output_dir / name, str(args.half_model if name == "half" else args.model)
    experiment = Experiment.for_clip(
        source, augmentation=preset["augmentation"], output_dir=folder / "few_shot", use_cpu=args.use_cpu
    )
    images = load_training_images(str(args.data), experiment.train_transform, seed=args.seed)
    prompts = experiment.prompts(images.class_names, TEMPLATE)
    if options["soft_weight"]:
        options["teacher"] = CLIPModel.from_pretrained(args.teacher)
        teacher = Experiment.for_clip(str(args.teacher), augmentation=preset["augmentation"], output_dir=folder)
        options["teacher_prompts"] = teacher.prompts(images.class_names, TEMPLATE)
    training = preset["training"] | {"max_steps": args.max_steps, "use_cpu": args.use_cpu, "seed": args.seed}
    set_seed(args.seed)
    model = get_peft_model(experiment.load_model(), RPPConfig(**config))
    objective = RPPObjective(prompts, seed=args.seed, **options)
    model = pretrain(model, objective, images, folder=folder / "pretrained", training=training)
    test_sets = load_test_sets(experiment)
    report: dict[str, Any] = {"config": changed, "objective": objective_changes}
    report["zero_shot"] = transfer(experiment.load_model().to(model.device).eval(), test_sets, experiment)
    report["transfer"] = transfer(model, test_sets, experiment)
    report["trained_numbers"] = sum(p.numel() for n, p in model.named_parameters() if "rpp_" in n)
    report["few_shot"] = {task: train_few_shot(task, config, folder, experiment, args) for task in args.few_shot_data}
    write_json(folder / "metrics.json", report)
    return report


def train_few_shot(
    task: str, config: dict[str, Any], folder: Path, experiment: Experiment, args: argparse.Namespace
) -> dict[str, Any]:
    """Accuracy by shots and start: mean and standard deviation over the seeds."""
    results = few_shot(
        experiment,
        str(ASSETS / task),
        adapter=folder / "pretrained",
        config=config,
        shots=args.shots,
        seeds=args.seeds,
        training=PRESETS["demo"]["few_shot"] | {"use_cpu": args.use_cpu},
    )
    return {
        count: {start: mean_and_spread(row["accuracy"]) for start, row in methods.items()}
        for count, methods in results.items()
    }


def mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds."""
    return {"mean": statistics.fmean(values), "std": statistics.stdev(values) if len(values) > 1 else 0.0}


def table(reports: dict[str, dict[str, Any]]) -> str:
    """Markdown table of the transfer."""
    lines = [f"| variant | parameters | {' | '.join(TEST_SETS)} | mean |", "|---|---|" + "---|" * (len(TEST_SETS) + 1)]
    for name, report in reports.items():
        gains = [report["transfer"][key] - report["zero_shot"][key] for key in (*TEST_SETS, "mean")]
        cells = [f"{report['transfer'][s]:.1f} ({g:+.1f})" for s, g in zip((*TEST_SETS, "mean"), gains, strict=True)]
        lines.append(f"| {name} | {report['trained_numbers']:,} | {' | '.join(cells)} |")
    return "\n".join(lines)


def main() -> None:
    """Run the variants one after the other."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument(
        "--variants", nargs="+", choices=sorted(VARIANTS), default=[v for v in VARIANTS if v != "half"]
    )
    parser.add_argument("--model", type=Path, default=ASSETS / "clip_student")
    parser.add_argument("--half_model", type=Path, help="CLIP trained on half of the names, for the variant 'half'")
    parser.add_argument("--teacher", type=Path, default=ASSETS / "clip_teacher")
    parser.add_argument(
        "--data", type=Path, default=ASSETS / "pretraining", help="the whole corpus: see assets/scripts"
    )
    parser.add_argument("--max_steps", type=int, default=PRESETS["demo"]["training"]["max_steps"])
    parser.add_argument("--few_shot_data", nargs="*", default=["emoji", "icons"])
    parser.add_argument("--shots", type=int, nargs="+", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seed", type=int, default=0, help="seed of the pretraining")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/rpp_transfer"))
    args = parser.parse_args()
    if "half" in args.variants and args.half_model is None:
        parser.error("the variant 'half' needs --half_model")
    reports: dict[str, dict[str, Any]] = {}
    for name in args.variants:
        print(f"{name} ...", file=sys.stderr, flush=True)
        reports[name] = run_variant(name, args)
        write_json(args.output_dir / "metrics.json", reports)
        (args.output_dir / "table.md").write_text(table(reports) + "\n")
    print(json.dumps(reports) if args.json else table(reports))


if __name__ == "__main__":
    main()
