"""CoCoOp and CoOp against zero-shot: base-to-new, several seeds.

Paper: Conditional Prompt Learning for Vision-Language Models, arXiv 2203.05557.
Hardware and time: the demo preset takes a few minutes on 2 CPU cores (results: docs/methods/cocoop.md).
    python examples/train_cocoop.py                                           # bundled CLIP and icons, no network
    python examples/train_cocoop.py --model openai/clip-vit-base-patch16 --dataset <Hub id or folder> \
        --preset base_to_new --template "a photo of a {}."                   # the paper's settings

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
from peft_vlm.methods.cocoop import preset_for

ASSETS = Path(__file__).parent / "assets"

# Ours, for the bundled 48 px CLIP; the official preset is for ViT-B/16.
DEMO = {
    "config": {"context_init": "a photo of a"},
    "training": {
        "learning_rate": 0.01,
        "num_train_epochs": 2,
        "warmup_epochs": 0,
        "per_device_train_batch_size": 8,  # one text pass over all classes for each image
    },
    "augmentation": {"scale": (0.9, 1.0), "flip_probability": 0.0},  # arrows and text must not be mirrored
}


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "clip_student"), help="CLIP: folder or Hub id")
    parser.add_argument("--dataset", default=str(ASSETS / "icons"), help="folder, CSV or Hub id with image and label")
    parser.add_argument("--template", default="a photo of a {}.", help="text around a class name, with one {}")
    parser.add_argument("--preset", choices=["demo", "base_to_new"], default="demo")
    parser.add_argument("--protocol", choices=["base_to_new", "few_shot"], default="base_to_new")
    parser.add_argument("--shots", type=int, default=16, help="images per class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, help="instead of the preset's number")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/cocoop"))
    add_console_flags(parser)
    return parser.parse_args()


def main() -> None:
    """Run the experiment and print where the results are."""
    args = parse_arguments()
    start_console(args)
    settings: dict[str, Any] = DEMO
    if args.preset != "demo":
        preset = preset_for(args.preset)
        augmentation = {"scale": (0.08, 1.0), "flip_probability": 0.5}
        settings = {"config": preset.config, "training": preset.training, "augmentation": augmentation}
    training = settings["training"] | {"use_cpu": args.use_cpu, "dataloader_num_workers": args.num_workers}
    training |= {} if args.epochs is None else {"num_train_epochs": args.epochs}
    learners = [
        TrainerLearner(
            name,
            wrap=lambda model, config=config: get_peft_model(model, config(**settings["config"])),
            objective=lambda prompts, seed, objective=objective: objective(prompts),
            training=training,
        )
        for name, config, objective in (
            ("coop", peft_vlm.CoOpConfig, peft_vlm.CoOpObjective),
            ("cocoop", peft_vlm.CoCoOpConfig, peft_vlm.CoCoOpObjective),
        )
    ]
    experiment = Experiment.for_clip(
        args.model, augmentation=settings["augmentation"], output_dir=args.output_dir, use_cpu=args.use_cpu
    )
    task = load_task(args.dataset, args.protocol, template=args.template, shots=args.shots)
    report = experiment.run([task], [ZeroShot(), *learners], args.seeds)
    show_results(report, args.output_dir, learner="cocoop")


if __name__ == "__main__":
    main()
