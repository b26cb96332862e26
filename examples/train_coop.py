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

from functools import partial
from pathlib import Path

import peft_vlm
from peft_vlm.cli.console import add_console_flags, start_console
from peft_vlm.experiments.compare import TrainerLearner, chosen_settings, comparison_parser, run_comparison
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


def main() -> None:
    """Run the experiment and print where the results are."""
    parser = comparison_parser(
        __doc__,
        model=ASSETS / "clip_student",
        dataset=ASSETS / "emoji",
        presets=["demo", "random", "words"],
        protocol="few_shot",
        output_dir="outputs/coop",
    )
    parser.add_argument("--class_position", choices=["end", "middle", "front"], default="end")
    parser.add_argument("--weight", type=float, default=8.0, help="of KgCoOp's distance to the hand-written prompts")
    add_console_flags(parser)
    args = parser.parse_args()
    start_console(args)
    official = None if args.preset == "demo" else preset_for(args.preset, shots=args.shots)
    settings = chosen_settings(args, DEMO, official)
    config = partial(peft_vlm.CoOpConfig, class_position=args.class_position, **settings["config"])
    objectives = {
        "coop": partial(peft_vlm.CoOpObjective, num_workers=args.num_workers),
        "kgcoop": partial(peft_vlm.KgCoOpObjective, weight=args.weight, num_workers=args.num_workers),
    }
    learners = [
        TrainerLearner.on_prompts(name, config, objective, settings["training"])
        for name, objective in objectives.items()
    ]
    run_comparison(args, learners, augmentation=settings["augmentation"])


if __name__ == "__main__":
    main()
