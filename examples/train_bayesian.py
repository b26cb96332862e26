"""Bayesian prompts and CoOp against zero-shot: base-to-new, several seeds.

Paper: Bayesian Prompt Learning for Image-Language Model Generalization, arXiv 2210.02390.
Hardware and time: the demo preset takes a few minutes on 2 CPU cores (results: docs/methods/bayesian.md).
    python examples/train_bayesian.py                                           # bundled CLIP and icons, no network
    python examples/train_bayesian.py --model openai/clip-vit-base-patch16 --dataset <Hub id or folder> \
        --preset dtd --template "a photo of a {}."                   # the paper's settings

Everything is written below --output_dir: metrics.json, table.md, results.png, and per run the adapter with its own
reports.
"""

from functools import partial
from pathlib import Path

import peft_vlm
from peft_vlm.cli.console import add_console_flags, start_console
from peft_vlm.experiments.compare import TrainerLearner, chosen_settings, comparison_parser, run_comparison
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


def main() -> None:
    """Run the experiment and print where the results are."""
    parser = comparison_parser(
        __doc__,
        model=ASSETS / "clip_student",
        dataset=ASSETS / "icons",
        presets=["demo", *OFFICIAL],
        protocol="base_to_new",
        output_dir="outputs/bayesian",
    )
    parser.add_argument("--conditional", action="store_true", help="a distribution per image")
    add_console_flags(parser)
    args = parser.parse_args()
    start_console(args)
    official = None
    if args.preset != "demo":
        samples, epochs = OFFICIAL[args.preset]
        official = preset_for(samples=samples, epochs=epochs)
    settings = chosen_settings(args, DEMO, official)
    words = {"context_init": settings["config"]["context_init"]}
    distribution = settings["config"] | settings.get("bayesian", {}) | {"conditional": args.conditional}
    coop = partial(peft_vlm.CoOpConfig, **words), peft_vlm.CoOpObjective
    bayesian = partial(peft_vlm.BayesianConfig, **distribution), peft_vlm.BayesianObjective
    learners = [
        TrainerLearner.on_prompts("coop", *coop, settings["training"]),
        TrainerLearner.on_prompts("bayesian", *bayesian, settings["training"]),
    ]
    run_comparison(args, learners, augmentation=settings["augmentation"])


if __name__ == "__main__":
    main()
