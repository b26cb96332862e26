"""Several methods, seeds and tasks in one run: train, evaluate, table, plot, `metrics.json`.

The harness knows no method by name. A `Learner` is given a fresh model, a function that makes class prompts, and the
images of a seed, and gives back something that classifies; time and memory are measured around its training alone,
caching included.
"""

import logging
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import nn
from tqdm.auto import tqdm
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, set_seed

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.loading import load_image_dataset
from peft_vlm.data.splits import base_and_new_classes, few_shot
from peft_vlm.data.transforms import EvalTransform, ImageTransform, TrainTransform
from peft_vlm.distributed import is_main_process, local_index
from peft_vlm.evaluation.metrics import harmonic_mean
from peft_vlm.files import write_json
from peft_vlm.learners import Learner, Split
from peft_vlm.text.prompts import ClassPrompts, check_same_vocabulary, tokenize_classes
from peft_vlm.training.memory import PeakMemory

logger = logging.getLogger(__name__)


@dataclass(frozen=True)
class Task:
    """A dataset under a protocol.

    Args:
        name: Name in the report.
        protocol: `"base_to_new"`: train on the first half of the classes, test both halves with their own names.
            `"few_shot"`: train and test on all classes.
        train: Pool that the shots are drawn from.
        test: Test images; never seen in training.
        template: Text around a class name.
        shots: Images per class; classes with fewer give all they have.
    """

    name: str
    protocol: Literal["base_to_new", "few_shot"]
    train: ImageClassificationDataset
    test: ImageClassificationDataset
    template: str
    shots: int = 16

    @property
    def seen_classes(self) -> tuple[str, ...]:
        """The classes whose images come with labels: the first half in base-to-new, else all."""
        names = self.train.class_names
        return tuple(names[i] for i in base_and_new_classes(len(names))[0]) if self.protocol != "few_shot" else names


def load_task(source: str | Path, protocol: Literal["base_to_new", "few_shot"], *, template: str, shots: int) -> Task:
    """A task on the splits `train` and `test` of a dataset, called like the last part of its path or id.

    Args:
        source: What `load_image_dataset` reads: a folder, a CSV or a Hub id.
        protocol: `"base_to_new"` or `"few_shot"`.
        template: Text around a class name.
        shots: Images per class.
    """
    train, test = (load_image_dataset(str(source), split=split) for split in ("train", "test"))
    return Task(Path(source).name, protocol, train, test, template=template, shots=shots)


def split_of(task: Task, *, seed: int, train_transform: ImageTransform, test_transform: ImageTransform) -> Split:
    """Draw the shots of one seed. The halves of the classes do not depend on the seed.

    Args:
        task: Dataset and protocol.
        seed: Seed of the shots.
        train_transform: Augmentation.
        test_transform: Preparation of test images.
    """
    pool = task.train.with_transform(train_transform)
    pool.seed = seed
    train = few_shot(pool, shots=task.shots, seed=seed)
    test = task.test.with_transform(test_transform)
    if task.protocol == "few_shot":
        return Split(train, pool, {"accuracy": test})
    base, new = base_and_new_classes(len(task.train.class_names))
    return Split(train.restrict(base), pool, {"base": test.restrict(base), "new": test.restrict(new)})


@dataclass
class Experiment:
    """Tasks x learners x seeds.

    Args:
        load_model: Gives a fresh base model.
        tokenizer: Tokenizer of the model.
        max_length: Longest text of the model, in tokens.
        train_transform: Augmentation.
        test_transform: Preparation of test images.
        output_dir: Folder of everything that is written.
        device: Where models run; None takes a GPU if there is one.
    """

    load_model: Callable[[], nn.Module]
    tokenizer: Any
    max_length: int
    train_transform: ImageTransform
    test_transform: ImageTransform
    output_dir: Path
    device: str | None = None

    @classmethod
    def for_clip(
        cls,
        model: str,
        *,
        augmentation: dict[str, Any],
        output_dir: Path,
        use_cpu: bool = False,
        text_model: str | None = None,
    ) -> "Experiment":
        """An experiment on a CLIP with its own tokenizer and image processor.

        Args:
            model: Folder or Hub id.
            augmentation: Keyword arguments of `TrainTransform`.
            output_dir: Folder of everything that is written.
            use_cpu: Do not use a GPU.
            text_model: A second CLIP that reads the same class prompts, for example a teacher. Its vocabulary must be
                that of `model`; the shorter of both text lengths counts.
        """
        processor, tokenizer = AutoImageProcessor.from_pretrained(model), AutoTokenizer.from_pretrained(model)
        if text_model is not None:
            check_same_vocabulary(tokenizer, AutoTokenizer.from_pretrained(text_model))
        configs = [CLIPModel.config_class.from_pretrained(name) for name in (model, text_model) if name is not None]
        return cls(
            load_model=lambda: CLIPModel.from_pretrained(model),
            tokenizer=tokenizer,
            max_length=min(config.text_config.max_position_embeddings for config in configs),
            train_transform=TrainTransform(processor, **augmentation),
            test_transform=EvalTransform(processor),
            output_dir=output_dir,
            device="cpu" if use_cpu else None,
        )

    def run(self, tasks: Sequence[Task], learners: Sequence[Learner], seeds: Sequence[int]) -> dict[str, Any]:
        """Run everything and write `metrics.json` after each task.

        Args:
            tasks: The first one's results stand at the top level of the report.
            learners: Rows of the tables.
            seeds: Seeds of shots and training order.

        Returns:
            `{"seeds": [...], "methods": {...}, "tasks": {name: {"methods": {...}}}}`; scores in percent per seed.
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)
        report: dict[str, Any] = {"seeds": list(seeds), "methods": {}, "tasks": {}}
        total = len(tasks) * len(learners) * len(seeds)
        progress = tqdm(total=total, unit="run", disable=not is_main_process())
        for position, task in enumerate(tasks):
            methods: dict[str, Any] = {}
            known: dict[str, dict[str, Any]] = {}
            for seed in seeds:  # seeds outside: a drift of the machine hits all learners alike
                split = split_of(
                    task, seed=seed, train_transform=self.train_transform, test_transform=self.test_transform
                )
                for learner in learners:
                    progress.set_description(f"{task.name}: {learner.name}, seed {seed}")
                    if learner.uses_seed or learner.name not in known:
                        known[learner.name] = self.run_one(task, split, learner, seed)
                    _append(methods.setdefault(learner.name, {}), known[learner.name])
                    progress.update()
            if position == 0:
                report |= {"task": task.name, "methods": methods}
            else:
                report["tasks"][task.name] = {"methods": methods}
            if is_main_process():
                write_json(self.output_dir / "metrics.json", report)
        progress.close()
        return report

    def run_one(self, task: Task, split: Split, learner: Learner, seed: int) -> dict[str, Any]:
        """Train and evaluate one learner once.

        Args:
            task: Dataset and protocol.
            split: Images of this seed.
            learner: What is trained.
            seed: Seed of the training.

        Returns:
            Scores in percent, seconds, peak memory in MB above the loaded model, number of trained parameters.
        """
        set_seed(seed)
        model = (learner.load_model or self.load_model)()
        model = model.to(self.device or (f"cuda:{local_index()}" if torch.cuda.is_available() else "cpu"))

        def prompts(class_names: Sequence[str], template: str | None = None) -> ClassPrompts:
            return self.prompts(class_names, template or task.template)

        peak = PeakMemory(next(model.parameters()).device)
        peak.start()
        started = time.perf_counter()
        folder = self.output_dir / task.name / learner.name / f"seed{seed}"
        fitted = learner.fit(model, prompts, split, seed=seed, folder=folder)
        seconds, memory = time.perf_counter() - started, peak.stop()
        row: dict[str, Any] = {
            name: fitted.accuracy(dataset, prompts(dataset.class_names, fitted.template))
            for name, dataset in split.tests.items()
        }
        if "new" in row:
            row["h"] = None if row["new"] is None else harmonic_mean(row["base"], row["new"])
        trained = fitted.trainable_parameters > 0
        return row | {
            "seconds": seconds if trained else 0.0,
            "peak_memory_mb": memory if trained else 0.0,
            "trainable_parameters": fitted.trainable_parameters,
            "transductive": getattr(learner, "on_pool", False),
        }

    def prompts(self, class_names: Sequence[str], template: str | Sequence[str]) -> ClassPrompts:
        """Tokenised prompts of a class list."""
        return tokenize_classes(self.tokenizer, class_names, template=template, max_length=self.max_length)


def _append(columns: dict[str, Any], row: dict[str, Any]) -> None:
    """Add one seed's row; a column without any value becomes null, the parameter count stays a single number."""
    for key, value in row.items():
        if key in ("trainable_parameters", "transductive") or (value is None and key not in columns):
            columns[key] = value
        elif value is not None:
            columns.setdefault(key, []).append(value)
