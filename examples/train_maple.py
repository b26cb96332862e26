"""MaPLe against zero-shot: base-to-new, several seeds; and the last adapter folded into a PromptSRC one.

Paper: MaPLe: Multi-modal Prompt Learning, arXiv 2210.03117.
Hardware and time: the demo preset takes a few minutes on 2 CPU cores (results: docs/methods/maple.md).
    python examples/train_maple.py                                           # bundled CLIP and icons, no network
    python examples/train_maple.py --model openai/clip-vit-base-patch16 --dataset <Hub id or folder> \
        --preset base_to_new --template "a photo of a {}."                   # the paper's settings

Everything is written below --output_dir: metrics.json, table.md, results.png, and per run the adapter with its own
reports.
"""

from functools import partial
from pathlib import Path

from peft import PeftModel
from transformers import CLIPModel

import peft_vlm
from peft_vlm.cli.console import add_console_flags, start_console
from peft_vlm.experiments.compare import TrainerLearner, chosen_settings, comparison_parser, run_comparison
from peft_vlm.files import last_part
from peft_vlm.methods.maple import fold, preset_for

ASSETS = Path(__file__).parent / "assets"

# Ours, for the bundled 48 px CLIP (6 vision and 4 text layers); the official presets are for ViT-B/16.
DEMO = {
    "config": {"num_text_tokens": 2, "depth": 3, "context_init": "a photo of a"},
    "training": {
        "learning_rate": 0.01,
        "num_train_epochs": 5,
        "warmup_epochs": 1,
        "warmup_learning_rate": 1e-4,
        "per_device_train_batch_size": 32,
    },
    "augmentation": {"scale": (0.9, 1.0), "flip_probability": 0.0},  # arrows and text must not be mirrored
}


def main() -> None:
    """Run the experiment, print where the results are, and fold the last adapter."""
    parser = comparison_parser(
        __doc__,
        model=ASSETS / "clip_student",
        dataset=ASSETS / "icons",
        presets=["demo", "base_to_new", "cross_dataset"],
        protocol="base_to_new",
        output_dir="outputs/maple",
    )
    add_console_flags(parser)
    args = parser.parse_args()
    start_console(args)
    settings = chosen_settings(args, DEMO, None if args.preset == "demo" else preset_for(args.preset))
    config = partial(peft_vlm.MaPLeConfig, **settings["config"])
    learner = TrainerLearner.on_prompts("maple", config, peft_vlm.MaPLeObjective, settings["training"])
    run_comparison(args, [learner], augmentation=settings["augmentation"])
    adapter = args.output_dir / last_part(args.dataset) / "maple" / f"seed{args.seeds[-1]}"
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(args.model), adapter)
    fold(model, args.output_dir / "folded")
    print(f"The last adapter without its projections: {args.output_dir / 'folded'}")


if __name__ == "__main__":
    main()
