"""A transferable visual prompt: trained on one multimodal model, tested on models it never saw.

Paper: Exploring the Transferability of Visual Prompting for Multimodal Large Language Models, arXiv 2404.11207.
Hardware and time: the demo preset takes about 10 minutes on 2 CPU cores (results: docs/methods/tvp.md).
    accelerate launch --cpu examples/train_tvp.py                             # bundled models and images, no network
    accelerate launch --cpu examples/train_tvp.py --domain fashion            # the other domain (tvp_domains.py)
    accelerate launch examples/train_tvp.py                                   # one GPU
    accelerate launch --multi_gpu --num_processes 4 examples/train_tvp.py     # several GPUs
    accelerate launch examples/train_tvp.py --preset official --models llava-hf/llava-1.5-7b-hf \
        Salesforce/blip2-opt-2.7b --clip openai/clip-vit-base-patch32 --dataset <Hub id or folder> --dtype bfloat16

The default domain is colours under warm light (tvp_domains.py), where all bundled models fail. The prompt is trained
on the first model, or on --sources, with and without its two extra losses (FCA, TSE). Below --output_dir:
metrics.json, table.md, plots, and per run the adapter with its reports.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model
from transformers import AutoModel, AutoProcessor, BitsAndBytesConfig

from peft_vlm import TVPConfig, TVPObjective
from peft_vlm.cli.console import add_console_flags, start_console
from peft_vlm.data import ImageQuestionDataset, RandomCrop, few_shot, load_image_dataset
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.distributed import is_main_process
from peft_vlm.evaluation.mllm import likelihood_accuracy
from peft_vlm.experiments.transfer import ImageTextModel, TransferExperiment, Variant, write_transfer_results
from peft_vlm.methods.tvp import ClipGuide, Source
from peft_vlm.text.prompts import tokenize_for_model
from tvp_domains import DOMAINS, load_domain

ASSETS = Path(__file__).parent / "assets"
MODELS = [str(ASSETS / f"mllm_{family}") for family in ("llava", "idefics3", "paligemma")]

# "demo" is ours, for the bundled 48 to 64 px models; "official" is the paper's recipe for CIFAR-10.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "prompt": {"shape": "full", "canvas_size": 2, "border": 0, "shrink": "none"},
        "objective": {"fca_weight": 0.005, "tse_weight": 0.001},
        "training": {"learning_rate": 0.3, "num_train_epochs": 2, "per_device_train_batch_size": 8},
        "crop": None,
    },
    "official": {
        "prompt": {},
        "objective": {"fca_weight": 0.005, "tse_weight": 0.001},
        "training": {"learning_rate": 10.0, "num_train_epochs": 1, "per_device_train_batch_size": 16},
        "crop": {"scale": (0.5, 1.0), "flip_probability": 0.5},
    },
}
VARIANTS = {
    "tvp": {},
    "no_fca": {"fca_weight": 0.0},
    "no_tse": {"tse_weight": 0.0},
    "visual_prompting": {"fca_weight": 0.0, "tse_weight": 0.0},
}


def parse_arguments(words: Sequence[str] | None = None) -> argparse.Namespace:
    """Command line, or the words given."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", nargs="+", default=MODELS, help="folders or Hub ids of image-text models")
    parser.add_argument("--sources", nargs="+", help="names of the models to train on; the first of --models if left")
    parser.add_argument("--clip", default=str(ASSETS / "clip_teacher"), help="CLIP of the TSE loss")
    parser.add_argument("--domain", choices=sorted(DOMAINS), default="lamplight", help="bundled images and question")
    parser.add_argument("--dataset", help="folder, CSV or Hub id of labelled images, instead of --domain")
    parser.add_argument("--question", default="what is this?", help="asked about every image of --dataset")
    parser.add_argument("--preset", choices=sorted(PRESETS), default="demo")
    parser.add_argument("--variants", nargs="+", choices=sorted(VARIANTS), default=list(VARIANTS))
    parser.add_argument("--shots", type=int, default=32, help="training images per class")
    parser.add_argument("--test_images", type=int, default=220, help="test images, the first ones of a fixed shuffle")
    parser.add_argument("--split", default="test", help="split to measure on; choose settings on 'val'")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, help="instead of the preset's number")
    parser.add_argument("--learning_rate", type=float, help="instead of the preset's, in pixel units of [0, 1]")
    parser.add_argument("--eval_batch_size", type=int, default=32, help="images per batch of evaluation")
    parser.add_argument("--dtype", default="float32", help="dtype of the frozen models, such as bfloat16")
    parser.add_argument("--load_in_4bit", action="store_true", help="frozen models in 4 bits; needs bitsandbytes")
    parser.add_argument("--device_map", help="'auto': parts of the models on all GPUs and in memory; one process")
    parser.add_argument("--gradient_checkpointing", action="store_true", help="recompute activations; saves memory")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--output_dir", type=Path, default=Path("outputs/tvp"))
    add_console_flags(parser)
    return parser.parse_args(words)


def load_models(args: argparse.Namespace, clip_processor: Any) -> list[ImageTextModel]:
    """All models, in 4 bits and in several places where asked for."""
    options: dict[str, Any] = {"dtype": args.dtype, "clip_processor": clip_processor.image_processor}
    if args.device_map is not None:
        options["device_map"] = args.device_map
    if args.load_in_4bit:
        settings = {"bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": args.dtype}
        options["quantization_config"] = BitsAndBytesConfig(load_in_4bit=True, **settings)
    return [ImageTextModel.load(name, **options) for name in args.models]


def load_data(args: argparse.Namespace) -> tuple[ImageClassificationDataset, ImageClassificationDataset, str]:
    """Training pool, held-out images, and the question."""
    if args.dataset is None:
        pool, test = (load_domain(args.domain, split=split) for split in ("train", args.split))
        return pool, test, DOMAINS[args.domain]
    pool, test = (load_image_dataset(args.dataset, split=split) for split in ("train", args.split))
    return pool, test, args.question


def experiment_of(args: argparse.Namespace, preset: dict[str, Any], training: dict[str, Any]) -> TransferExperiment:
    """Models, data and settings in one."""
    pool, test, question = load_data(args)
    order = torch.randperm(len(test), generator=torch.Generator().manual_seed(0))
    test = test.select(sorted(order[: args.test_images].tolist()))
    clip_processor = AutoProcessor.from_pretrained(args.clip)
    models = load_models(args, clip_processor)

    def train(seed: int) -> ImageQuestionDataset:
        shots = few_shot(pool, shots=args.shots, seed=seed)
        crop = RandomCrop(**preset["crop"]) if preset["crop"] else None
        return ImageQuestionDataset.from_images(shots, question=question, augmentation=crop)

    clip = AutoModel.from_pretrained(args.clip)
    template = "this is a photo of a {}"
    class_prompts = tokenize_for_model(clip, clip_processor.tokenizer, pool.class_names, template=template)
    guide = ClipGuide(clip, class_prompts, processor=clip_processor.image_processor)

    def objective(variant: Variant, questions: Any, candidates: Any, others: Any) -> TVPObjective:
        sources = [Source(m.model, questions.with_collator(m.collator), m.collator.processor) for m in others]
        settings = preset["objective"] | variant.objective
        return TVPObjective(candidates, tse_clip=guide, sources=sources, **settings)

    def wrap(member: ImageTextModel) -> Any:
        return get_peft_model(member.model, TVPConfig.for_processor(member.collator.processor, **preset["prompt"]))

    return TransferExperiment(
        models,
        train=train,
        test=ImageQuestionDataset.from_images(test, question=question),
        output_dir=args.output_dir,
        wrap=wrap,
        objective=objective,
        training=training,
        include_end=True,
        score=lambda m, d: likelihood_accuracy(m, d, include_end=True, batch_size=args.eval_batch_size),
        task=f"{Path(args.dataset or args.domain).name}, {len(pool.class_names)} classes, {len(test)} test images",
    )


def main() -> None:
    """Run the experiment and print where the results are."""
    args = parse_arguments()
    start_console(args)
    preset = PRESETS[args.preset]
    training = {**preset["training"], "use_cpu": args.use_cpu, "warmup_epochs": 0}
    training |= {"activation_checkpointing": True} if args.gradient_checkpointing else {}
    chosen = {"num_train_epochs": args.epochs, "learning_rate": args.learning_rate}
    training |= {name: value for name, value in chosen.items() if value is not None}
    variants = [Variant(name, VARIANTS[name], tuple(args.sources or ())) for name in args.variants]
    reports = experiment_of(args, preset, training).run(variants, args.seeds)
    if is_main_process():
        tables = write_transfer_results(reports, args.output_dir)
        print(
            f"\n{tables}\n\nWritten to {args.output_dir}/: metrics.json, table.md, results_*.png; per run the adapter,"
        )
        print("prompt.png and transfer.json. Use one: PeftModel.from_pretrained(model, folder)")


if __name__ == "__main__":
    main()
