"""What a user hands to the trainer, checked and completed, and which of its images a step sees.

A step sees the same images whatever the number of processes, each process its part of them.
"""

import inspect
import math
import warnings
from collections.abc import Iterator, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import datasets
import torch
from accelerate.data_loader import prepare_data_loader
from peft import PeftModel
from torch import nn
from torch.utils.data import DataLoader
from transformers import AutoImageProcessor, BaseImageProcessor, PreTrainedTokenizerBase
from transformers.trainer_utils import seed_worker

from peft_vlm.adapters.config import VLMConfig, adapter_settings
from peft_vlm.classification import ClassificationObjective
from peft_vlm.data.dataset import ImageClassificationDataset, RunImages
from peft_vlm.data.loading import load_image_dataset
from peft_vlm.data.questions import ImageQuestionDataset
from peft_vlm.data.transforms import EvalTransform, TrainTransform
from peft_vlm.distributed import num_processes, part_of, process_index
from peft_vlm.errors import DataError, PeftVLMError, PeftVLMWarning
from peft_vlm.files import make_folder
from peft_vlm.models.repository import hub_options
from peft_vlm.models.towers import FAMILIES, is_placed, unwrap
from peft_vlm.objective import EpochBatchSampler, Objective
from peft_vlm.registry import ADAPTERS, METHODS, TrainingMethod, adapter_type_of
from peft_vlm.text.prompts import readable, tokenize_for_model, tokenizer_of
from peft_vlm.training.arguments import VLMTrainingArguments

TEMPLATE = "a photo of a {}."
"""Of class prompts where neither the user nor the adapter names one."""

REFUSED_ARGUMENTS = {
    "data_collator": "a dataset makes its batches itself (`dataset.collate`; questions: `dataset.with_collator(...)`)",
    "model_init": "the objective belongs to one model: no `hyperparameter_search`, but a trainer for each trial",
    "compute_loss_func": "the objective is the loss; write an `Objective`",
}
"""Arguments of `transformers.Trainer` that nothing here could use, each with what to do."""


def check_arguments(model: Any, args: Any, objective: Any, refused: Mapping[str, Any]) -> None:
    """Refuse arguments of a wrong type, in a wrong place, or without a use, and a folder that cannot be made.

    Args:
        model: Of the trainer.
        args: Of the trainer.
        objective: Of the trainer.
        refused: Values of `REFUSED_ARGUMENTS`.

    Raises:
        TypeError: Naming the argument.
        ValueError: If an argument is given that is not used.
    """
    call = "`VLMTrainer(model, args, train_dataset=images, objective=objective)`"
    for name, value in refused.items():
        if isinstance(value, Objective | VLMTrainingArguments):
            break  # in a wrong place, which the next lines say
        if value is not None:
            raise ValueError(f"Expected no `{name}`, got `{type(value).__name__}`: {REFUSED_ARGUMENTS[name]}.")
    if not isinstance(model, nn.Module):
        raise TypeError(f"Expected a model as the first argument, got `{type(model).__name__}`. Call {call}.")
    if not isinstance(args, VLMTrainingArguments):
        advice = (
            "Its defaults and further settings are those of this field: `from peft_vlm import VLMTrainingArguments`."
            if type(args).__name__.endswith("TrainingArguments")
            else f"Call {call}."
        )
        raise TypeError(f"Expected `args` to be `VLMTrainingArguments`, got `{type(args).__name__}`. {advice}")
    if objective is not None and not isinstance(objective, Objective):
        got = f"the class `{objective.__name__}`" if isinstance(objective, type) else f"`{type(objective).__name__}`"
        raise TypeError(f"Expected `objective` to be an `Objective`, such as `CoOpObjective(prompts)`, got {got}.")
    if args.should_save:
        make_folder(Path(args.output_dir))


def _image_processor_of(model: nn.Module, processing_class: Any) -> BaseImageProcessor:
    """The image processor of a processing class, or that beside the model's weights.

    Args:
        model: Model, with or without adapters.
        processing_class: Processor or image processor; None or a tokenizer: look beside the model.

    Raises:
        PeftVLMError: If there is none.
    """
    processor = getattr(processing_class, "image_processor", processing_class)
    if isinstance(processor, BaseImageProcessor):
        return processor
    name = unwrap(model).name_or_path
    try:
        return AutoImageProcessor.from_pretrained(name, **hub_options(name))
    except (OSError, ValueError, TypeError) as error:
        raise PeftVLMError(
            f"Expected an image processor for images without a transform, got none beside {name!r}. Pass "
            "`processing_class=AutoProcessor.from_pretrained(...)`, or images with a transform."
        ) from error


def run_images(images: Any, model: nn.Module, processing_class: Any, *, name: str) -> Any:
    """Images as a run takes them: a table of `datasets` becomes a dataset of this package, with a transform.

    Args:
        images: A dataset, a stream, a `datasets.Dataset` with an image and a label column, or a `DatasetDict`.
        model: Model, which knows where its image processor is.
        processing_class: Processor or image processor.
        name: Argument, for the message, and which part of a `DatasetDict` is meant.

    Raises:
        TypeError: If it is nothing of that.
    """
    is_training = name == "train_dataset"
    if isinstance(images, datasets.DatasetDict):
        part = "train" if is_training else next((key for key in ("validation", "val") if key in images), "validation")
        images = images[part] if part in images else load_image_dataset(images, split=part)
    if isinstance(images, datasets.Dataset):
        if images.format["type"] == "custom":  # `set_transform`: rows come with their pixels
            return _TransformedRows(images)
        images = load_image_dataset(images)
    if isinstance(images, ImageClassificationDataset) and not isinstance(images, ImageQuestionDataset):
        makes_pixels = type(images).__getitem__ is not ImageClassificationDataset.__getitem__
        if images.transform is None and not makes_pixels:
            transform = TrainTransform if is_training else EvalTransform
            images = images.with_transform(transform(_image_processor_of(model, processing_class)))
    if not isinstance(images, RunImages):
        raise TypeError(
            f"Expected `{name}` to be images of `load_image_dataset` or `load_image_stream`, or a `datasets.Dataset` "
            f"with the columns 'image' and 'label', got `{type(images).__name__}`."
        )
    return images


class _TransformedRows(ImageClassificationDataset):
    """Rows of a `datasets.Dataset` whose own `set_transform` gives `pixel_values` and the label.

    Its transform may be random, so nothing is stored of its pixels.

    Args:
        rows: The dataset.

    Raises:
        DataError: If a row has no pixels, or no label whose class has a name.
    """

    def __init__(self, rows: "datasets.Dataset") -> None:
        plain = rows.with_format(None)
        label = next((name for name in ("label", "labels") if name in plain.column_names), "label")
        known = load_image_dataset(plain, label_column=label)
        super().__init__(plain, known.class_names, label_column=None)
        self.labels = known.labels
        self.rows = rows
        if "pixel_values" not in rows[0]:
            raise DataError(
                f"Expected a `set_transform` that gives 'pixel_values', got {sorted(rows[0])!r}. Leave it out: images "
                "of a dataset without one are prepared by `processing_class`."
            )

    @property
    def has_fixed_pixels(self) -> bool:
        """False: the rows' transform may be random."""
        return False

    def __getitem__(self, index: int) -> Any:
        row = self.rows[self._rows[index]]
        return {"pixel_values": row["pixel_values"], "labels": self.labels[index], "index": index}


def default_objective(
    model: nn.Module, images: RunImages, *, template: Any = None, processor: Any = None
) -> Objective:
    """The objective of the method whose adapter a model has, over the classes of its training images.

    Args:
        model: `PeftModel` with the adapter to train.
        images: Training images.
        template: Text around a class name; None: that of the adapter, or "a photo of a {}.".
        processor: Processor or tokenizer; None: the tokenizer beside the model's weights.

    Raises:
        PeftVLMError: If the model has no adapter, or its method needs more than class names.
    """
    method = _method_of(model)
    config: Any = model.active_peft_config  # type: ignore[union-attr] - a `PeftModel`, as `_method_of` has found
    if isinstance(unwrap(model), tuple(FAMILIES)):
        tokenizer = getattr(processor, "tokenizer", processor)
        if not isinstance(tokenizer, PreTrainedTokenizerBase):
            tokenizer = tokenizer_of(unwrap(model))
        if tokenizer is None:
            raise PeftVLMError(
                "Expected a tokenizer for the class prompts, got none beside the model's weights. Pass "
                "`processing_class=AutoProcessor.from_pretrained(...)`, or an `objective`."
            )
        text = template or getattr(config, "template", None) or TEMPLATE  # PEFT's own types have none
        classes: Any = tokenize_for_model(model, tokenizer, images.class_names, template=text)
        target = method.objective
    else:
        target = method.answer_objective
        collator = images.collator if isinstance(images, ImageQuestionDataset) else None
        if target is None or collator is None:
            raise PeftVLMError(
                f"Expected an `ImageQuestionDataset` with a collator, and a method that trains "
                f"`{type(unwrap(model)).__name__}`, got {method.title} and `{type(images).__name__}`. See "
                "docs/families.md."
            )
        classes = collator.candidates(images.class_names, include_end=True) if images.class_names else None
    assert target is not None, "`_method_of` takes methods that train such a model"
    missing = [
        p.name
        for p in list(inspect.signature(target).parameters.values())[1:]
        if p.default is p.empty and p.kind is p.KEYWORD_ONLY
    ]
    call = f"`objective={getattr(target, '__name__', 'Objective')}(prompts, ...)`"
    if missing:
        raise PeftVLMError(f"{method.title} needs more than class names: `{missing[0]}`. Pass {call}.")
    try:
        return target(classes)
    except ValueError as error:
        raise PeftVLMError(f"{method.title} needs more than class names. Pass {call}: {error}") from error


def _method_of(model: nn.Module) -> TrainingMethod:
    """The training method that has the name of the active adapter's type; cross-entropy for PEFT's own on a CLIP."""
    if not isinstance(model, PeftModel):
        raise PeftVLMError(
            f"Expected a model with an adapter, got `{type(model).__name__}`. Call `get_peft_model(model, "
            "SkipTuningConfig(...))` first; a whole model is trained with an `objective` of your own."
        )
    config = model.active_peft_config
    kind = adapter_type_of(config)
    name = kind.name
    if not isinstance(config, VLMConfig) and isinstance(unwrap(model), tuple(FAMILIES)):
        facts = {"name": name, "title": kind.title, "adapter": name, "paper": kind.paper}
        return TrainingMethod(**facts, objective=ClassificationObjective)
    if name not in ADAPTERS or name not in METHODS:
        raise PeftVLMError(
            f"Expected an `objective` for an adapter of type {name!r}, which has none itself, got None. Types with "
            f"one: {', '.join(sorted(set(ADAPTERS) & set(METHODS)))}."
        )
    return METHODS[name]


def check_training(model: nn.Module, objective: Objective, train_dataset: RunImages) -> None:
    """Refuse a run that could not train.

    Args:
        model: Model with its adapter.
        objective: Its class prompts, if it has any, say what the columns of its logits mean.
        train_dataset: Training images, a dataset or a stream.

    Raises:
        PeftVLMError: If nothing is trainable, weights are offloaded, a setting is not finite, or the adapter is one
            that the objective does not train.
        DataError: If the objective cannot train on a stream, the range of pixel values is unclear, or the labels are
            of other classes than its own.
    """
    if not any(parameter.requires_grad for parameter in model.parameters()):
        raise PeftVLMError(
            "Expected trainable parameters, got none. Load adapters for training with "
            "`PeftModel.from_pretrained(..., is_trainable=True)`."
        )
    _check_places_of_weights(model)
    _check_adapter(model, objective)
    objective.adapt_to(model, train_dataset)
    own = adapter_settings(model.active_peft_config) if isinstance(model, PeftModel) else {}
    for name, value in (own | objective.config_dict()).items():
        if isinstance(value, float) and not math.isfinite(value):
            raise PeftVLMError(f"Expected a finite number as `{name}` of adapter or objective, got {value!r}.")
    if not train_dataset.has_positions:
        objective.check_stream()
    train_dataset.check_pixels()
    if objective.labels_are_positions:
        _check_places(objective, train_dataset)


def _check_places_of_weights(model: nn.Module) -> None:
    """Refuse a model of which accelerate offloads what is trained, or that it has not placed by a map of devices."""
    if is_placed(model) and num_processes() > 1:
        raise PeftVLMError(
            f"Expected one process for a model that was loaded with `device_map`, got {num_processes()}: each would "
            "fill all GPUs. Start one, or leave `device_map` out; `fsdp` divides layers among processes."
        )
    offloaded = [(name, parameter) for name, parameter in model.named_parameters() if parameter.is_meta]
    trained = [name for name, parameter in offloaded if parameter.requires_grad]
    if trained:
        raise PeftVLMError(
            f"Expected trainable parameters in memory, got {len(trained)} that accelerate offloads with the weights "
            f"beside them: {trained[0]!r}, ... Load the model without `device_map`, quantised or in half precision."
        )
    if offloaded and not is_placed(model):  # the trainer would move it as a whole
        raise PeftVLMError(
            "Expected a model in memory or one that was loaded with `device_map`, got one that is offloaded by hooks "
            "alone, which can be evaluated and not trained. Load it with `device_map` or `dispatch_model`."
        )


def _check_adapter(model: nn.Module, objective: Objective) -> None:
    """Refuse a method's own objective on a model without adapter, or with one that the method does not make."""
    methods = [m for m in METHODS.values() if type(objective) in (m.objective, m.answer_objective)]
    types = {method.adapter for method in methods}
    found = model.active_peft_config.peft_type.value.lower() if isinstance(model, PeftModel) else None
    if not methods or found in types:
        return
    expected = " or ".join(f"`{ADAPTERS[name].config.__name__}`" for name in sorted(types))
    got = "a model without adapter" if found is None else f"one of type {found!r}"
    raise PeftVLMError(
        f"Expected an adapter of {expected} for `{type(objective).__name__}`, got {got}. Call `get_peft_model(model, "
        "config)` with such a config; other adapters are trained with `ClassificationObjective`, or an objective of "
        "your own."
    )


def check_evaluation(objective: Objective, eval_dataset: Any) -> None:
    """Refuse images that the objective could not be evaluated on.

    Args:
        objective: Its class prompts, if it has any, say what the columns of its logits mean.
        eval_dataset: Validation images.

    Raises:
        DataError: If they have no end, no labels, random augmentation, or other classes than the prompts, or the
            objective predicts none.
    """
    if eval_dataset.has_positions:
        if not len(eval_dataset):
            raise DataError("Expected an `eval_dataset` with images, got none.")
        if min(eval_dataset.labels) < 0:
            raise DataError("Expected an `eval_dataset` with labels, got images without. Leave it out.")
    check_prediction(objective, eval_dataset)


def check_prediction(objective: Objective, eval_dataset: Any) -> None:
    """The same without asking for labels.

    Args:
        objective: Says what the columns of its logits mean.
        eval_dataset: Images.

    Raises:
        DataError: If their logits would mean something else.
    """
    if not eval_dataset.has_positions:
        raise DataError(
            "Expected an `eval_dataset` with an end, got a stream, which repeats images. Load one with "
            "`load_image_dataset`."
        )
    if eval_dataset.is_augmented:
        raise DataError(
            "Expected an `eval_dataset` without random augmentation, which lowers the accuracy. Use "
            "`dataset.with_transform(EvalTransform(image_processor))`, for questions `with_augmentation(None)`."
        )
    if not objective.can_predict:
        raise DataError(
            "Expected an objective with answers to choose from for an `eval_dataset`, got "
            f"`{type(objective).__name__}` for free answers, which have no scores. Pass candidates to the objective "
            "(`tokenize_candidates`), or leave out `eval_dataset` and compare generated answers after training."
        )
    if objective.prompts is None:
        return
    expected = [readable(name) for name in objective.prompts.class_names]
    actual = [readable(name) for name in eval_dataset.class_names]
    if actual == expected:
        return
    pairs = zip(expected, actual, strict=False)
    place = next((i for i, (a, b) in enumerate(pairs) if a != b), min(len(expected), len(actual)))
    raise DataError(
        "Expected an `eval_dataset` with the class names of the objective's prompts in their order, got "
        f"{len(actual)} names for {len(expected)}, the first difference at label {place}: "
        f"{actual[place : place + 1]!r} for {expected[place : place + 1]!r}. Labels of one list are wrong in the "
        "other: `restrict` the dataset to the classes of the prompts, or make prompts of its classes."
    )


def _check_places(objective: Objective, dataset: Any) -> None:
    """Refuse training labels that stand for other classes in the prompts; classes may be worded otherwise there."""
    if objective.prompts is None:
        return
    places = {readable(name): place for place, name in enumerate(objective.prompts.class_names)}
    names = [readable(name) for name in dataset.class_names]
    moved = [(label, name) for label, name in enumerate(names) if places.get(name, label) != label]
    if len(names) > len(places):
        raise DataError(
            f"Expected training images of at most {len(places)} classes, as the objective's prompts, got "
            f"{len(names)}. `restrict` the dataset to the classes of the prompts, or make prompts of all its classes."
        )
    if moved:
        (label, name), count = moved[0], len(moved)
        raise DataError(
            f"Expected training images whose labels are places in the objective's prompts, got {count} classes that "
            f"stand elsewhere there: label {label}, {name!r}, is class {places[name]}. Make prompts of the dataset's "
            "`class_names`."
        )


FILLER = "is_filler"
"""Column of a batch that only fills a place: the step has fewer images than processes."""


class _ShuffledBatches(EpochBatchSampler):
    """All images in random order; the last batch may be smaller, or is left out.

    Args:
        num_images: Images in the dataset.
        batch_size: Images per batch.
        seed: Seed of the run; the epoch is added to it.
        drop_last: Leave out a last batch that is not full.
    """

    def __init__(self, num_images: int, *, batch_size: int, seed: int, drop_last: bool = False) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.num_images, self.drop_last = num_images, drop_last

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        for batch in order.split(self.batch_size):
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch.tolist()

    def __len__(self) -> int:
        return (self.num_images + (0 if self.drop_last else self.batch_size - 1)) // self.batch_size


class _ProcessShard(EpochBatchSampler):
    """This process's part of every batch; no image is left out or comes twice.

    The batches are those of all processes together, so a method composes them as it would in one process: a batch of
    one class has one class on all of them. A process whose part is empty gets an empty list.

    Args:
        batches: Sampler that draws the same batches on every process.
    """

    def __init__(self, batches: EpochBatchSampler) -> None:
        super().__init__(batch_size=batches.batch_size, seed=batches.seed)
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            part = part_of(len(batch), index=process_index(), parts=num_processes())
            yield batch[part.start : part.stop]


class _FillingCollate:
    """The dataset's `collate`; for no items, its first one as a filler that counts nowhere.

    Args:
        dataset: Dataset with a `collate`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """A batch."""
        if items:
            return self.dataset.collate(items)
        return {**self.dataset.collate([self.dataset[0]]), FILLER: torch.ones(1, dtype=torch.bool)}


def train_loader(images: Any, objective: Objective, args: VLMTrainingArguments, *, batch_size: int) -> DataLoader:
    """This process's batches, on the device of the run.

    Batches are those that the objective composes, else shuffled; without pixels when the objective stores features.

    Args:
        images: The run's `RunImages`.
        objective: Composes batches, and says whether they need pixels.
        args: Settings of the run.
        batch_size: Images per process and batch.
    """
    if not images.has_positions:
        return _stream_loader(images, args, batch_size=batch_size)
    dataset = images if objective.needs_pixels else images.without_pixels()
    size, seed = batch_size * num_processes(), args.seed if args.data_seed is None else args.data_seed
    batches = objective.batch_sampler(images.labels, batch_size=size, seed=args.seed)
    if batches is None:
        batches = _ShuffledBatches(len(dataset), batch_size=size, seed=seed, drop_last=args.dataloader_drop_last)
    several = num_processes() > 1
    loader = DataLoader(
        dataset,
        batch_sampler=_ProcessShard(batches) if several else batches,
        collate_fn=_FillingCollate(dataset) if several else dataset.collate,
        **_worker_options(args, args.dataloader_num_workers if objective.needs_pixels else 0),
    )
    # already this process's part: accelerator.prepare would divide again and mistreat batches of different sizes
    return prepare_data_loader(loader, device=args.device, num_processes=1, process_index=0, put_on_device=True)


def _stream_loader(stream: Any, args: VLMTrainingArguments, *, batch_size: int) -> DataLoader:
    """The part of a stream that this process reads."""
    stream.divide(batch_size=batch_size, rank=args.process_index, world_size=args.world_size)
    if args.process_index == 0:
        name_uneven_shards(stream.num_shards, args.world_size, args.dataloader_num_workers)
    loader = DataLoader(
        stream,
        batch_size=batch_size,
        collate_fn=stream.collate,
        **_worker_options(args, args.dataloader_num_workers) | {"persistent_workers": False},  # each reads its epoch
    )
    # already divided: by default one process would read for all
    options = {"num_processes": 1, "process_index": 0, "put_on_device": True, "dispatch_batches": False}
    return prepare_data_loader(loader, device=args.device, **options)


def evaluation_loader(dataset: Any, args: VLMTrainingArguments) -> DataLoader:
    """All images in their order, with the dataset's own collator; to be divided by `accelerator.prepare`.

    Args:
        dataset: A dataset with positions.
        args: Settings of the run; `dataloader_drop_last` is that of the training.
    """
    options = _worker_options(args, args.dataloader_num_workers)
    options["persistent_workers"] = False  # another dataset may come
    return DataLoader(dataset, batch_size=args.eval_batch_size, collate_fn=dataset.collate, **options)


def _worker_options(args: VLMTrainingArguments, workers: int) -> dict[str, Any]:
    """What the arguments say about the processes that read images."""
    options = {
        "num_workers": workers,
        "pin_memory": args.dataloader_pin_memory and args.device.type == "cuda",
        "persistent_workers": args.dataloader_persistent_workers and workers > 0,
        "worker_init_fn": partial(seed_worker, num_workers=workers, rank=args.process_index),
        "in_order": args.dataloader_in_order,
    }
    if workers:
        options["prefetch_factor"] = args.dataloader_prefetch_factor
        options["multiprocessing_context"] = args.dataloader_multiprocessing_context
    return options


def name_uneven_shards(shards: int, processes: int, workers: int) -> None:
    """Warn of shards that readers cannot divide: rows are divided then, which costs time, or, by workers, images."""
    each, rest = divmod(shards, processes)
    if rest:
        message = f"{processes} processes cannot divide {shards} shards evenly, so each of them reads every row. "
    elif workers > 1 and each % workers:
        message = f"{workers} workers cannot divide {each} shards evenly: some images come twice, others not at all. "
    else:
        return
    advice = "Write another number of shards, or change the number of processes or `dataloader_num_workers`."
    warnings.warn(message + advice, PeftVLMWarning, stacklevel=3)
