"""Teachers: any CLIP-like model, with or without an adapter, in its own precision; without autograd, never saved."""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float
from peft import PeftModel
from torch import Tensor, nn
from transformers import BaseImageProcessor

from peft_vlm.data.transforms import mean_and_std_of
from peft_vlm.errors import ClassNameError, DataError
from peft_vlm.losses import average_teachers
from peft_vlm.models.towers import device_of, towers_of, unwrap
from peft_vlm.text.class_features import encode_classes
from peft_vlm.text.prompts import ClassPrompts


class Teacher:
    """One teacher and what it needs where it differs from the student.

    Args:
        model: CLIP-like model with its weights loaded; may be a `PeftModel` with the adapter to use active.
        prompts: Class prompts by its own tokenizer; None: those of the objective.
        image_processor: Its image processor, where image size, mean or standard deviation differ from the student's:
            the student's pixels are then resized and normalised anew.
        name: Recorded in the student's adapter; None: path of the model, and the kind of its adapter.
    """

    def __init__(
        self,
        model: nn.Module,
        *,
        prompts: ClassPrompts | None = None,
        image_processor: BaseImageProcessor | None = None,
        name: str | None = None,
    ) -> None:
        self.model, self.prompts, self.image_processor = model, prompts, image_processor
        self.name = _name_of(model) if name is None else name

    @property
    def logit_scale(self) -> float:
        """The factor in its logits."""
        return towers_of(self.model).logit_scale

    @property
    def vocab_size(self) -> int:
        """Tokens that its text tower knows."""
        return towers_of(self.model).vocab_size

    def to(self, device: torch.device) -> None:
        """Move the model to a device and to evaluation mode."""
        self.model.to(device).eval()

    def check_pixels(self, student: nn.Module) -> None:
        """Refuse a teacher of another family that would be fed pixels with the student's mean and deviation.

        Args:
            student: The student.

        Raises:
            DataError: If the families differ and there is no image processor.
        """
        if self.image_processor is None and type(towers_of(self.model)) is not type(towers_of(student)):
            raise DataError(
                f"The teacher {self.name!r} is of another family than the student and takes pixels with another mean "
                "and standard deviation. Pass `Teacher(model, prompts=..., image_processor=...)`."
            )

    def class_features(self, prompts: ClassPrompts) -> Float[Tensor, "classes dim"]:
        """Unit-norm class features, with the weights as they are now.

        Args:
            prompts: Classes in label order; the texts of `self.prompts` where there are any.

        Raises:
            ClassNameError: If the teacher's own prompts are for other classes.
        """
        own = prompts if self.prompts is None else self.prompts
        if own.class_names != prompts.class_names:
            raise ClassNameError(
                f"Expected prompts of the teacher {self.name!r} for the {len(prompts.class_names)} classes of the "
                f"objective, in their order, got {len(own.class_names)}, beginning {list(own.class_names[:3])!r}. "
                "Tokenise the objective's class names with this teacher's tokenizer."
            )
        with _own_precision(self.model):
            return encode_classes(self.model, own, divide=True)

    @torch.no_grad()
    def image_features(
        self, pixel_values: Float[Tensor, "batch channels rows cols"], transform: Any
    ) -> Float[Tensor, "batch dim"]:
        """Unit-norm image features in float32.

        Args:
            pixel_values: Pixels as the student gets them.
            transform: What made them; its mean and standard deviation are undone for another image processor.
        """
        towers = towers_of(self.model)
        with _own_precision(self.model):
            hidden = towers.embed_image(self._pixels(pixel_values, towers.model, transform))
            return nn.functional.normalize(towers.finish_image(hidden, 0).float(), dim=-1)

    def _pixels(self, pixels: Float[Tensor, "batch channels rows cols"], model: nn.Module, transform: Any) -> Tensor:
        """The student's pixels as this teacher takes them; rows and columns may be others."""
        size = towers_of(model).image_size
        if self.image_processor is None:
            if size != pixels.shape[-1]:
                raise DataError(
                    f"The teacher {self.name!r} takes images of {size} pixels, the student's have {pixels.shape[-1]}. "
                    "Pass `Teacher(model, image_processor=...)` to resize them for the teacher."
                )
            return pixels
        if transform is not None:
            # each (3, 1, 1); back to pixels in [0, 1], then as the teacher has them
            statistics = (transform.image_mean, transform.image_std, *mean_and_std_of(self.image_processor))
            mean, std, own_mean, own_std = (pixels.new_tensor(values)[:, None, None] for values in statistics)
            pixels = (pixels * std + mean - own_mean) / own_std
        if size == pixels.shape[-1]:
            return pixels
        return nn.functional.interpolate(pixels, size=(size, size), mode="bicubic", antialias=True)


class Teachers:
    """One or several teachers as one: features side by side, logits (not probabilities) averaged.

    Args:
        teachers: The first one's class vectors become the student's.
        weighting: `"equal"` or `"confidence"`, see `average_teachers`.
    """

    def __init__(self, teachers: Sequence[Teacher], *, weighting: str) -> None:
        self.members, self.weighting = list(teachers), weighting
        self.classes: list[Tensor] = []

    def prepare(self, prompts: ClassPrompts, device: torch.device) -> None:
        """Move to a device and compute the class features of each, once.

        Args:
            prompts: Classes in label order, tokenised for all teachers without prompts of their own.
            device: Where the student is.

        Raises:
            ClassNameError: If their vocabularies differ in size.
        """
        for teacher in self.members:
            teacher.to(device)
        # they read the same token ids
        sizes = [(teacher.name, teacher.vocab_size) for teacher in self.members if teacher.prompts is None]
        if len({size for _, size in sizes}) > 1:
            raise ClassNameError(
                f"Expected one vocabulary of all teachers that read the objective's prompts, got {sizes!r} tokens. "
                "Tokenise the classes with each teacher's own tokenizer and pass `Teacher(model, prompts=...)`."
            )
        self.classes = [teacher.class_features(prompts) for teacher in self.members]

    def features(
        self, pixel_values: Float[Tensor, "batch channels rows cols"], transform: Any
    ) -> Float[Tensor, "batch dim"]:
        """Image features of all teachers, one behind the other.

        Args:
            pixel_values: Pixels as the student gets them.
            transform: What made them.
        """
        return torch.cat([teacher.image_features(pixel_values, transform) for teacher in self.members], dim=-1)

    @torch.no_grad()
    def logits(self, features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """Averaged logits, each teacher's with its own logit scale.

        Args:
            features: What `features` gave.
        """
        # the columns of each teacher, whose spaces may differ in size
        parts = features.split([classes.shape[-1] for classes in self.classes], dim=-1)
        with torch.autocast(features.device.type, enabled=False):
            logits = [
                towers_of(teacher.model).similarity_logits(part, classes)
                for teacher, part, classes in zip(self.members, parts, self.classes, strict=True)
            ]
            return average_teachers(torch.stack(logits), weighting=self.weighting)  # (teachers, batch, classes)


def _own_precision(model: nn.Module) -> torch.autocast:
    """No autocast: a teacher runs in the type of its weights."""
    return torch.autocast(device_of(model).type, enabled=False)


def _name_of(model: nn.Module) -> str:
    base = str(getattr(unwrap(model), "name_or_path", "") or type(unwrap(model)).__name__)
    return f"{base} + {model.active_peft_config.peft_type.value}" if isinstance(model, PeftModel) else base
