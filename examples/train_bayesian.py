"""Bayesian prompts and CoOp against zero-shot: base-to-new, several seeds.

Paper: Bayesian Prompt Learning for Image-Language Model Generalization, arXiv 2210.02390.
Hardware and time: the demo preset takes a few minutes on 2 CPU cores (results: docs/methods/bayesian.md).
    python examples/train_bayesian.py                                           # bundled CLIP and icons, no network
    python examples/train_bayesian.py --model openai/clip-vit-base-patch16 --dataset <Hub id or folder> \
        --preset dtd --template "a photo of a {}."                   # the paper's settings

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
from peft_vlm.methods.bayesian import preset_for

ASSETS = Path(__file__).parent / "assets"

# Ours, for the bundled 48 px CLIP; the official preset is for ViT-B/16.
DEMO = {
    "config": {"context_init": "a photo of a"},
    "bayesian": {"num_samples": 5, "residual_std": 0.1},  # the official start drowns the words of a small model
    "training": {
        "learning_rate": 0.05,
        "num_train_epochs": 2,
        "warmup_epochs": 0,
        "per_device_train_batch_size": 32,
    },
    "augmentation": {"scale": (0.9, 1.0), "flip_probability": 0.0},  # arrows and text must not be mirrored
}

# Samples and epochs per data set, as the authors list them.
OFFICIAL = {
    "caltech101": (20, 20),
    "dtd": (40, 10),
    "eurosat": (20, 60),
    "fgvc_aircraft": (10, 10),
    "food101": (20, 20),
    "imagenet": (10, 10),
    "oxford_flowers": (10, 40),
    "oxford_pets": (40, 20),
    "stanford_cars": (20, 40),
    "sun397": (20, 10),
    "ucf101": (5, 20),
}


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "clip_student"), help="CLIP: folder or Hub id")
    parser.add_argument("--dataset", default=str(ASSETS / "icons"), help="folder, CSV or Hub id with image and label")
    parser.add_argument("--template", default="a photo of a {}.", help="text around a class name, with one {}")
    parser.add_argument("--preset", choices=["demo", *OFFICIAL], default="demo", help="or the authors' settings")
    parser.add_argument("--protocol", choices=["base_to_new", "few_shot"], default="base_to_new")
    parser.add_argument("--shots", type=int, default=16, help="images per class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--conditional", action="store_true", help="a distribution per image")
    parser.add_argument("--epochs", type=int, help="instead of the preset's number")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/bayesian"))
    add_console_flags(parser)
    return parser.parse_args()


def main() -> None:
    """Run the experiment and print where the results are."""
    args = parse_arguments()
    start_console(args)
    settings: dict[str, Any] = DEMO
    if args.preset != "demo":
        samples, epochs = OFFICIAL[args.preset]
        preset = preset_for(samples=samples, epochs=epochs)
        augmentation = {"scale": (0.08, 1.0), "flip_probability": 0.5}
        words = {"context_init": preset.config["context_init"]}
        settings = {"config": words, "bayesian": preset.config, "training": preset.training}
        settings["augmentation"] = augmentation
    training = settings["training"] | {"use_cpu": args.use_cpu, "dataloader_num_workers": args.num_workers}
    training |= {} if args.epochs is None else {"num_train_epochs": args.epochs}
    distribution = settings["config"] | settings["bayesian"] | {"conditional": args.conditional}
    learners = [
        TrainerLearner(
            name,
            wrap=lambda model, config=config, values=values: get_peft_model(model, config(**values)),
            objective=lambda prompts, seed, objective=objective: objective(prompts),
            training=training,
        )
        for name, config, values, objective in (
            ("coop", peft_vlm.CoOpConfig, settings["config"], peft_vlm.CoOpObjective),
            ("bayesian", peft_vlm.BayesianConfig, distribution, peft_vlm.BayesianObjective),
        )
    ]
    experiment = Experiment.for_clip(
        args.model, augmentation=settings["augmentation"], output_dir=args.output_dir, use_cpu=args.use_cpu
    )
    task = load_task(args.dataset, args.protocol, template=args.template, shots=args.shots)
    report = experiment.run([task], [ZeroShot(), *learners], args.seeds)
    show_results(report, args.output_dir, learner="bayesian")


if __name__ == "__main__":
    main()
