"""The two tables of the package: adapter types, which PEFT loads, and training methods, which make such adapters.

An adapter type says where trainable tensors enter a model, a training method what is minimised. Several methods may
train one type (CoOp and KgCoOp both write CoOp adapters), and a type may be PEFT's own.

PEFT has no plug-in mechanism, and `register_peft_method` accepts only members of `PeftType`. A plain string would do
for most calls but breaks `mixed=True` and transformers' own `load_adapter`, which read `.value`; so the enum gets real
members.
"""

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from peft import PeftConfig, PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method
from torch import Tensor

from peft_vlm.errors import PeftVLMError
from peft_vlm.objective import Paper


@dataclass(frozen=True)
class OfficialFormat:
    """One kind of official checkpoint.

    Args:
        name: What its makers call it.
        recognises: Whether tensors are of this kind, by their names.
        convert: Writes an adapter: `convert(file, folder, **settings)`.
    """

    name: str
    recognises: Callable[[Mapping[str, Tensor]], bool]
    convert: Callable[..., Any]

    def settings(self) -> dict[str, bool]:
        """What the converter takes beside file and folder: name, and whether it must be given."""
        parameters = inspect.signature(self.convert).parameters.values()
        return {p.name: p.default is p.empty for p in parameters if p.kind is p.KEYWORD_ONLY}


@dataclass(frozen=True, kw_only=True)
class AdapterType:
    """A PEFT type: how its adapters are built and read, and what a model card says about them.

    Args:
        name: Lower-case name that adapter files carry for years; its upper-case form is the `PeftType`, and, for types
            of this package, `name + "_"` the parameter prefix.
        config: Its `PeftConfig`.
        tuner: Its tuner.
        title: Name as in the paper.
        trained: What the adapter holds, as the end of the sentence "This adapter holds ...".
        paper: Where it comes from.
        limits: What a user of an adapter must know, whole sentences.
        stores_classes: Whether an adapter holds a vector per class, and knows no other class names.
        formats: Official checkpoints that become such adapters, and related ones that are refused by name.
        export: The active adapter as the official code has it: `export(model, tokenizer)` returns an
            `OfficialCheckpoint`. None where there is no official format.
    """

    name: str
    config: type
    tuner: type
    title: str
    trained: str
    paper: Paper
    limits: tuple[str, ...] = ()
    stores_classes: bool = False
    formats: tuple[OfficialFormat, ...] = ()
    export: Callable[..., Any] | None = None


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of one official configuration, as keyword arguments for the three places settings live in.

    Args:
        config: For the adapter's configuration.
        objective: For the method's objective; empty where the objective has nothing to set.
        training: For `VLMTrainingArguments`.
    """

    config: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


def sgd_training(*, learning_rate: float, batch: int, epochs: int) -> dict[str, Any]:
    """The training that CoOp's official code and its descendants share: SGD, one warm-up epoch at 1e-5, a cosine.

    Args:
        learning_rate: Rate after the warm-up.
        batch: Images per step.
        epochs: Passes over the images, the warm-up among them.

    Returns:
        Keyword arguments for `VLMTrainingArguments`.
    """
    return {
        **{"optim": "sgd", "learning_rate": learning_rate, "momentum": 0.9, "weight_decay": 5e-4},
        **{"per_device_train_batch_size": batch, "num_train_epochs": epochs},
        **{"warmup_epochs": 1, "warmup_learning_rate": 1e-5},
    }


@dataclass(frozen=True, kw_only=True)
class RunSize:
    """Size of a run, by which a method recommends settings.

    Official settings are for CLIP's ViT-B/16 and, of few-shot protocols, for up to 16 images per class. A model whose
    vision tower has fewer than 12 layers is small: its rates were chosen on training images held out, on the bundled
    CLIP of 6 layers.

    Args:
        protocol: `"few_shot"` or `"base_to_new"`.
        num_images: Training images.
        num_classes: Classes they show.
        fewest: Images of the smallest class.
        is_small: Whether the model is small.
    """

    protocol: str = "few_shot"
    num_images: int
    num_classes: int
    fewest: int
    is_small: bool

    def epochs(self, official: int, *, batch: int) -> int:
        """Passes over the images: the official number, fewer where there are more than 16 images per class, so that a
        run sees as many images as the official one. A small model makes about 100 steps, in 3 to 50 passes.

        Args:
            official: Official number for 16 images per class.
            batch: Images per step.
        """
        if self.is_small:
            return min(50, max(3, math.ceil(100 / math.ceil(self.num_images / batch))))
        return max(1, math.ceil(official * min(1.0, 16 * self.num_classes / self.num_images)))

    def recommend(
        self,
        official: Preset,
        *,
        rate: float,
        config: Mapping[str, Any] | None = None,
        objective: Mapping[str, Any] | None = None,
        batch: int = 32,
        optim: str = "sgd",
    ) -> Preset:
        """An official configuration fitted to the run.

        Depths and numbers of tokens are left out: those that are not given fit the model.

        Args:
            official: Configuration for ViT-B/16.
            rate: Learning rate for a small model, in steps without warm-up.
            config: Settings of the adapter on a small model.
            objective: Settings of the objective on a small model.
            batch: Images per step on a small model.
            optim: Optimizer on a small model.
        """
        if self.is_small:
            training = {"optim": optim, "learning_rate": rate, "per_device_train_batch_size": batch}
            training["num_train_epochs"] = self.epochs(0, batch=batch)
            return Preset(config=dict(config or {}), objective=dict(objective or {}), training=training)
        training = dict(official.training)
        if "num_train_epochs" in training:
            epochs = self.epochs(training["num_train_epochs"], batch=training["per_device_train_batch_size"])
            training |= {"num_train_epochs": epochs, "warmup_epochs": min(training["warmup_epochs"], epochs - 1)}
        return Preset(objective=dict(official.objective), training=training)


@dataclass(frozen=True, kw_only=True)
class TrainingMethod:
    """What is minimised on which type of adapter.

    Args:
        name: Lower-case name, as in `peft-vlm train --method`.
        title: Name as in the paper.
        adapter: Name of the adapter type in `ADAPTERS`.
        paper: Where the method comes from.
        objective: Objective on a CLIP-like model, from class prompts; None where the method trains none.
        answer_objective: Objective on a model that writes text, from candidate answers; None where it trains none.
        preset_for: Gives an official configuration by its name.
        defaults: Settings of a new adapter where they differ from those of its type.
        presets: These names.
        recommended: Settings for a run of which nothing was said but model and images; None: those of the classes.
        anchor_templates: Texts around class names whose frozen features the official code averages.
        guide: Makes the CLIP that a loss looks at, from its model, class prompts and image processor.
        guide_template: Text around class names for that CLIP.
    """

    name: str
    title: str
    adapter: str
    paper: Paper
    objective: Callable[..., Any] | None = None
    answer_objective: Callable[..., Any] | None = None
    preset_for: Callable[..., Preset] | None = None
    defaults: Mapping[str, Any] = field(default_factory=dict)
    presets: tuple[str, ...] = ()
    recommended: Callable[[RunSize], Preset] | None = None
    anchor_templates: tuple[str, ...] = ()
    guide: Callable[..., Any] | None = None
    guide_template: str = ""

    @property
    def adapter_type(self) -> AdapterType:
        """The type of the adapters it trains."""
        return ADAPTERS[self.adapter]


ADAPTERS: dict[str, AdapterType] = {}
"""Adapter types by name (`"skip_tuning"`, ...), the lower-case form of their `PeftType`."""

METHODS: dict[str, TrainingMethod] = {}
"""Training methods by name."""


PEFT_PAPER = Paper(
    title="PEFT: State-of-the-art Parameter-Efficient Fine-Tuning methods",
    year=2022,
    arxiv_id="",
    venue="software",
    bibtex="""@misc{peft,
  title        = {{PEFT}: State-of-the-art Parameter-Efficient Fine-Tuning methods},
  author       = {Mangrulkar, Sourab and Gugger, Sylvain and Debut, Lysandre and Belkada, Younes and Paul, Sayak
                  and Bossan, Benjamin and Tietz, Marian},
  howpublished = {\\url{https://github.com/huggingface/peft}},
  year         = {2022}
}""",
)


def adapter_type_of(config: PeftConfig) -> AdapterType:
    """The record of an adapter's type; a plain one for types of PEFT that have none here.

    Args:
        config: Configuration of the adapter.
    """
    name = str(config.peft_type.value).lower()
    if name in ADAPTERS:
        return ADAPTERS[name]
    tuner = PEFT_TYPE_TO_TUNER_MAPPING[config.peft_type]
    title = name.upper().replace("_", " ")
    trained = f"the tensors of PEFT's {title}"
    return AdapterType(name=name, config=type(config), tuner=tuner, title=title, trained=trained, paper=PEFT_PAPER)


def extend_peft_type(name: str) -> PeftType:
    """Add a member to PEFT's enum, or return the one that is there.

    Args:
        name: Upper-case name, which is also the value.
    """
    if name in PeftType.__members__:
        return PeftType[name]
    member = str.__new__(PeftType, name)
    member._name_ = member._value_ = name
    member.__objclass__ = PeftType
    member._sort_order_ = len(PeftType._member_names_)
    PeftType._member_names_.append(name)
    PeftType._member_map_[name] = PeftType._value2member_map_[name] = member
    type.__setattr__(PeftType, name, member)  # EnumType refuses ordinary assignment
    return member


def register_adapter(adapter: AdapterType) -> None:
    """Add an adapter type to `ADAPTERS`, and to PEFT unless PEFT already has exactly this one.

    Args:
        adapter: The type.

    Raises:
        PeftVLMError: If PEFT or another package owns the name, or the module was reloaded.
    """
    name, key = adapter.name, adapter.name.upper()
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(key)
    if known is None:
        extend_peft_type(key)
        register_peft_method(name=name, config_cls=adapter.config, model_cls=adapter.tuner)
    elif known is not adapter.config or PEFT_TYPE_TO_TUNER_MAPPING.get(key) is not adapter.tuner:
        same_package = known.__module__.partition(".")[0] == adapter.config.__module__.partition(".")[0]
        advice = (
            "Restart Python instead of reloading peft_vlm: objects made before would no longer match their classes."
            if same_package
            else f"Use the method of that package, or a peft_vlm release that supports peft {version('peft')}."
        )
        raise PeftVLMError(
            f"Cannot register the adapter type {name!r}: the name belongs to "
            f"`{known.__module__}.{known.__qualname__}`. {advice}"
        )
    ADAPTERS[name] = adapter


def register_method(method: TrainingMethod) -> None:
    """Add a training method to `METHODS`.

    Args:
        method: The method.

    Raises:
        PeftVLMError: If its adapter type is not registered.
    """
    if method.adapter not in ADAPTERS:
        raise PeftVLMError(
            f"Expected the training method {method.name!r} to train one of the adapter types {sorted(ADAPTERS)!r}, "
            f"got {method.adapter!r}. Register the adapter type first."
        )
    METHODS[method.name] = method
