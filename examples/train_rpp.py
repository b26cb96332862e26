"""RPP: pretrain prompts on thousands of classes, transfer them without training, start few-shot training from them.

Paper: Revisiting Prompt Pretraining of Vision-Language Models, arXiv 2409.06166; sampling of POMP, arXiv 2304.04704.
Hardware and time: the demo preset takes about ten minutes on 2 CPU cores (numbers: docs/methods/rpp.md).
    python examples/train_rpp.py                                             # bundled CLIPs and corpus, no network
    python examples/train_rpp.py --model openai/clip-vit-base-patch16 --teacher openai/clip-vit-large-patch14 \
        --preset imagenet21k --data <folder of shards> --class_names words.txt --images_per_class 16

Started again with the same --output_dir, an interrupted run goes on. It writes pretrained/ (the adapter) and
metrics.json.
"""

import argparse
import logging
from pathlib import Path
from typing import Any

from peft import get_peft_model
from transformers import CLIPModel, set_seed

import peft_vlm
from peft_vlm.distributed import is_main_process
from peft_vlm.experiments.compare import Experiment
from peft_vlm.files import write_json
from peft_vlm.methods.rpp import PRESETS
from peft_vlm.pretraining_experiment import (
    Start,
    few_shot,
    load_pretraining_images,
    load_targets,
    loaded,
    pretrain,
    transfer,
)

ASSETS = Path(__file__).parent / "assets"
TEMPLATE = "a photo of a {}."
TARGETS = {name: {"path": str(ASSETS / name), "template": TEMPLATE} for name in ("icons", "emoji", "fashion")}


def parse_arguments() -> argparse.Namespace:
    """Command line."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(ASSETS / "clip_student"), help="CLIP: folder or Hub id")
    parser.add_argument("--teacher", default=str(ASSETS / "clip_teacher"), help="CLIP that gives the soft labels")
    parser.add_argument("--data", default=str(ASSETS / "pretraining"), help="folder, shards or Hub id")
    parser.add_argument("--class_names", help="file with a name per line, or WordNet-like; default: those of the data")
    parser.add_argument("--image_column", default="image", help="column of the image; 'jpg' in webdataset shards")
    parser.add_argument("--label_column", default="label", help="column of the label; 'cls' in webdataset shards")
    parser.add_argument("--num_images", type=int, help="read the data as a stream with about this many images")
    parser.add_argument("--images_per_class", type=int, help="or with at most this many of each class")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument("--share_qkv", choices=["none", "all"], default="none")
    parser.add_argument("--slot_residual", choices=["stream", "replaced"], default="stream")
    parser.add_argument("--soft_weight", type=float, help="0: hard labels alone, 1: soft labels alone")
    parser.add_argument("--num_sampled_classes", type=int, help="classes per step")
    parser.add_argument("--max_steps", type=int, help="steps of the pretraining")
    parser.add_argument("--few_shot_data", default=str(ASSETS / "emoji"), help="dataset of the few-shot comparison")
    parser.add_argument("--shots", type=int, nargs="*", default=[1, 2, 4, 8, 16])
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--seed", type=int, default=0, help="seed of the pretraining")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/rpp"))
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The preset with what the command line changes."""
    settings = {name: dict(part) for name, part in PRESETS[args.preset].items()}
    settings["config"] |= {"share_qkv": args.share_qkv, "slot_residual": args.slot_residual}
    changes = {"objective": ("soft_weight", "num_sampled_classes"), "training": ("max_steps", "seed")}
    for part, names in changes.items():
        settings[part] |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for part in ("training", "few_shot"):
        settings[part] |= {"use_cpu": args.use_cpu, "dataloader_num_workers": args.num_workers}
    return settings


def pretrained(args: argparse.Namespace, settings: dict[str, Any], experiment: Experiment) -> Any:
    """The model with its pretrained prompts; trains them, or goes on."""
    names = ("class_names", "num_images", "images_per_class", "image_column", "label_column", "seed")
    options = {name: getattr(args, name) for name in names}
    images = load_pretraining_images(args.data, experiment.train_transform, **options)
    prompts = experiment.prompts(images.class_names, TEMPLATE)
    teacher = CLIPModel.from_pretrained(args.teacher) if settings["objective"]["soft_weight"] else None
    objective = peft_vlm.RPPObjective(prompts, teacher=teacher, seed=args.seed, **settings["objective"])
    set_seed(args.seed)  # vision prompts start from random numbers
    model = get_peft_model(experiment.load_model(), peft_vlm.RPPConfig(**settings["config"]))
    return pretrain(model, objective, images, folder=args.output_dir / "pretrained", training=settings["training"])


def compare_starts(args: argparse.Namespace, settings: dict[str, Any], experiment: Experiment) -> dict[str, Any]:
    """Few-shot training from pretrained, word and random prompts of the same shape."""

    def fresh(**changes: Any) -> Any:
        config = settings["config"] | changes
        return lambda model: get_peft_model(model, peft_vlm.RPPConfig(**config))

    starts = {"rpp": loaded(args.output_dir / "pretrained"), "words": fresh(), "random": fresh(context_init=None)}
    return few_shot(
        experiment,
        [Start(name, wrap) for name, wrap in starts.items()],
        lambda prompts, seed: peft_vlm.RPPObjective(prompts, soft_weight=0, seed=seed),
        source=args.few_shot_data,
        template=TEMPLATE,
        shots=args.shots,
        seeds=args.seeds,
        training=settings["few_shot"],
    )


def main() -> None:
    """Pretrain, transfer, compare starts, and write what came out."""
    args = parse_arguments()
    logging.basicConfig(level=logging.WARNING, format="%(message)s")
    settings = settings_of(args)
    experiment = Experiment.for_clip(
        args.model,
        augmentation=settings["augmentation"],
        output_dir=args.output_dir / "few_shot",
        use_cpu=args.use_cpu,
        text_model=args.teacher,
    )
    model, targets = pretrained(args, settings, experiment), load_targets(TARGETS, experiment)
    report: dict[str, Any] = {"settings": settings, "seeds": args.seeds}
    base = experiment.load_model().to(model.device).eval()
    compared = {"zero_shot": base, "rpp": model}
    report["transfer"] = {name: transfer(one, targets, experiment) for name, one in compared.items()}
    write_report(args.output_dir, report)
    if args.shots:
        report["few_shot"] = compare_starts(args, settings, experiment)
        write_report(args.output_dir, report)
    if is_main_process():
        for name, scores in report["transfer"].items():
            print(f"{name}: " + ", ".join(f"{key} {value:.1f} %" for key, value in scores.items()))
        print(f"Written to {args.output_dir}/: metrics.json and the adapter in pretrained/. Use it:")
        print(f"    peft-vlm predict {str(args.output_dir / 'pretrained')!r} picture.png")


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write metrics.json, from one process."""
    if is_main_process():
        write_json(folder / "metrics.json", report)


if __name__ == "__main__":
    main()
