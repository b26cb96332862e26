"""What a method minimises: the `Objective` protocol that the trainer runs, its batch, and the facts a card needs.

Names of tensor axes, used in every annotation of the package:

| axis     | meaning                                                      |
|----------|--------------------------------------------------------------|
| batch    | images of one step                                           |
| classes  | class prompts; rows of the class features                    |
| selected | the classes that a sampling or skipping rule selects for a step |
| sampled  | an image's own class and the classes that a step has drawn |
| prompts  | tokenised texts (templates x classes)                        |
| tokens   | positions of one sequence, text or patches                   |
| slots    | positions of a sequence that a prompt takes                  |
| before, after | positions of a sequence before and after the slots      |
| vocabulary | token ids of a language model                              |
| width    | hidden size of one tower                                     |
| dim      | size of the space that image and text features share         |
| images   | all images of a dataset or a cache                           |
| teachers | teachers of one student                                      |
| channels, rows, cols | pixels                                           |
| canvas   | sides of the square that a pixel prompt is drawn on          |
| patches  | image patches of a batch, flattened one after the other      |
"""

from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol, TypedDict, TypeVar, runtime_checkable

import torch
from jaxtyping import Float, Int
from peft import PeftModel
from torch import Tensor, nn
from torch.utils.data import Dataset

from peft_vlm.errors import AdapterError, DataError
from peft_vlm.models.towers import unwrap

if TYPE_CHECKING:
    import transformers


T = TypeVar("T")


class Batch(TypedDict, total=False):
    """One batch as collated by the data side; an objective reads the columns it names in its Requirements.

    `pixel_values` are normalised with the mean and standard deviation of the model's image processor; `labels` index
    the class names; `index` is the position in the training dataset, which caches use as their key.

    Batches of questions about images also hold token ids of question and answer, `token_labels` (the answer's ids,
    -100 elsewhere), whatever columns the model's processor makes beside `pixel_values`, which then may have another
    shape, and the image for a second model, a CLIP, normalised for that one.
    """

    pixel_values: Float[Tensor, "batch channels rows cols"]
    labels: Int[Tensor, " batch"]
    index: Int[Tensor, " batch"]
    input_ids: Int[Tensor, "batch tokens"]
    attention_mask: Int[Tensor, "batch tokens"]
    token_labels: Int[Tensor, "batch tokens"]
    clip_pixel_values: Float[Tensor, "batch channels rows cols"]


@dataclass(frozen=True)
class Paper:
    """Where a method comes from.

    Args:
        title: Title of the paper.
        year: Year of publication.
        arxiv_id: Identifier such as `"2412.11509"`; empty where there is none.
        venue: Conference or journal, with its year.
        bibtex: Citation as it is printed on a model card.
    """

    title: str
    year: int
    arxiv_id: str
    venue: str
    bibtex: str

    @property
    def url(self) -> str:
        """Address of the abstract; of the software where there is none."""
        return f"https://arxiv.org/abs/{self.arxiv_id}" if self.arxiv_id else "https://github.com/huggingface/peft"


@dataclass
class ObjectiveOutput:
    """Loss terms and logits of one batch.

    Args:
        loss_terms: Named scalars, already weighted; the loss is their sum.
        logits: Scaled logits that the loss was computed from: a row per image and a column per class, or, for language
            losses, a row per answer token and a column per entry of the vocabulary.
        labels: Column of `logits` that is right for each row. It differs from the batch's labels when the objective
            works on a subset of the classes.
        terms_are_shared: Whether the terms are already this process's parts (`peft_vlm.distributed.share_of`) of means
            over all processes; needed where a term is the mean of something else than the rows of `labels`.
    """

    loss_terms: dict[str, Float[Tensor, ""]]
    logits: Float[Tensor, "batch classes"]
    labels: Int[Tensor, " batch"]
    terms_are_shared: bool = False

    @property
    def loss(self) -> Float[Tensor, ""]:
        """Sum of the loss terms."""
        return torch.stack(list(self.loss_terms.values())).sum()


def prepared(value: T | None) -> T:
    """Return what `Objective.prepare` computes, for the steps that need it.

    Args:
        value: What was computed; None before.

    Raises:
        RuntimeError: If `prepare` was not called.
    """
    if value is None:
        raise RuntimeError("Expected `prepare(model, dataset)` before the first batch; the trainer calls it.")
    return value


def check_other_model(teacher: nn.Module, student: nn.Module) -> None:
    """Refuse a student that is its own teacher: adapters are put into the very model that they were made for.

    Args:
        teacher: Frozen model.
        student: Model that learns.

    Raises:
        AdapterError: If both are one model.
    """
    if unwrap(teacher) is unwrap(student):
        raise AdapterError(
            "Expected a teacher of its own, got the student's base model, into which its adapter has been put. Load "
            "it a second time, or pass `copy.deepcopy(model)` made before `get_peft_model`."
        )


@dataclass(frozen=True)
class ClassNames:
    """Answers that stand for classes, where an objective has no class prompts, as the trainer records them.

    Args:
        class_names: Answers in label order.
        templates: Texts around a class name; multimodal models have none, the question takes their place.
    """

    class_names: tuple[str, ...]
    templates: tuple[str, ...] = ()


@runtime_checkable
class _RecordsData(Protocol):
    """What an adapter's configuration says about classes and images; those of this package have it."""

    class_names: Any
    template: Any
    image_mean: Any
    image_std: Any
    image_size: Any
    value_range: Any


@runtime_checkable
class _Preprocessing(Protocol):
    """A transform that makes the pixels of a model."""

    image_mean: Any
    image_std: Any
    image_size: Any


def record_data(config: _RecordsData, prompts: Any, dataset: Any) -> None:
    """Write classes, template and preprocessing into a configuration.

    Args:
        config: Configuration of an adapter.
        prompts: Class prompts or names of classes; None where there are none.
        dataset: Its transform, if it makes pixels, holds mean, standard deviation and size.
    """
    if prompts is not None:
        if not getattr(config, "num_classes", 0):  # stored class vectors name their classes themselves
            config.class_names = list(prompts.class_names)
        if prompts.templates:  # multimodal models have none: a question stands before the class name
            config.template = prompts.templates[0] if len(prompts.templates) == 1 else list(prompts.templates)
    transform = getattr(dataset, "transform", None)
    if isinstance(transform, _Preprocessing):
        config.image_mean, config.image_std = list(transform.image_mean), list(transform.image_std)
        config.image_size = list(transform.image_size)
    if getattr(dataset, "value_range", None) is not None:
        config.value_range = list(dataset.value_range)


class Objective(ABC):
    """Loss and logits of one method, plus the hooks by which it shapes the training run.

    The trainer calls the hooks in this order: `adapt_to` and `prepare` once, `epoch_start` before each epoch, then the
    objective itself per batch, and `predict` in evaluation. An objective holds no trainable tensors; a teacher is an
    argument of its constructor, never a submodule of the trained model.
    """

    paper: Paper | None = None
    #: The class prompts (`peft_vlm.text.ClassPrompts`) that the trained adapter classifies with; None without classes.
    prompts: Any = None
    #: False where `predict` has nothing to choose from (free answers); a run with validation images is then refused.
    can_predict = True
    #: False when training batches need no pixels because `epoch_start` has stored features (see `Batch.index`).
    needs_pixels = True
    #: Whether the label of a training image is the position of its class among those of `prompts`.
    labels_are_positions = True

    @abstractmethod
    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """Loss terms and logits of a training batch; runs inside the module that the trainer wraps for DDP."""

    @abstractmethod
    def predict(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch classes"]:
        """Logits over all classes, as a user of the trained model gets them."""

    @abstractmethod
    def config_dict(self) -> dict[str, Any]:
        """The settings of this objective as JSON values, for the card and the training summary."""

    def adapt_to(self, model: nn.Module, dataset: Dataset) -> None:  # noqa: B027 - an optional hook
        """Called when the trainer is made, before it asks for batches: what of the model trains, and whether images
        come again unchanged, may decide what the objective needs of them (`needs_pixels`)."""

    def prepare(self, model: nn.Module, dataset: Any) -> None:
        """Called once before the first step, with the model on its device and the initial adapter.

        This one writes classes, template and preprocessing into the adapter's configuration, so that what
        `save_pretrained` writes is enough to predict, also without a trainer; overrides call it.

        Args:
            model: Model to train.
            dataset: Training images.
        """
        config = model.active_peft_config if isinstance(model, PeftModel) else None
        if isinstance(config, _RecordsData):  # PEFT's own types have no place for it
            record_data(config, self.prompts, dataset)

    def epoch_start(self, model: nn.Module, dataset: Dataset, epoch: int) -> None:  # noqa: B027 - an optional hook
        """Called before each epoch (also the one a resumed run continues); builds caches."""

    def epoch_end(self) -> dict[str, float]:
        """Called after each epoch; what it returns is logged and kept in the reports."""
        return {}

    def batch_sampler(self, labels: Sequence[int], *, batch_size: int, seed: int) -> "EpochBatchSampler | None":
        """Batches of dataset positions for methods that compose their batches themselves; None for shuffled ones.

        Args:
            labels: Class of each training image.
            batch_size: Images per step on all processes together; each of them gets a part of every batch.
            seed: Seed of the run.
        """
        return None

    def check_stream(self) -> None:
        """Called before the first step of a run whose images come from a stream (`peft_vlm.data.ImageStream`), where
        no image has a position that comes again.

        Raises:
            DataError: By default; objectives that keep nothing by position override this.
        """
        raise DataError(
            f"Expected a dataset for `{type(self).__name__}` with these settings, got a stream, where no image has "
            "a position that comes again. Load one with `load_image_dataset`, or train with RPP, PromptSRC, or CoOp "
            "with `image_cache='auto'`; an objective that keeps nothing by position overrides `check_stream`."
        )

    def param_groups(self, named_parameters: Iterable[tuple[str, nn.Parameter]]) -> dict[str, list[nn.Parameter]]:
        """Split the trainable parameters into named learning-rate groups (`"text"`, `"vision"`, `"all"`, ...)."""
        return {"all": [parameter for _, parameter in named_parameters]}

    def optimizer(self, model: nn.Module, *, learning_rate: float) -> torch.optim.Optimizer | None:
        """The optimizer of methods that come with an update rule of their own; None for the one of the arguments.

        Args:
            model: Model with its adapter, on its device.
            learning_rate: Initial rate; the schedule of the run changes it.
        """
        return None

    def callbacks(self, model: nn.Module) -> "list[transformers.TrainerCallback]":
        """Trainer callbacks that belong to the method; they run before the final files are written."""
        return []

    def state_dict(self) -> dict[str, Tensor]:
        """What an exact resume needs beyond the adapter; saved as safetensors in every checkpoint.

        Called on every process, so that it may collect what each of them holds; the main one's answer is saved.
        """
        return {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Restore what `state_dict` gave.

        Args:
            state: The mapping of `state_dict`.

        Raises:
            ValueError: If the state is of another objective.
        """
        if state:
            raise ValueError(f"`{type(self).__name__}` has no state, got {sorted(state)!r}.")


class EpochBatchSampler(ABC):
    """Batches of dataset positions, drawn anew each epoch from (seed, epoch) alone, so that a resumed run repeats
    them.

    Args:
        batch_size: Images per batch at most.
        seed: Seed of the run.
    """

    #: Read by Accelerate, which shards batch samplers over processes.
    drop_last = False

    def __init__(self, *, batch_size: int, seed: int) -> None:
        self.batch_size, self.seed, self.epoch = batch_size, seed, 0

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.epoch = epoch

    @abstractmethod
    def __iter__(self) -> Iterator[list[int]]:
        """Lists of dataset positions."""

    @abstractmethod
    def __len__(self) -> int:
        """Number of batches in an epoch."""
