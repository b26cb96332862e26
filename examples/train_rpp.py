"""RPP: pretrain prompts on thousands of classes, transfer them without training, start few-shot training from them.

Paper: Revisiting Prompt Pretraining of Vision-Language Models, arXiv 2409.06166; sampling of POMP, arXiv 2304.04704.
Hardware and time: the demo preset takes about ten minutes on 2 CPU cores (results: docs/methods/rpp.md).
    python examples/train_rpp.py                                             # bundled CLIPs and corpus, no network
    python examples/train_rpp.py --model openai/clip-vit-base-patch16 --teacher openai/clip-vit-large-patch14 \
        --preset imagenet21k --data <folder of shards> --class_names words.txt --images_per_class 16

Started again with the same --output_dir, an interrupted run continues. It writes pretrained/ (the adapter) and
metrics.json.
"""

import argparse
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model
from torch import nn
from transformers import CLIPModel, PrinterCallback, set_seed

from peft_vlm import RPPConfig, RPPObjective, VLMTrainer, VLMTrainingArguments
from peft_vlm.cli.console import add_console_flags, start_console
from peft_vlm.data import ImageClassificationDataset, load_image_dataset, load_image_stream, read_class_list
from peft_vlm.data.streaming import ImageStream
from peft_vlm.data.transforms import ImageTransform
from peft_vlm.distributed import is_main_process
from peft_vlm.evaluation import evaluate_classifier
from peft_vlm.experiments.compare import Experiment, Task, TrainerLearner, ZeroShot
from peft_vlm.files import write_json
from peft_vlm.methods.rpp import PRESETS

ASSETS = Path(__file__).parent / "assets"
TEMPLATE = "a photo of a {}."
TEST_SETS = ("icons", "emoji", "fashion")


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
    add_console_flags(parser)
    return parser.parse_args()


def settings_of(args: argparse.Namespace) -> dict[str, dict[str, Any]]:
    """The preset with the changes of the command line."""
    settings = {name: dict(part) for name, part in PRESETS[args.preset].items()}
    settings["config"] |= {"share_qkv": args.share_qkv, "slot_residual": args.slot_residual}
    changes = {"objective": ("soft_weight", "num_sampled_classes"), "training": ("max_steps", "seed")}
    for part, names in changes.items():
        settings[part] |= {name: getattr(args, name) for name in names if getattr(args, name) is not None}
    for part in ("training", "few_shot"):
        settings[part] |= {"use_cpu": args.use_cpu, "dataloader_num_workers": args.num_workers}
    return settings


def load_training_images(
    source: str,
    transform: ImageTransform,
    *,
    class_names: str | None = None,
    num_images: int | None = None,
    images_per_class: int | None = None,
    **options: Any,
) -> ImageClassificationDataset | ImageStream:
    """Images to pretrain on: a stream where a number of images is given, else a dataset."""
    options |= {"class_names": read_class_list(class_names) if class_names else None, "transform": transform}
    if num_images is None and images_per_class is None:
        return load_image_dataset(source, **options)
    return load_image_stream(source, num_images=num_images, images_per_class=images_per_class, **options)


def pretrain(
    model: nn.Module, objective: RPPObjective, images: Any, *, folder: Path, training: Mapping[str, Any]
) -> nn.Module:
    """Train into a folder, from its newest complete checkpoint if it has one; return the model for evaluation."""
    args = VLMTrainingArguments(output_dir=str(folder), **training)
    trainer = VLMTrainer(model, args, train_dataset=images, objective=objective)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint="auto")
    return model.eval()


def load_test_sets(experiment: Experiment) -> dict[str, ImageClassificationDataset]:
    """The bundled test images by name; nothing is trained on these datasets before the transfer is measured."""
    sets = {name: load_image_dataset(ASSETS / name, split="test") for name in TEST_SETS}
    return {name: images.with_transform(experiment.test_transform) for name, images in sets.items()}


def transfer(
    model: nn.Module, test_sets: Mapping[str, ImageClassificationDataset], experiment: Experiment
) -> dict[str, float]:
    """Accuracy in percent on each test set, without training on it, and the mean of them."""
    scores = {}
    for name, images in test_sets.items():
        prompts = experiment.prompts(images.class_names, TEMPLATE)
        scores[name] = evaluate_classifier(model, images, prompts).accuracy
    return scores | {"mean": sum(scores.values()) / len(scores)}


def few_shot(
    experiment: Experiment,
    source: str,
    *,
    adapter: Path,
    config: Mapping[str, Any],
    shots: Sequence[int],
    seeds: Sequence[int],
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """Train on a few images per class, at equal steps, from pretrained, word and random prompts of the same shape.

    Returns:
        By number of shots, by start: the columns of `Experiment.run`; `zero_shot` is the base model.
    """

    def fresh(**changes: Any) -> Callable[[nn.Module], nn.Module]:
        return lambda model: get_peft_model(model, RPPConfig(**{**config, **changes}))

    starts: dict[str, Callable[[nn.Module], nn.Module]] = {
        "rpp": lambda model: PeftModel.from_pretrained(model, adapter, is_trainable=True),
        "words": fresh(),
        "random": fresh(context_init=None),
    }
    learners = [
        TrainerLearner(
            name, wrap, lambda prompts, seed: RPPObjective(prompts, soft_weight=0, seed=seed), dict(training)
        )
        for name, wrap in starts.items()
    ]
    train, test = (load_image_dataset(source, split=split) for split in ("train", "test"))
    dataset = Path(source).name
    tasks = [Task(f"{dataset}_{count}_shots", "few_shot", train, test, TEMPLATE, shots=count) for count in shots]
    report = experiment.run(tasks, [ZeroShot(), *learners], seeds)
    by_task = {report["task"]: {"methods": report["methods"]}} | report["tasks"]
    return {str(count): by_task[task.name]["methods"] for count, task in zip(shots, tasks, strict=True)}


def pretrained_model(args: argparse.Namespace, settings: dict[str, Any], experiment: Experiment) -> nn.Module:
    """The model with its pretrained prompts; trains them, or continues an interrupted training."""
    names = ("class_names", "num_images", "images_per_class", "image_column", "label_column", "seed")
    options = {name: getattr(args, name) for name in names}
    images = load_training_images(args.data, experiment.train_transform, **options)
    prompts = experiment.prompts(images.class_names, TEMPLATE)
    teacher = CLIPModel.from_pretrained(args.teacher) if settings["objective"]["soft_weight"] else None
    objective = RPPObjective(prompts, teacher=teacher, seed=args.seed, **settings["objective"])
    set_seed(args.seed)  # vision prompts start from random values
    model = get_peft_model(experiment.load_model(), RPPConfig(**settings["config"]))
    return pretrain(model, objective, images, folder=args.output_dir / "pretrained", training=settings["training"])


def main() -> None:
    """Pretrain, transfer, compare the starts of few-shot training, and write the report."""
    args = parse_arguments()
    start_console(args)
    settings = settings_of(args)
    experiment = Experiment.for_clip(
        args.model,
        augmentation=settings["augmentation"],
        output_dir=args.output_dir / "few_shot",
        use_cpu=args.use_cpu,
        text_model=args.teacher,
    )
    model, test_sets = pretrained_model(args, settings, experiment), load_test_sets(experiment)
    report: dict[str, Any] = {"settings": settings, "seeds": args.seeds}
    base = experiment.load_model().to(model.device).eval()
    compared = {"zero_shot": base, "rpp": model}
    report["transfer"] = {name: transfer(one, test_sets, experiment) for name, one in compared.items()}
    write_report(args.output_dir, report)
    if args.shots:
        report["few_shot"] = few_shot(
            experiment,
            args.few_shot_data,
            adapter=args.output_dir / "pretrained",
            config=settings["config"],
            shots=args.shots,
            seeds=args.seeds,
            training=settings["few_shot"],
        )
        write_report(args.output_dir, report)
    if is_main_process():
        for name, scores in report["transfer"].items():
            print(f"{name}: " + ", ".join(f"{key} {value:.1f} %" for key, value in scores.items()))
        print(f"Written to {args.output_dir}/: metrics.json and the adapter in pretrained/. Use it:")
        print(f"    peft-vlm predict {str(args.output_dir / 'pretrained')!r} photo.png")


def write_report(folder: Path, report: dict[str, Any]) -> None:
    """Write metrics.json, from one process."""
    if is_main_process():
        write_json(folder / "metrics.json", report)


if __name__ == "__main__":
    main()
