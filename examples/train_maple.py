"""MaPLe against zero-shot: base-to-new, several seeds; and the last adapter folded into a PromptSRC one.

Paper: MaPLe: Multi-modal Prompt Learning, arXiv 2210.03117.
Hardware and time: the demo preset takes a few minutes on 2 CPU cores (results: docs/methods/maple.md).
    python examples/train_maple.py                                           # bundled CLIP and icons, no network
    python examples/train_maple.py --model openai/clip-vit-base-patch16 --dataset <Hub id or folder> \
        --preset base_to_new --template "a photo of a {}."                   # the paper's settings

Everything is written below --output_dir: metrics.json, table.md, results.png, and per run the adapter with its own
reports.
"""

import argparse
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from transformers import CLIPModel

import peft_vlm
from peft_vlm.cli.console import add_console_flags, start_console
from peft_vlm.experiments.compare import Experiment, TrainerLearner, ZeroShot, load_task
from peft_vlm.experiments.report import show_results
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


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "clip_student"), help="CLIP: folder or Hub id")
    parser.add_argument("--dataset", default=str(ASSETS / "icons"), help="folder, CSV or Hub id with image and label")
    parser.add_argument("--template", default="a photo of a {}.", help="text around a class name, with one {}")
    parser.add_argument("--preset", choices=["demo", "base_to_new", "cross_dataset"], default="demo")
    parser.add_argument("--protocol", choices=["base_to_new", "few_shot"], default="base_to_new")
    parser.add_argument("--shots", type=int, default=16, help="images per class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, help="instead of the preset's number")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/maple"))
    add_console_flags(parser)
    return parser.parse_args()


def main() -> None:
    """Run the experiment, print where the results are, and fold the last adapter."""
    args = parse_arguments()
    start_console(args)
    settings: dict[str, Any] = DEMO
    if args.preset != "demo":
        preset = preset_for(args.preset)
        augmentation = {"scale": (0.08, 1.0), "flip_probability": 0.5}
        settings = {"config": preset.config, "training": preset.training, "augmentation": augmentation}
    training = settings["training"] | {"use_cpu": args.use_cpu, "dataloader_num_workers": args.num_workers}
    training |= {} if args.epochs is None else {"num_train_epochs": args.epochs}
    learner = TrainerLearner(
        "maple",
        wrap=lambda model: get_peft_model(model, peft_vlm.MaPLeConfig(**settings["config"])),
        objective=lambda prompts, seed: peft_vlm.MaPLeObjective(prompts),
        training=training,
    )
    experiment = Experiment.for_clip(
        args.model, augmentation=settings["augmentation"], output_dir=args.output_dir, use_cpu=args.use_cpu
    )
    task = load_task(args.dataset, args.protocol, template=args.template, shots=args.shots)
    report = experiment.run([task], [ZeroShot(), learner], args.seeds)
    show_results(report, args.output_dir, learner="maple")
    adapter = args.output_dir / last_part(args.dataset) / "maple" / f"seed{args.seeds[-1]}"
    model = PeftModel.from_pretrained(CLIPModel.from_pretrained(args.model), adapter)
    fold(model, args.output_dir / "folded")
    print(f"The last adapter without its projections: {args.output_dir / 'folded'}")


if __name__ == "__main__":
    main()
