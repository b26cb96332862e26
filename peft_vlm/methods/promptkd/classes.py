"""The stored class vectors: what stands where the student's text tower and text projection were."""

import math
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from jaxtyping import Float, Int
from peft.tuners._buffer_dict import BufferDict
from torch import Tensor, nn
from transformers.modeling_outputs import BaseModelOutputWithPooling

from peft_vlm.adapters.layer import DelegatingLayer, PromptLayer
from peft_vlm.errors import AdapterError, ClassNameError, check_list
from peft_vlm.methods.promptkd.config import PromptKDConfig
from peft_vlm.models.towers import device_of, towers_of
from peft_vlm.text.class_features import StoredFeaturesLayer
from peft_vlm.text.prompts import check_class_names, places_of


class StoredClassText(DelegatingLayer):
    """The text tower, which has no work while a PromptKD adapter is active: it only checks what it is asked.

    Args:
        base_layer: `CLIPTextModel`.
        prefix: The method's parameter prefix.
    """

    other_param_names = ("adapter_configs",)

    def __init__(self, base_layer: nn.Module, *, prefix: str) -> None:
        super().__init__(base_layer)
        self.prefix = prefix
        self.adapter_configs: dict[str, PromptKDConfig] = {}
        self.texts_are_classes = False

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Remember the adapter; it has no tensors here.

        Args:
            adapter_name: Its name.
            config: A `PromptKDConfig`.
        """
        self.adapter_configs[adapter_name] = config

    def forward(self, input_ids: Int[Tensor, "prompts tokens"] | None = None, **kwargs: Any) -> Any:
        """The text tower's output, or an empty one with a row per text, which the text projection takes as a request
        for the stored vectors.

        Args:
            input_ids: Texts; with an active adapter only where the caller declared them to be the stored classes.
            **kwargs: Passed on.

        Raises:
            AdapterError: If texts are given that were not declared.
        """
        if self.current_adapter is None:
            return self.base_layer(input_ids=input_ids, **kwargs)
        if input_ids is not None and not self.texts_are_classes:
            raise AdapterError(
                "Expected `pixel_values` alone, got `input_ids`. A PromptKD student classifies with the class vectors "
                "stored in its adapter and reads no text, so scores for other texts would be wrong. Leave the texts "
                "out (`model(pixel_values=...)`, `PromptedClassifier`); or, if they are the stored classes in their "
                "order, say so: `with texts_are_stored_classes(model): ...`."
            )
        count = 0 if input_ids is None else len(input_ids)
        dtype = next(self.base_layer.parameters()).dtype
        # a row per text and no column: what the projection takes for a request
        request = torch.empty(count, 0, dtype=dtype, device=device_of(self.base_layer))
        return BaseModelOutputWithPooling(pooler_output=request)


class StoredClasses(PromptLayer, StoredFeaturesLayer):
    """The text projection, which gives the stored class vectors while a PromptKD adapter is active.

    Args:
        base_layer: CLIP's text projection.
        prefix: The method's parameter prefix.
    """

    def __init__(self, base_layer: nn.Module, *, prefix: str) -> None:
        super().__init__(base_layer)
        self.other_param_names = (f"{prefix}class_vectors", "adapter_configs")
        setattr(self, self.other_param_names[0], BufferDict(persistent=True))
        self.adapter_configs: dict[str, PromptKDConfig] = {}

    @property
    def vectors(self) -> BufferDict:
        """Class vectors by adapter name, each (classes, dim), unit-norm."""
        return getattr(self, self.other_param_names[0])

    def add_adapter(self, adapter_name: str, config: Any) -> None:
        """Room for the vectors that a file will bring; random ones where the configuration asks for them.

        Args:
            adapter_name: Key of the vectors.
            config: A `PromptKDConfig`.
        """
        vectors = torch.full((config.num_classes, config.class_dim), math.nan)  # until a file or a teacher fills them
        if not config.init_weights:
            vectors = nn.functional.normalize(torch.randn(vectors.shape), dim=-1)
        self.vectors[adapter_name] = vectors.to(self.get_base_layer().weight.device)
        self.adapter_configs[adapter_name] = config

    def forward(self, pooled: Float[Tensor, "prompts width"]) -> Float[Tensor, "classes dim"]:
        """The projection, or the stored vectors in the base model's type.

        Args:
            pooled: Output of the text tower; empty rows from `StoredClassText`.

        Raises:
            AdapterError: If there are no vectors, real text arrives, or the number of texts is another one.
        """
        if self.current_adapter is None:
            return self.base_layer(pooled)
        vectors = self.active_vectors
        if pooled.shape[-1]:
            raise AdapterError(
                "The text tower of a PromptKD student was run on text; its adapter has class vectors instead. Use "
                "`disable_adapter()` for the base model's text features."
            )
        if len(pooled) not in (0, len(vectors)):
            raise AdapterError(
                f"Expected {len(vectors)} texts, one per stored class and in their order, got {len(pooled)}. "
                "`keep_classes` selects and reorders the stored classes."
            )
        return vectors.to(self.get_base_layer().weight.dtype)

    @property
    def active_vectors(self) -> Float[Tensor, "classes dim"]:
        """Vectors of the active adapter.

        Raises:
            AdapterError: If there is no active adapter, or it has none yet.
        """
        name = self.current_adapter
        if name is None or not len(self.vectors[name]):
            raise AdapterError(
                "Expected a PromptKD adapter with class vectors, got one without. Train it with `PromptKDObjective`, "
                "which stores those of the teacher, or call `set_class_vectors(class_names, vectors)`."
            )
        vectors = self.vectors[name]
        assert vectors is not None
        return vectors

    def stored_features(self, class_names: Sequence[str]) -> Float[Tensor, "classes dim"] | None:
        """Vectors of some classes by name, in float32; None while no adapter is active.

        Args:
            class_names: Any of the stored classes, in any order.

        Raises:
            AdapterError: If the vectors have no names.
            ClassNameError: If a class is not stored.
        """
        if self.current_adapter is None:
            return None
        vectors, names = self.active_vectors, self.adapter_configs[self.current_adapter].class_names
        if names is None or len(names) != len(vectors):
            raise AdapterError(
                f"The adapter has {len(vectors)} class vectors and {'no' if names is None else len(names)} class "
                "names. Store both together with `set_class_vectors(class_names, vectors)`."
            )
        return vectors.float()[self.rows_of(class_names, names)]  # in the order of the names that were asked for

    def rows_of(self, class_names: Sequence[str], stored: Sequence[str]) -> list[int]:
        """Positions of classes by name, as `places_of` finds them.

        Args:
            class_names: Classes that are wanted.
            stored: Classes that there are.

        Raises:
            ClassNameError: If one is missing.
        """
        check_list("class_names", class_names)
        rows = places_of(class_names, stored)
        unknown = [name for name, row in zip(class_names, rows, strict=True) if row is None]
        if unknown:
            raise ClassNameError(
                f"The adapter stores no class vector for {len(unknown)} of {len(class_names)} classes, the first is "
                f"{unknown[0]!r}; it has {len(stored)} classes, beginning {list(stored[:3])!r}. A PromptKD student "
                "cannot make vectors from text: `model.add_classes(names, teacher=..., tokenizer=..., template=...)` "
                "adds them."
            )
        return [row for row in rows if row is not None]

    def store(self, adapter_name: str, class_names: Sequence[str], vectors: Float[Tensor, "classes dim"]) -> None:
        """Replace an adapter's classes.

        Args:
            adapter_name: Its name.
            class_names: One per vector.
            vectors: Class vectors, not necessarily unit-norm.

        Raises:
            AdapterError: If width or number of the vectors do not fit, or a value is not finite.
        """
        names, config = check_class_names(class_names), self.adapter_configs[adapter_name]
        if vectors.shape != (len(names), config.class_dim):
            raise AdapterError(
                f"Expected {len(names)} class vectors, one per name, of `class_dim`={config.class_dim} numbers, got "
                f"{tuple(vectors.shape)}. The projector was built for that width: use a teacher with it, or a new "
                f"adapter with `PromptKDConfig(class_dim={vectors.shape[-1]})`."
            )
        lengths = vectors.detach().float().norm(dim=-1, keepdim=True)
        # vectors that are unit-norm keep their bits: adding classes must not change the others
        unit = torch.where((lengths - 1).abs() < 1e-5, vectors.detach().float(), vectors.detach().float() / lengths)
        if not bool(torch.isfinite(unit).all()):
            raise AdapterError("Expected finite class vectors, got inf or nan. Check the teacher's precision.")
        self.vectors[adapter_name] = unit.to(self.vectors[adapter_name].device)
        config.class_names, config.num_classes = list(names), len(names)


def stored_classes(model: nn.Module) -> StoredClasses:
    """The layer that holds the class vectors of a model's active PromptKD adapter.

    Args:
        model: `PeftModel`, or a base model with injected adapters.

    Raises:
        AdapterError: If there is none, or it is switched off.
    """
    layer = towers_of(model).text_head
    if not isinstance(layer, StoredClasses) or layer.current_adapter is None:
        raise AdapterError(
            f"Expected a model with an active PromptKD adapter, got `{type(model).__name__}` without one. Make it "
            "with `get_peft_model(student, PromptKDConfig(class_dim=...))`."
        )
    return layer


@contextmanager
def texts_are_stored_classes(model: nn.Module) -> Iterator[None]:
    """Declare that the texts given to a PromptKD student are its stored classes, in their order.

    Within the block `input_ids` are accepted, as pipelines pass them; their number is checked, their content is not
    read. The caller answers for the order.

    Args:
        model: Model with an active PromptKD adapter.
    """
    stored_classes(model)
    layer: Any = towers_of(model).text_tower
    before, layer.texts_are_classes = layer.texts_are_classes, True
    try:
        yield
    finally:
        layer.texts_are_classes = before
