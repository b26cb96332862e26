"""CoCoOp and CoOp against zero-shot: base-to-new, several seeds.

Paper: Conditional Prompt Learning for Vision-Language Models, arXiv 2203.05557.
Hardware and time: the demo preset takes a few minutes on 2 CPU cores (results: docs/methods/cocoop.md).
    python examples/train_cocoop.py                                           # bundled CLIP and icons, no network
    python examples/train_cocoop.py --model openai/clip-vit-base-patch16 --dataset <Hub id or folder> \
        --preset base_to_new --template "a photo of a {}."                   # the paper's settings

Everything is written below --output_dir: metrics.json, table.md, results.png, and per run the adapter with its own
reports.
"""

from functools import partial
from pathlib import Path

import peft_vlm
from peft_vlm.cli.console import add_console_flags, start_console
from peft_vlm.experiments.compare import TrainerLearner, chosen_settings, comparison_parser, run_comparison
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


def main() -> None:
    """Run the experiment and print where the results are."""
    parser = comparison_parser(
        __doc__,
        model=ASSETS / "clip_student",
        dataset=ASSETS / "icons",
        presets=["demo", "base_to_new"],
        protocol="base_to_new",
        output_dir="outputs/cocoop",
    )
    add_console_flags(parser)
    args = parser.parse_args()
    start_console(args)
    settings = chosen_settings(args, DEMO, None if args.preset == "demo" else preset_for(args.preset))
    words, training = settings["config"], settings["training"]
    coop = partial(peft_vlm.CoOpConfig, **words), peft_vlm.CoOpObjective
    cocoop = partial(peft_vlm.CoCoOpConfig, **words), peft_vlm.CoCoOpObjective
    learners = [
        TrainerLearner.on_prompts("coop", *coop, training),
        TrainerLearner.on_prompts("cocoop", *cocoop, training),
    ]
    run_comparison(args, learners, augmentation=settings["augmentation"])


if __name__ == "__main__":
    main()
