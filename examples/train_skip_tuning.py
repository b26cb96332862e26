"""Skip Tuning against zero-shot, linear probe and full fine-tuning: base-to-new and few-shot, several seeds.

Paper: Skip Tuning: Pre-trained Vision-Language Models are Effective and Efficient Adapters Themselves, arXiv
    2412.11509.
Hardware and time: the demo preset takes six to ten minutes on 2 CPU cores (results: docs/methods/skip_tuning.md).
    python examples/train_skip_tuning.py --preset demo                      # bundled CLIP and data, no network
    python examples/train_skip_tuning.py --model openai/clip-vit-base-patch16 --dataset <Hub id or folder> \
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
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.experiments.compare import (
    Experiment,
    FullFineTuningObjective,
    LinearProbeLearner,
    Task,
    TrainerLearner,
    ZeroShot,
    chosen_learners,
    chosen_settings,
    comparison_parser,
    load_task,
)
from peft_vlm.experiments.report import show_results
from peft_vlm.methods.skip_tuning import preset_for

ASSETS = Path(__file__).parent / "assets"

# Ours, for the bundled 48 px CLIP (6 vision and 4 text layers); the official presets are for ViT-B/16.
DEMO = {
    "config": {"start_layer": 3, "text_start_layer": 2},
    "objective": {
        "top_ratio": 0.5,
        "max_top": 50,
        "batch_composition": "random",
        "image_cache": "none",
        "cache_batch_size": 8,
    },
    "training": {
        "learning_rate": 0.02,
        "vision_learning_rate": 0.004,
        "max_steps": 90,  # 3 epochs of icons, 10 of emoji
        "warmup_epochs": 1,
        "warmup_learning_rate": 1e-4,
        "per_device_train_batch_size": 32,
    },
    "full_finetuning": {"learning_rate": 3e-4},  # best of five on the validation families
    "augmentation": {"scale": (0.9, 1.0), "flip_probability": 0.0},  # arrows and text must not be mirrored
}


def parse_arguments() -> argparse.Namespace:
    """Command line; without a dataset the bundled ones are taken."""
    parser = comparison_parser(
        __doc__,
        model=ASSETS / "clip_student",
        dataset=None,
        presets=["demo", "base_to_new", "cross_dataset", "few_shot"],
        protocol=None,
        output_dir="outputs/demo",
        template="a {} icon",
    )
    parser.add_argument("--start_layer", type=int, help="first tuned layer of both towers, instead of the preset's")
    parser.add_argument("--methods", nargs="+", help="rows of the table; all four by default")
    add_console_flags(parser)
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the preset: for the adapter, the objective, the training and the augmentation."""
    official = None if args.preset == "demo" else preset_for(args.preset, shots=args.shots)
    settings = chosen_settings(args, DEMO, official)
    if args.start_layer is not None:
        settings["config"] = {"start_layer": args.start_layer}
    if args.epochs is not None:
        settings["training"]["max_steps"] = -1
    settings["objective"]["num_workers"] = args.num_workers
    return settings


def tasks_of(args: argparse.Namespace) -> list[Task]:
    """The bundled icons and emoji, or the dataset of the command line."""

    if args.dataset is not None:
        protocol = args.protocol or ("few_shot" if args.preset == "few_shot" else "base_to_new")
        return [load_task(args.dataset, protocol, template=args.template, shots=args.shots)]
    return [
        load_task(ASSETS / "icons", "base_to_new", template=args.template, shots=args.shots),
        load_task(ASSETS / "emoji", "few_shot", template="{} emoji", shots=args.shots),
    ]


def learners_of(settings: dict[str, Any], test_transform: EvalTransform) -> list[Any]:
    """The rows of the table; both trained ones make the same number of steps."""
    return [
        ZeroShot(),
        LinearProbeLearner(test_transform),
        TrainerLearner(
            "full_finetuning",
            wrap=lambda model: model,
            objective=lambda prompts, seed: FullFineTuningObjective(prompts),
            training=settings["training"] | {"vision_learning_rate": None} | settings.get("full_finetuning", {}),
        ),
        TrainerLearner(
            "skip_tuning",
            wrap=lambda model: get_peft_model(model, peft_vlm.SkipTuningConfig(**settings["config"])),
            objective=lambda prompts, seed: peft_vlm.SkipTuningObjective(prompts, seed=seed, **settings["objective"]),
            training=settings["training"],
        ),
    ]


def main() -> None:
    """Run the experiment and print where the results are."""
    args = parse_arguments()
    start_console(args)
    settings = settings_of(args)
    experiment = Experiment.for_clip(
        args.model, augmentation=settings["augmentation"], output_dir=args.output_dir, use_cpu=args.use_cpu
    )
    learners = chosen_learners(learners_of(settings, experiment.test_transform), args.methods)
    tasks = tasks_of(args)
    report = experiment.run(tasks, learners, args.seeds)
    show_results(report, args.output_dir, learner="skip_tuning")


if __name__ == "__main__":
    main()
