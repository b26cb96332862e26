"""Prompts pretrained on many classes: train once, transfer without training, and start few-shot training from them."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from torch import nn
from transformers import PrinterCallback

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.loading import load_image_dataset, read_class_list
from peft_vlm.data.streaming import ImageStream, load_image_stream
from peft_vlm.data.transforms import ImageTransform
from peft_vlm.evaluation.classify import evaluate_classifier
from peft_vlm.experiments.compare import Experiment, Task, TrainerLearner, ZeroShot
from peft_vlm.objective import Objective
from peft_vlm.text.prompts import ClassPrompts
from peft_vlm.training.arguments import VLMTrainingArguments
from peft_vlm.training.trainer import VLMTrainer


def load_pretraining_images(
    source: str,
    transform: ImageTransform,
    *,
    class_names: str | None = None,
    num_images: int | None = None,
    images_per_class: int | None = None,
    image_column: str = "image",
    label_column: str = "label",
    seed: int = 0,
) -> ImageClassificationDataset | ImageStream:
    """Training images: a stream where one of the numbers of images is given, else a dataset.

    Args:
        source: Folder, shards or Hub id.
        transform: Makes the pixels.
        class_names: File with class names; None: those of the source.
        num_images: Images per epoch of a stream; None with `images_per_class`: counted.
        images_per_class: Balanced sampling of a stream: most images of a class per epoch.
        image_column: Column of the image.
        label_column: Column of the label.
        seed: Seed of order and augmentation.
    """
    names = None if class_names is None else read_class_list(class_names)
    shared: dict[str, Any] = {"class_names": names, "transform": transform}
    shared |= {"image_column": image_column, "label_column": label_column, "seed": seed}
    if num_images is None and images_per_class is None:
        return load_image_dataset(source, **shared)
    return load_image_stream(source, num_images=num_images, images_per_class=images_per_class, **shared)


def pretrain(
    model: nn.Module, objective: Objective, dataset: Any, *, folder: Path, training: Mapping[str, Any]
) -> nn.Module:
    """Train into a folder, and go on from its newest whole checkpoint when it was interrupted.

    Args:
        model: `PeftModel` with the prompts.
        objective: Its objective.
        dataset: Training images, a dataset or a stream.
        folder: Output of the run.
        training: Keyword arguments of `VLMTrainingArguments`.

    Returns:
        The trained model in evaluation mode; that of the folder when the run had finished before.
    """
    args = VLMTrainingArguments(output_dir=str(folder), **training)
    trainer = VLMTrainer(model, objective, args, train_dataset=dataset)
    trainer.remove_callback(PrinterCallback)
    trainer.train(resume_from_checkpoint="auto")
    return model.eval()


@dataclass(frozen=True)
class Target:
    """A dataset that prompts are transferred to.

    Args:
        name: Name in the report.
        dataset: Test images with a transform.
        template: Text around a class name.
    """

    name: str
    dataset: ImageClassificationDataset
    template: str


def load_targets(sources: Mapping[str, Mapping[str, str]], experiment: Experiment) -> list[Target]:
    """Test sets of a transfer.

    Args:
        sources: By name: `path` and `template`, and optionally the `split` ("test").
        experiment: Its test transform prepares the images.
    """
    targets = []
    for name, entry in sources.items():
        images = load_image_dataset(entry["path"], split=entry.get("split", "test"))
        targets.append(Target(name, images.with_transform(experiment.test_transform), entry["template"]))
    return targets


def transfer(model: nn.Module, targets: Sequence[Target], experiment: Experiment) -> dict[str, float]:
    """Accuracy in percent on each target without any training there, and their mean.

    Args:
        model: CLIP with or without prompts.
        targets: Test sets.
        experiment: Makes the class prompts.
    """
    scores = {}
    for target in targets:
        prompts = experiment.prompts(target.dataset.class_names, target.template)
        scores[target.name] = evaluate_classifier(model, target.dataset, prompts).accuracy
    return scores | {"mean": sum(scores.values()) / len(scores)}


@dataclass(frozen=True)
class Start:
    """Prompts that few-shot training starts from.

    Args:
        name: Name in the report.
        wrap: Puts them onto a fresh base model, trainable.
    """

    name: str
    wrap: Callable[[nn.Module], nn.Module]


def loaded(adapter: Path) -> Callable[[nn.Module], nn.Module]:
    """Puts a saved adapter onto a model, trainable.

    Args:
        adapter: Its folder.
    """
    return lambda model: PeftModel.from_pretrained(model, adapter, is_trainable=True)


def few_shot(
    experiment: Experiment,
    starts: Sequence[Start],
    objective: Callable[[ClassPrompts, int], Objective],
    *,
    source: str,
    template: str,
    shots: Sequence[int],
    seeds: Sequence[int],
    training: Mapping[str, Any],
) -> dict[str, Any]:
    """Train on a few images of every class from different starts, at equal steps.

    Args:
        experiment: Model, transforms and output folder.
        starts: What is compared.
        objective: Builds the objective from class prompts and a seed.
        source: Dataset with the splits `train` and `test`.
        template: Text around a class name.
        shots: Images per class, one task each.
        seeds: Seeds of shots and order.
        training: Keyword arguments of `VLMTrainingArguments`.

    Returns:
        By number of shots, by start: the columns of `Experiment.run`; `zero_shot` is the base model.
    """
    train, test = (load_image_dataset(source, split=split) for split in ("train", "test"))
    name = Path(source).name
    tasks = [Task(f"{name}_{count}_shots", "few_shot", train, test, template, shots=count) for count in shots]
    learners = [TrainerLearner(start.name, start.wrap, objective, dict(training)) for start in starts]
    report = experiment.run(tasks, [ZeroShot(), *learners], seeds)
    by_task = {report["task"]: {"methods": report["methods"]}} | report["tasks"]
    return {str(count): by_task[task.name]["methods"] for count, task in zip(shots, tasks, strict=True)}


def mean_and_spread(values: Sequence[float]) -> dict[str, float]:
    """Mean and standard deviation over seeds.

    Args:
        values: One value per seed.
    """
    numbers = torch.tensor(values, dtype=torch.float64)
    return {"mean": float(numbers.mean()), "std": float(numbers.std()) if len(values) > 1 else 0.0}
