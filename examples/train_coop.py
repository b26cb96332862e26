"""CoOp and KgCoOp against zero-shot: few-shot on all classes, several seeds.

Papers: Learning to Prompt for Vision-Language Models, arXiv 2109.01134; Visual-Language Prompt Tuning with
Knowledge-guided Context Optimization, arXiv 2303.13283. Both train one CoOp adapter, KgCoOp with one more term.
Hardware and time: the demo preset takes a few minutes on 2 CPU cores (results: docs/methods/coop.md).
    python examples/train_coop.py                                            # bundled CLIP and emoji, no network
    python examples/train_coop.py --model openai/clip-vit-base-patch16 --dataset <Hub id or folder> --preset random \
        --template "{}."                                                     # the paper's 16 random vectors

Everything is written below --output_dir: metrics.json, table.md, results.png, and per run the adapter with its own
reports.
"""

import argparse
from pathlib import Path
from typing import Any

from peft import get_peft_model

import peft_vlm
from peft_vlm.cli.console import add_console_flags, start_console
from peft_vlm.experiments.compare import Experiment, TrainerLearner, ZeroShot, load_task
from peft_vlm.experiments.report import show_results
from peft_vlm.methods.coop import preset_for

ASSETS = Path(__file__).parent / "assets"

# Ours, for the bundled 48 px CLIP; the official presets are for ViT-B/16.
DEMO = {
    "config": {"context_init": "a photo of a"},
    "training": {
        "learning_rate": 0.05,  # best of four on training images held out
        "num_train_epochs": 10,
        "warmup_epochs": 1,
        "warmup_learning_rate": 1e-4,
        "per_device_train_batch_size": 32,
    },
    "augmentation": {"scale": (0.9, 1.0), "flip_probability": 0.0},  # arrows and text must not be mirrored
}


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "clip_student"), help="CLIP: folder or Hub id")
    parser.add_argument("--dataset", default=str(ASSETS / "emoji"), help="folder, CSV or Hub id with image and label")
    parser.add_argument("--template", default="a photo of a {}.", help="text around a class name, with one {}")
    parser.add_argument("--preset", choices=["demo", "random", "words"], default="demo")
    parser.add_argument("--protocol", choices=["base_to_new", "few_shot"], default="few_shot")
    parser.add_argument("--class_position", choices=["end", "middle", "front"], default="end")
    parser.add_argument("--weight", type=float, default=8.0, help="of KgCoOp's distance to the hand-written prompts")
    parser.add_argument("--shots", type=int, default=16, help="images per class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, help="instead of the preset's number")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/coop"))
    add_console_flags(parser)
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the preset: for the adapter, the training and the augmentation."""
    if args.preset == "demo":
        settings: dict[str, Any] = {key: dict(value) for key, value in DEMO.items()}
    else:
        preset = preset_for(args.preset, shots=args.shots)
        settings = {"config": preset.config, "training": preset.training}
        settings["augmentation"] = {"scale": (0.08, 1.0), "flip_probability": 0.5}
    settings["config"] |= {"class_position": args.class_position}
    if args.epochs is not None:
        settings["training"] |= {"num_train_epochs": args.epochs}
    settings["training"] |= {"use_cpu": args.use_cpu}
    return settings


def main() -> None:
    """Run the experiment and print where the results are."""
    args = parse_arguments()
    start_console(args)
    settings = settings_of(args)
    experiment = Experiment.for_clip(
        args.model, augmentation=settings["augmentation"], output_dir=args.output_dir, use_cpu=args.use_cpu
    )
    objectives = {
        "coop": lambda prompts, seed: peft_vlm.CoOpObjective(prompts, num_workers=args.num_workers),
        "kgcoop": lambda prompts, seed: peft_vlm.KgCoOpObjective(
            prompts, weight=args.weight, num_workers=args.num_workers
        ),
    }
    learners = [
        TrainerLearner(
            name,
            wrap=lambda model: get_peft_model(model, peft_vlm.CoOpConfig(**settings["config"])),
            objective=objective,
            training=settings["training"],
        )
        for name, objective in objectives.items()
    ]
    task = load_task(args.dataset, args.protocol, template=args.template, shots=args.shots)
    report = experiment.run([task], [ZeroShot(), *learners], args.seeds)
    show_results(report, args.output_dir, learner="coop")


if __name__ == "__main__":
    main()
