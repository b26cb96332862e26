"""Makes PEFT know our methods: extends `PeftType` and registers config and model classes.

PEFT has no plug-in mechanism, and `register_peft_method` accepts only members of `PeftType`. A plain string would do
for most calls but breaks `mixed=True` and transformers' own `load_adapter`, which read `.value`; so the enum gets real
members.
"""

from collections.abc import Callable
from dataclasses import dataclass, field
from importlib.metadata import version
from typing import Any

from peft import PeftType
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING, PEFT_TYPE_TO_TUNER_MAPPING
from peft.utils import register_peft_method

from peft_vlm.errors import PeftVLMError
from peft_vlm.objective import About


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of one official configuration, as keyword arguments for the three places settings live in.

    Args:
        config: For the method's configuration.
        objective: For its objective; empty where the objective has nothing to set.
        training: For `VLMTrainingArguments`.
    """

    config: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)


METHODS: dict[str, type] = {}
"""Registered config classes by method name (`"skip_tuning"`, ...)."""

ABOUT: dict[str, About] = {}
"""What a model card says about each method."""


@dataclass(frozen=True)
class Recipe:
    """What trains a method by its name.

    Args:
        objective: Objective on a CLIP-like model, from class prompts; None where the method trains none.
        answer_objective: Objective on a model that writes text, from candidate answers; None where it trains none.
        preset_for: Gives an official configuration by its name.
    """

    objective: Callable[..., Any] | None = None
    answer_objective: Callable[..., Any] | None = None
    preset_for: Callable[..., Preset] | None = None


RECIPES: dict[str, Recipe] = {}
"""How each registered method is trained, by method name."""


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


def register_method(
    name: str, *, config_cls: type, model_cls: type, about: About | None = None, recipe: Recipe | None = None
) -> None:
    """Register a method with PEFT under a name that adapter files carry for years.

    Args:
        name: Lower-case method name; its upper-case form is the `PeftType`, and `name + "_"` the parameter prefix.
        config_cls: The method's `PeftConfig`.
        model_cls: The method's tuner.
        about: What a model card says about the method.
        recipe: How the method is trained by its name.

    Raises:
        PeftVLMError: If PEFT or another package owns the name, or the module was reloaded.
    """
    known = PEFT_TYPE_TO_CONFIG_MAPPING.get(name.upper())
    if known is not None and PEFT_TYPE_TO_TUNER_MAPPING.get(name.upper()) is model_cls and known is config_cls:
        return
    if known is not None:
        same_package = known.__module__.partition(".")[0] == config_cls.__module__.partition(".")[0]
        advice = (
            "Restart Python instead of reloading peft_vlm: objects made before would no longer match their classes."
            if same_package
            else f"Use the method of that package, or a peft_vlm release that supports peft {version('peft')}."
        )
        raise PeftVLMError(
            f"Cannot register the method {name!r}: the name belongs to "
            f"`{known.__module__}.{known.__qualname__}`. {advice}"
        )
    extend_peft_type(name.upper())
    register_peft_method(name=name, config_cls=config_cls, model_cls=model_cls)
    METHODS[name], RECIPES[name] = config_cls, recipe or Recipe()
    if about is not None:
        ABOUT[name] = about
