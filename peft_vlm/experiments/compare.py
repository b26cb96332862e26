"""Methods x seeds on a task: train, evaluate, compare; with full fine-tuning and a linear probe as baselines."""

import argparse
import time
from collections.abc import Callable, Mapping, Sequence
from copy import deepcopy
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from peft import PeftConfig, get_peft_model
from torch import Tensor, nn
from transformers import AutoImageProcessor, AutoTokenizer, CLIPModel, PrinterCallback, set_seed

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.feature_store import all_image_features
from peft_vlm.data.loading import load_image_dataset
from peft_vlm.data.splits import base_and_new_classes, check_not_trained_on, few_shot, image_sample
from peft_vlm.data.transforms import EvalTransform, ImageTransform, TrainTransform
from peft_vlm.distributed import is_main_process, local_index, progress_bar
from peft_vlm.errors import PeftVLMError, check_list
from peft_vlm.evaluation.classify import evaluate_classifier
from peft_vlm.evaluation.metrics import harmonic_mean
from peft_vlm.experiments.report import PeakMemory, show_results
from peft_vlm.files import last_part, write_json
from peft_vlm.models.towers import image_features, text_features, text_length_of, towers_of
from peft_vlm.objective import Batch, Objective, ObjectiveOutput
from peft_vlm.registry import Preset
from peft_vlm.text.class_features import PromptObjective
from peft_vlm.text.prompts import ClassPrompts, check_same_vocabulary, tokenize_classes
from peft_vlm.training.arguments import VLMTrainingArguments
from peft_vlm.training.trainer import VLMTrainer


class FullFineTuningObjective(PromptObjective):
    """Mean cross-entropy of scaled cosines over all classes; both towers run in full, with autograd, in every step.

    Args:
        prompts: Tokenised class prompts with one template. Cut to their longest prompt they are the fast variant;
            padded to the context length they are what the official codes run.

    Raises:
        ValueError: If the prompts have more than one template.

    Requirements:
        Batches with `pixel_values` and `labels`; a plain model whose parameters to train require gradients.
    """

    def __init__(self, prompts: ClassPrompts) -> None:
        prompts.check_one_template("Both towers are trained on it.")
        super().__init__(prompts)

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Loss over all classes.

        Args:
            model: The model being trained.
            batch: `pixel_values` and `labels`.
        """
        towers = towers_of(model)
        text = text_features(model, self.prompts.input_ids.to(batch["labels"].device))
        logits = towers.similarity_logits(image_features(model, batch["pixel_values"]), text)
        loss = nn.functional.cross_entropy(logits, batch["labels"])
        return ObjectiveOutput({"cross_entropy": loss}, logits, batch["labels"])

    def check_stream(self) -> None:
        """Accept streams: nothing is stored."""

    def config_dict(self) -> dict[str, Any]:
        """Settings for the report: the length of the text."""
        return {"text_tokens": self.prompts.input_ids.shape[1]}


#: scikit-learn's `C` in CLIP's example code; the penalty on the weights W is |W|^2 / (2 C n) beside the mean loss.
_PROBE_C = 0.316


def _linear_probe(
    features: Float[Tensor, "images dim"], labels: Int[Tensor, " images"], *, num_classes: int
) -> nn.Linear:
    """Multinomial logistic regression on projected image features, not normalised, as in CLIP's evaluation.

    Fitted to convergence by L-BFGS. It knows nothing of class names, so it has no answer for new classes.

    References:
        Learning Transferable Visual Models From Natural Language Supervision, 2021, arXiv 2103.00020, Sec. 3.2.
    """
    probe = nn.Linear(features.shape[1], num_classes)
    nn.init.zeros_(probe.weight)
    nn.init.zeros_(probe.bias)
    optimizer = torch.optim.LBFGS(probe.parameters(), max_iter=300, line_search_fn="strong_wolfe")
    penalty = 0.5 / (_PROBE_C * len(features))

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = nn.functional.cross_entropy(probe(features), labels) + penalty * probe.weight.square().sum()
        loss.backward()
        return loss

    optimizer.step(closure)
    return probe


@dataclass(frozen=True)
class Split:
    """Images of one seed.

    Args:
        train: The shots, with labels of the classes that are trained on.
        pool: The full training split with all classes, for methods that need no labels.
        tests: Test sets by the name of their score.
    """

    train: ImageClassificationDataset
    pool: ImageClassificationDataset
    tests: dict[str, ImageClassificationDataset]


@runtime_checkable
class MakePrompts(Protocol):
    """Class prompts of a list of names, in the template of the task unless another is given."""

    def __call__(self, class_names: Sequence[str], template: str | None = None) -> ClassPrompts:
        """Tokenise the classes."""
        ...


@dataclass
class Fitted:
    """A trained classifier.

    Args:
        accuracy: Top-1 accuracy in percent on a dataset whose classes are given by prompts; None when it has no
            answer.
        trainable_parameters: Number of trainable parameters.
        template: Template to be evaluated with; None for the task's.
    """

    accuracy: Callable[[ImageClassificationDataset, ClassPrompts], float | None]
    trainable_parameters: int
    template: str | None = None


@runtime_checkable
class Learner(Protocol):
    """One row of the table. `uses_seed` is False when every seed gives the same result.

    `load_model` gives the model that the learner starts from; None for the experiment's.
    """

    name: str
    uses_seed: bool
    load_model: Callable[[], nn.Module] | None

    def fit(self, model: nn.Module, prompts: MakePrompts, split: Split, *, seed: int, folder: Path) -> Fitted:
        """Train on the images and return a classifier; everything between call and return is measured."""
        ...


def chosen_learners(learners: Sequence[Learner], names: Sequence[str] | None) -> list[Learner]:
    """The learners with some names, in the order of `learners`; all without names.

    Args:
        learners: Rows of a table.
        names: Which of them.

    Raises:
        PeftVLMError: If a name is not among them.
    """
    check_list("names", names)
    known = [learner.name for learner in learners]
    unknown = sorted(set(names or ()) - set(known))
    if unknown:
        raise PeftVLMError(f"Expected `methods` among {known!r}, got {unknown!r}.")
    return [learner for learner in learners if not names or learner.name in names]


def _model_accuracy(model: nn.Module) -> Callable[[ImageClassificationDataset, ClassPrompts], float]:
    """Accuracy function of a CLIP-like model."""
    return lambda dataset, prompts: evaluate_classifier(model, dataset, prompts).accuracy


@dataclass
class ZeroShot:
    """The untouched model."""

    name: str = "zero_shot"
    load_model: Callable[[], nn.Module] | None = None
    uses_seed: bool = False

    def fit(self, model: nn.Module, prompts: MakePrompts, split: Split, *, seed: int, folder: Path) -> Fitted:
        """Train nothing."""
        return Fitted(_model_accuracy(model.eval()), 0)


class LinearProbeLearner:
    """Logistic regression on the frozen image features of the training images, without augmentation.

    Args:
        transform: Transform of evaluation.
    """

    name = "linear_probe"
    uses_seed = True
    load_model = None

    def __init__(self, transform: ImageTransform) -> None:
        self.transform = transform

    def fit(self, model: nn.Module, prompts: MakePrompts, split: Split, *, seed: int, folder: Path) -> Fitted:
        """Extract features once and fit."""
        model.eval()
        features = all_image_features(model, split.train.with_transform(self.transform))
        labels = torch.tensor(split.train.labels)
        probe = _linear_probe(features.clone(), labels, num_classes=len(split.train.class_names))

        def accuracy(dataset: ImageClassificationDataset, names: ClassPrompts) -> float | None:
            if names.class_names != split.train.class_names:
                return None
            with torch.inference_mode():
                predicted = probe(all_image_features(model, dataset)).argmax(dim=-1)
            return 100.0 * (predicted == torch.tensor(dataset.labels)).float().mean().item()

        return Fitted(accuracy, sum(p.numel() for p in probe.parameters()))


@dataclass
class TrainerLearner:
    """Anything that `VLMTrainer` trains.

    Args:
        name: Name in the report.
        wrap: Makes the trainable model from a fresh base model, for example with `get_peft_model`.
        objective: Builds the objective from class prompts and a seed.
        training: Keyword arguments of `VLMTrainingArguments`.
        template: Text around a class name; None for the task's.
        on_pool: Train on the full training split with all classes instead of the shots; for objectives that read no
            labels.
        load_model: Gives the model to start from; None for the experiment's.
        after: Called with the trained model and the seed.
    """

    name: str
    wrap: Callable[[nn.Module], nn.Module]
    objective: Callable[[ClassPrompts, int], Objective]
    training: dict[str, Any] = field(default_factory=dict)
    template: str | None = None
    on_pool: bool = False
    load_model: Callable[[], nn.Module] | None = None
    after: Callable[[nn.Module, int], None] | None = None
    uses_seed: bool = True

    @classmethod
    def on_prompts(
        cls,
        name: str,
        config: Callable[[], PeftConfig],
        objective: Callable[[ClassPrompts], Objective],
        training: dict[str, Any],
    ) -> "TrainerLearner":
        """An adapter that is trained from class prompts alone.

        Args:
            name: Name in the report.
            config: Makes the configuration of a new adapter.
            objective: Makes the objective.
            training: Keyword arguments of `VLMTrainingArguments`.
        """
        return cls(
            name,
            wrap=lambda model: get_peft_model(model, config()),
            objective=lambda prompts, seed: objective(prompts),
            training=training,
        )

    def fit(self, model: nn.Module, prompts: MakePrompts, split: Split, *, seed: int, folder: Path) -> Fitted:
        """Train; the adapter and its reports stay in `folder`."""
        model = self.wrap(model)
        train = split.pool if self.on_pool else split.train
        args = VLMTrainingArguments(
            output_dir=str(folder), seed=seed, disable_tqdm=True, save_strategy="no", **self.training
        )
        objective = self.objective(prompts(train.class_names, self.template), seed)
        trainer = VLMTrainer(model, args, train_dataset=train, objective=objective)
        trainer.remove_callback(PrinterCallback)
        trainer.train()
        trained = sum(p.numel() for p in model.parameters() if p.requires_grad)
        if self.after is not None:
            self.after(model.eval(), seed)
        return Fitted(_model_accuracy(model.eval()), trained, self.template)


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
        source: Source for `load_image_dataset`: a folder, a CSV or a Hub id.
        protocol: `"base_to_new"` or `"few_shot"`.
        template: Text around a class name.
        shots: Images per class.
    """
    train, test = (load_image_dataset(str(source), split=split) for split in ("train", "test"))
    check_not_trained_on(test, image_sample(train), num_train=len(train))
    return Task(last_part(source), protocol, train, test, template=template, shots=shots)


def _split_of(task: Task, *, seed: int, train_transform: ImageTransform, test_transform: ImageTransform) -> Split:
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
        device: Device of the models; None takes a GPU if there is one.
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
            max_length=min(map(text_length_of, configs)),
            train_transform=TrainTransform(processor, **augmentation),
            test_transform=EvalTransform(processor),
            output_dir=output_dir,
            device="cpu" if use_cpu else None,
        )

    def run(self, tasks: Sequence[Task], learners: Sequence[Learner], seeds: Sequence[int]) -> dict[str, Any]:
        """Run everything and write `metrics.json` after each task.

        Args:
            tasks: The results of the first one are at the top level of the report.
            learners: Rows of the tables.
            seeds: Seeds of shots and training order.

        Returns:
            `{"seeds": [...], "methods": {...}, "tasks": {name: {"methods": {...}}}}`; scores in percent per seed.
        """
        self.output_dir.mkdir(parents=True, exist_ok=True)
        report: dict[str, Any] = {"seeds": list(seeds), "methods": {}, "tasks": {}}
        total = len(tasks) * len(learners) * len(seeds)
        progress = progress_bar(total=total, unit="run")
        for position, task in enumerate(tasks):
            methods: dict[str, Any] = {}
            known: dict[str, dict[str, Any]] = {}
            for seed in seeds:  # seeds outside: a drift of the machine hits all learners alike
                split = _split_of(
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
            learner: The learner to train.
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


def comparison_parser(
    description: str | None,
    *,
    model: Path,
    dataset: Path | None,
    presets: Sequence[str],
    protocol: str | None,
    output_dir: str,
    template: str = "a photo of a {}.",
) -> argparse.ArgumentParser:
    """The flags of a script that compares methods on one dataset; it adds its own.

    Args:
        description: Text of `--help`.
        model: Default of `--model`.
        dataset: Default of `--dataset`; None leaves it to the script.
        presets: Choices of `--preset`, the default first.
        protocol: Default of `--protocol`; None leaves it to the script.
        output_dir: Default of `--output_dir`.
        template: Default of `--template`.
    """
    parser = argparse.ArgumentParser(description=description, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", default=str(model), help="CLIP: folder or Hub id")
    parser.add_argument("--dataset", default=dataset and str(dataset), help="folder, CSV or Hub id: image and label")
    parser.add_argument("--template", default=template, help="text around a class name, with one {}")
    parser.add_argument("--preset", choices=presets, default=presets[0])
    parser.add_argument("--protocol", choices=["base_to_new", "few_shot"], default=protocol)
    parser.add_argument("--shots", type=int, default=16, help="images per class")
    parser.add_argument("--seeds", type=int, nargs="+", default=[1, 2, 3])
    parser.add_argument("--epochs", type=int, help="instead of the preset's number")
    parser.add_argument("--num_workers", type=int, default=0, help="processes that decode images")
    parser.add_argument("--use_cpu", action="store_true", help="do not use a GPU")
    parser.add_argument("--output_dir", type=Path, default=Path(output_dir))
    return parser


def chosen_settings(args: argparse.Namespace, own: Mapping[str, Any], official: Preset | None) -> dict[str, Any]:
    """Settings of adapter, objective, training and augmentation: those of a script, or official ones.

    Args:
        args: Flags of `comparison_parser`; some replace settings of the training.
        own: The script's `config`, `objective`, `training` and `augmentation`.
        official: Official configuration; None for the script's own.

    Returns:
        These by name, and whatever else the script has.
    """
    settings = deepcopy(dict(own))
    if official is not None:
        settings = deepcopy({name: getattr(official, name) for name in ("config", "objective", "training")})
        settings["augmentation"] = {"scale": (0.08, 1.0), "flip_probability": 0.5}
    settings["training"] |= {"use_cpu": args.use_cpu, "dataloader_num_workers": args.num_workers}
    settings["training"] |= {} if args.epochs is None else {"num_train_epochs": args.epochs}
    return settings


def run_comparison(args: argparse.Namespace, learners: Sequence[Learner], *, augmentation: dict[str, Any]) -> None:
    """Compare methods with zero-shot on the dataset of the flags, and print where the results are.

    Args:
        args: Flags of `comparison_parser`.
        learners: Rows of the table; the printed example uses the last one.
        augmentation: Keyword arguments of `TrainTransform`.
    """
    options: dict[str, Any] = {"augmentation": augmentation, "output_dir": args.output_dir, "use_cpu": args.use_cpu}
    experiment = Experiment.for_clip(args.model, **options)
    task = load_task(args.dataset, args.protocol, template=args.template, shots=args.shots)
    report = experiment.run([task], [ZeroShot(), *learners], args.seeds)
    show_results(report, args.output_dir, learner=learners[-1].name)
