"""PromptSRC against zero-shot and the same prompts without self-regulation (IVLP): base-to-new, several seeds.

Paper: Self-regulating Prompts: Foundational Model Adaptation without Forgetting, arXiv 2307.06948.
Hardware and time: the demo preset takes a few minutes on 2 CPU cores (results: docs/methods/promptsrc.md).
    python examples/train_promptsrc.py                                       # bundled CLIP and icons, no network
    python examples/train_promptsrc.py --model openai/clip-vit-base-patch16 --dataset <Hub id or folder> \
        --preset base_to_new                                                 # the paper's settings

Everything is written below --output_dir: metrics.json, table.md, results.png, and per run the adapter with its own
reports.
"""

import argparse
from pathlib import Path
from typing import Any

from peft import get_peft_model

import peft_vlm
from peft_vlm.cli.console import add_console_flags, start_console
from peft_vlm.experiments.compare import (
    Experiment,
    TrainerLearner,
    ZeroShot,
    chosen_learners,
    chosen_settings,
    comparison_parser,
    load_task,
)
from peft_vlm.experiments.report import show_results
from peft_vlm.methods.promptsrc import OFFICIAL_TEMPLATES, preset_for
from peft_vlm.text import ClassPrompts

ASSETS = Path(__file__).parent / "assets"

# Ours, for the bundled 48 px CLIP (6 vision and 4 text layers); the official presets are for ViT-B/16.
DEMO = {
    "config": {"text_depth": 3, "vision_depth": 4, "num_vision_tokens": 2},
    "objective": {"text_weight": 25.0, "image_weight": 10.0, "logit_weight": 1.0, "gpa_mean": 4.0, "gpa_std": 1.0},
    "training": {
        "learning_rate": 0.01,
        "num_train_epochs": 5,
        "warmup_epochs": 1,
        "warmup_learning_rate": 1e-4,
        "per_device_train_batch_size": 32,
    },
    "augmentation": {"scale": (0.9, 1.0), "flip_probability": 0.0},  # arrows and text must not be mirrored
    # chosen on training images: with ImageNet templates, made for photographs, new icon classes lose 4 points
    "frozen_templates": ("a photo of a {}.", "a {} icon", "an icon of a {}", "a picture of a {}", "{}"),
}


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = comparison_parser(
        __doc__,
        model=ASSETS / "clip_student",
        dataset=ASSETS / "icons",
        presets=["demo", "base_to_new", "cross_dataset", "few_shot", "few_shot_late", "teacher"],
        protocol=None,
        output_dir="outputs/promptsrc",
        template="{context} {}.",
    )
    parser.add_argument("--context", default="a photo of a", help="words that the text context starts from")
    parser.add_argument("--depth", type=int, help="layers with prompts in both towers, instead of the preset's")
    parser.add_argument("--methods", nargs="+", help="rows of the table; all three by default")
    add_console_flags(parser)
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> dict[str, Any]:
    """Settings of the preset: for the adapter, the objective, the training and the augmentation."""
    settings = chosen_settings(args, DEMO, None if args.preset == "demo" else preset_for(args.preset))
    settings.setdefault("frozen_templates", OFFICIAL_TEMPLATES)
    settings["config"]["context_init"] = args.context
    if args.depth is not None:
        settings["config"] |= {"text_depth": args.depth, "vision_depth": args.depth}
    return settings


def learners_of(settings: dict[str, Any], experiment: Experiment) -> list[Any]:
    """The rows of the table; both trained ones have the same prompts and make the same number of steps."""

    def wrap(model: Any) -> Any:
        return get_peft_model(model, peft_vlm.PromptSRCConfig(**settings["config"]))

    def ivlp(prompts: ClassPrompts, seed: int) -> peft_vlm.PromptSRCObjective:
        return peft_vlm.PromptSRCObjective(prompts, text_weight=0.0, image_weight=0.0, logit_weight=0.0)

    def promptsrc(prompts: ClassPrompts, seed: int) -> peft_vlm.PromptSRCObjective:
        frozen = experiment.prompts(prompts.class_names, settings["frozen_templates"])
        return peft_vlm.PromptSRCObjective(prompts, frozen_prompts=frozen, **settings["objective"])

    return [
        ZeroShot(),
        TrainerLearner("ivlp", wrap=wrap, objective=ivlp, training=settings["training"]),
        TrainerLearner("promptsrc", wrap=wrap, objective=promptsrc, training=settings["training"]),
    ]


def main() -> None:
    """Run the experiment and print where the results are."""
    args = parse_arguments()
    start_console(args)
    settings = settings_of(args)
    experiment = Experiment.for_clip(
        args.model, augmentation=settings["augmentation"], output_dir=args.output_dir, use_cpu=args.use_cpu
    )
    protocol = args.protocol or ("few_shot" if args.preset.startswith("few_shot") else "base_to_new")
    template = args.template.replace("{context}", args.context)
    task = load_task(args.dataset, protocol, template=template, shots=args.shots)
    learners = chosen_learners(learners_of(settings, experiment), args.methods)
    report = experiment.run([task], learners, args.seeds)
    show_results(report, args.output_dir, learner="promptsrc")


if __name__ == "__main__":
    main()
