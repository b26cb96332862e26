"""The frozen zero-shot teacher of RPP's soft labels, and class features of long class lists."""

import dataclasses
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.data.feature_store import RowStore
from peft_vlm.distributed import local_place, part_of
from peft_vlm.errors import ClassNameError, DataError
from peft_vlm.models.towers import towers_of
from peft_vlm.objective import check_other_model
from peft_vlm.text.class_features import encode_classes
from peft_vlm.text.prompts import ClassPrompts


def stream_class_features(model: nn.Module, prompts: ClassPrompts, *, storage: str, chunk_size: int) -> RowStore:
    """Class features of a model as it is now, one pass in chunks; only a chunk is in memory with storage `"disk"`.

    The processes of a machine divide the pass and share the features.

    Args:
        model: CLIP-like model, with or without adapters.
        prompts: Its class prompts.
        storage: `"ram"` or `"disk"`.
        chunk_size: Classes per forward pass.
    """
    store = RowStore(storage, name="class features")
    count = len(prompts.class_names)
    index, parts = local_place()
    part = part_of(count, index=index, parts=parts) or range(1)  # every process takes part in `allocate`
    for rows in torch.tensor(part).split(chunk_size):
        features = encode_classes(model, _some_classes(prompts, rows))
        store.allocate((count, features.shape[-1]), torch.float32)
        store.write(rows, features)
    store.complete()
    return store


def _some_classes(prompts: ClassPrompts, rows: Tensor) -> ClassPrompts:
    """The prompts of some classes, in all templates.

    Args:
        prompts: Prompts of all classes.
        rows: Positions of the classes.
    """
    count = len(prompts.class_names)
    templates = torch.arange(len(prompts.templates))[:, None] * count
    lengths = prompts.name_lengths
    return dataclasses.replace(
        prompts,
        class_names=tuple(prompts.class_names[row] for row in rows.tolist()),
        input_ids=prompts.input_ids[(templates + rows).flatten()],
        name_lengths=None if lengths is None else tuple(lengths[row] for row in rows.tolist()),
    )


class ZeroShotTeacher:
    """A CLIP whose class probabilities are the soft labels.

    Args:
        model: CLIP-like model with its weights loaded, with or without an adapter; not trained and not saved.
        prompts: Class prompts by its own tokenizer.
        storage: Where its class features are kept, `"ram"` or `"disk"`.
        chunk_size: Classes per forward pass.
    """

    def __init__(self, model: nn.Module, prompts: ClassPrompts, *, storage: str, chunk_size: int) -> None:
        self.model, self.prompts, self.storage, self.chunk_size = model, prompts, storage, chunk_size
        self.classes: RowStore | None = None

    def prepare(self, student: nn.Module) -> None:
        """Move to the student's device and compute the class features, once.

        Args:
            student: Model that learns.

        Raises:
            AdapterError: If the student is its own teacher.
            DataError: If the two take images of different sizes.
        """
        check_other_model(self.model, student)
        sizes = [towers_of(model).image_size for model in (student, self.model)]
        if sizes[0] != sizes[1]:
            raise DataError(
                f"Expected a teacher for images of {sizes[0]} pixels, as the student's, got one for {sizes[1]}. Both "
                "see the same pixel values; choose a teacher of the student's image size."
            )
        device = next(student.parameters()).device
        self.model.to(device).eval()
        if self.classes is None:
            options: dict[str, Any] = {"storage": self.storage, "chunk_size": self.chunk_size}
            with torch.autocast(device.type, enabled=False):  # as the image features
                self.classes = stream_class_features(self.model, self.prompts, **options)

    @torch.no_grad()
    def image_features(self, pixel_values: Float[Tensor, "batch channels rows cols"]) -> Float[Tensor, "batch dim"]:
        """Image features in float32, in the type of its weights whatever the run's mixed precision.

        Args:
            pixel_values: Pixels as the student gets them.
        """
        towers = towers_of(self.model)
        with torch.autocast(pixel_values.device.type, enabled=False):
            return towers.finish_image(towers.embed_image(pixel_values), 0).float()

    @torch.no_grad()
    def logits(self, images: Float[Tensor, "batch dim"], classes: Tensor) -> Float[Tensor, "batch selected"]:
        """Scaled logits over some classes.

        Args:
            images: What `image_features` gave.
            classes: Positions of the classes.
        """
        assert self.classes is not None, "`prepare` comes first"
        return towers_of(self.model).similarity_logits(images, self.classes.read(classes, images.device))


def check_same_classes(prompts: ClassPrompts, teacher_prompts: ClassPrompts) -> None:
    """Refuse a teacher whose rows are other classes.

    Args:
        prompts: Class prompts of the student.
        teacher_prompts: Class prompts of the teacher.

    Raises:
        ClassNameError: If names or their order differ.
    """
    if teacher_prompts.class_names != prompts.class_names:
        raise ClassNameError(
            f"Expected `teacher_prompts` of the {len(prompts.class_names)} classes of `prompts`, in their order, got "
            f"{len(teacher_prompts.class_names)}, beginning {list(teacher_prompts.class_names[:3])!r}. Tokenise the "
            "same names."
        )
