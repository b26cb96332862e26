"""What a prompted model is trained to say, and the frozen models that share its prompt in training.

An answer is said by a multimodal model, a class by a CLIP. Further sources train the prompt beside the first; the
CLIP of TSE says how much of the right class it sees.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol, runtime_checkable

import torch
from jaxtyping import Float, Int
from peft import PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import CLIPImageProcessorPil
from transformers.modeling_layers import GradientCheckpointingLayer

from peft_vlm.adapters.pixel_prompt import active_name, prompt_layer_of, remove_prompts
from peft_vlm.data.question_collator import (
    answer_logits,
    answers_of,
    check_image_tokens,
    model_inputs,
    question_inputs,
)
from peft_vlm.data.questions import ImageQuestionDataset
from peft_vlm.errors import AdapterError, DataError
from peft_vlm.methods.tvp.config import TVPConfig
from peft_vlm.models.towers import device_of, towers_of, unwrap
from peft_vlm.models.vision import encode_visual_tokens, input_size_of, record_visual_tokens
from peft_vlm.objective import prepared
from peft_vlm.text.answers import Candidates, candidate_scores
from peft_vlm.text.class_features import ClassFeatureCache, encode_classes
from peft_vlm.text.prompts import ClassPrompts, readable


@dataclass
class TaskOutput:
    """One forward pass of a task.

    Args:
        loss: Mean cross-entropy in float32.
        logits: Rows that the loss was taken over, as in `ObjectiveOutput`.
        labels: Right column of each row.
        tokens: Visual tokens of the batch, with their gradients.
    """

    loss: Float[Tensor, ""]
    logits: Float[Tensor, "batch classes"]
    labels: Int[Tensor, " batch"]
    tokens: Float[Tensor, "tokens width"]


@runtime_checkable
class Task(Protocol):
    """What the objective needs of a task; it keeps nothing of a model beyond what `prepare` computes."""

    #: Name of the loss term.
    term: str

    def prepare(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Check the model against a first batch and compute what stays the same.

        Args:
            model: `PeftModel` with an active pixel prompt.
            batch: On the model's device.
        """
        ...

    def run(self, model: nn.Module, batch: Mapping[str, Tensor]) -> TaskOutput:
        """Loss of a training batch."""
        ...

    def encode(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "tokens width"]:
        """The visual tokens of a batch alone."""
        ...

    def predict(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch classes"]:
        """A score per class, the highest for the predicted one."""
        ...


class AnswerTask:
    """Answers of a multimodal model: the language model's loss on the tokens of the answer alone.

    Args:
        candidates: Answers that stand for the classes; None for free answers, which have no scores.
    """

    term = "language"

    def __init__(self, candidates: Candidates | None) -> None:
        self.candidates = candidates

    def prepare(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Compare image tokens with image features.

        Args:
            model: `PeftModel` with an active pixel prompt.
            batch: On the model's device.
        """
        answers_of(batch)
        check_image_tokens(model, batch)

    def run(self, model: nn.Module, batch: Mapping[str, Tensor]) -> TaskOutput:
        """Mean over all answer tokens of the batch, so a long answer weighs more, as in the official code.

        Args:
            model: Multimodal model.
            batch: Columns of `QuestionCollator`.
        """
        with record_visual_tokens(model) as recorded:
            # (answer tokens of the batch, vocabulary), and the token that is right in each row
            logits, targets = answer_logits(model, model_inputs(batch), answers_of(batch))
        return TaskOutput(nn.functional.cross_entropy(logits, targets), logits, targets, recorded.tokens)

    def encode(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "tokens width"]:
        """What enters the language model.

        Args:
            model: Multimodal model.
            batch: Columns of `QuestionCollator`.
        """
        return encode_visual_tokens(model, batch)

    def predict(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch classes"]:
        """Mean log-probability of each candidate's tokens.

        Args:
            model: Multimodal model.
            batch: Columns of `QuestionCollator`.

        Raises:
            AdapterError: If there are no candidates.
        """
        if self.candidates is None:
            raise AdapterError(
                "Expected candidate answers to choose from, got none: free answers have no scores. Pass "
                "`tokenize_candidates(tokenizer, class_names)` to the objective, or leave out `eval_dataset` and "
                "compare generated answers."
            )
        return candidate_scores(model, question_inputs(batch), self.candidates)


class ClassTask:
    """Classes of a CLIP-like model: cross-entropy over its class prompts. Its one visual token is the image feature.

    Args:
        prompts: Class prompts of the model.
    """

    term = "cross_entropy"

    def __init__(self, prompts: ClassPrompts) -> None:
        self.prompts = prompts
        self._cache = ClassFeatureCache()
        self._class_features: Tensor | None = None

    def prepare(self, model: nn.Module, batch: Mapping[str, Tensor]) -> None:
        """Compute the class features, which a pixel prompt does not change."""
        self._class_features = self._cache.get(model, self.prompts, divide=True)

    def run(self, model: nn.Module, batch: Mapping[str, Tensor]) -> TaskOutput:
        """Mean over the images.

        Args:
            model: CLIP-like model.
            batch: `pixel_values` and `labels`.

        Raises:
            RuntimeError: If `prepare` was not called.
        """
        classes = prepared(self._class_features)
        features, labels = self.encode(model, batch), batch["labels"]  # (batch, dim), one token per image
        logits = towers_of(model).similarity_logits(features, classes)
        return TaskOutput(nn.functional.cross_entropy(logits, labels), logits, labels, features)

    def encode(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "tokens width"]:
        """Image features, one per image.

        Args:
            model: CLIP-like model.
            batch: `pixel_values`.
        """
        towers = towers_of(model)
        return towers.finish_image(towers.embed_image(batch["pixel_values"]), 0)

    def predict(self, model: nn.Module, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch classes"]:
        """Scaled cosines to the class features.

        Args:
            model: CLIP-like model.
            batch: `pixel_values`.
        """
        return towers_of(model).similarity_logits(self.encode(model, batch), self._cache.get(model, self.prompts))


def set_eval_mode(model: nn.Module) -> None:
    """Evaluation mode for everything but layers that recompute their activations, which do so in training mode only.

    The frozen model then answers as its users see it, without dropout; a rate that such a layer applies by itself, as
    OPT's do, is set to 0. The mode stays until something else sets it, because layers are recomputed in the backward
    pass.

    Args:
        model: Model with its adapter.
    """
    for module in model.modules():
        module.training = _recomputes(module)  # transformers recomputes in training mode alone
        if module.training and isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0


def _recomputes(module: nn.Module) -> bool:
    """Whether a module is a layer that computes its activations again in the backward pass.

    Args:
        module: Any module.
    """
    return isinstance(module, GradientCheckpointingLayer) and module.gradient_checkpointing


def batch_at(dataset: Any, positions: Sequence[int], device: torch.device) -> dict[str, Tensor]:
    """The batch of some positions of a dataset.

    Args:
        dataset: Images, or questions about images.
        positions: Positions.
        device: Where the batch is wanted.
    """
    batch = dataset.collate([dataset[position] for position in positions])
    return {name: column.to(device) for name, column in batch.items()}


KEPT_FIELDS = ("canvas_size", "border", "shape", "patch_size", "shrink", "clamp")
"""What makes a prompt what it is, on whatever model."""


def share_prompt(source: PeftModel, model: nn.Module, *, processor: Any = None) -> PeftModel:
    """Wrap another model with an adapter whose prompt is the very parameter of the source's active adapter.

    A step of an optimizer on one of them is a step on all, and their gradients add up. Save the source.

    Args:
        source: `PeftModel` with an active TVP adapter.
        model: Another model of any architecture, for example the CLIP of TSE or a second multimodal model; its own
            weights are frozen.
        processor: Its processor, for mean and standard deviation; by default what is stored beside the model.

    Returns:
        The wrapped model, whose adapter has the name of the source's.
    """
    layer = prompt_layer_of(source)
    name = active_name(layer)
    settings = {key: getattr(source.peft_config[name], key) for key in KEPT_FIELDS}
    config = TVPConfig(**settings) if processor is None else TVPConfig.for_processor(processor, **settings)
    shared = get_peft_model(model, config, adapter_name=name)
    prompt_layer_of(shared).prompts[name] = layer.prompts[name]  # the same `Parameter`, no copy
    return shared


@dataclass(frozen=True)
class Source:
    """A multimodal model beside the one the trainer is given.

    Args:
        model: The model, without adapters; a pixel prompt of an earlier run is taken off it. It is frozen and wrapped
            when training begins.
        dataset: The training images in the same order, with the collator of this model.
        processor: Its processor, for mean and standard deviation; by default what is stored beside the model.
    """

    model: nn.Module
    dataset: ImageQuestionDataset
    processor: Any = None


def check_same_images(sources: Sequence[Source], dataset: Any) -> None:
    """Refuse sources whose datasets cannot hold the same images.

    Args:
        sources: Further models with their datasets.
        dataset: The training images.

    Raises:
        DataError: If a dataset has another length, other labels or other class names.
    """
    for number, source in enumerate(sources):
        other = source.dataset
        if list(other.labels) != list(dataset.labels) or tuple(other.class_names) != tuple(dataset.class_names):
            raise DataError(
                f"Expected the images of the training dataset in the dataset of source {number}, got "
                f"{len(other)} images of {len(other.class_names)} classes for {len(dataset)} of "
                f"{len(dataset.class_names)}, or other labels. Make it with `dataset.with_collator(collator)`."
            )


def share_once(shared: PeftModel | None, source: PeftModel, model: nn.Module, *, processor: Any) -> PeftModel:
    """The other model with the source's prompt; as it is, when it has this prompt already.

    It recomputes its activations if the source does: the trainer switches that on for its own model alone.

    Args:
        shared: What an earlier call gave, None at first.
        source: `PeftModel` with an active TVP adapter.
        model: The other model.
        processor: Its processor.
    """
    layer = prompt_layer_of(source)
    name = active_name(layer)
    if shared is not None and name in prompt_layer_of(shared).prompts:
        if prompt_layer_of(shared).prompts[name] is layer.prompts[name]:
            return shared
    remove_prompts(model)
    if any(map(_recomputes, source.modules())):
        unwrap(model).activation_checkpointing_enable()
    return share_prompt(source, model, processor=processor)


class ClipGuide:
    """A frozen CLIP with class prompts of its own, on which the prompt in training is added too.

    The features of the class prompts are computed once: nothing on the text side ever changes.

    Args:
        model: CLIP-like model of any size. It is wrapped when training begins.
        prompts: The classes in label order, tokenised for it. Official template: `"this is a photo of a {}"`.
        processor: Its image processor; batches then have `clip_pixel_values` made by it. None: it looks at
            `pixel_values`, normalised as for the trained model, which then must have its input size. The official code
            does so, with models of one size and normalisation.
    """

    def __init__(self, model: nn.Module, prompts: ClassPrompts, *, processor: Any = None) -> None:
        self.model, self.prompts, self.processor = model, prompts, processor
        self._shared: PeftModel | None = None
        self._class_features: Tensor | None = None

    def prepare(self, source: PeftModel, class_names: Sequence[str]) -> None:
        """Put the source's prompt on the CLIP and compute its class features.

        Args:
            source: Trained model with an active TVP adapter, on its device.
            class_names: Classes that the labels of the training images index.

        Raises:
            DataError: If the CLIP's prompts are of other classes.
        """
        own, expected = ([readable(n) for n in names] for names in (self.prompts.class_names, class_names))
        if own != expected:
            raise DataError(
                f"Expected class prompts of the CLIP for the {len(expected)} classes of the training images in their "
                f"order, beginning {expected[:3]!r}, got {len(own)}, beginning {own[:3]!r}. Make them with "
                "`tokenize_for_model(clip, tokenizer, dataset.class_names, template='this is a photo of a {}')`."
            )
        processor = self.processor
        if processor is None:  # it gets the pixels of the model in training
            config = source.active_peft_config
            processor = CLIPImageProcessorPil(image_mean=list(config.image_mean), image_std=list(config.image_std))
        self._shared = share_once(self._shared, source, self.model, processor=processor)
        self._shared.to(device_of(source)).eval()
        self.refresh()

    def refresh(self) -> None:
        """Compute the class features anew."""
        self._class_features = encode_classes(self._shared, self.prompts, divide=True)

    def logits(self, batch: Mapping[str, Tensor]) -> Float[Tensor, "batch classes"]:
        """Scaled cosines between the prompted images and the classes.

        Args:
            batch: `clip_pixel_values`, or `pixel_values` when the CLIP has no processor of its own.

        Raises:
            DataError: If the column is missing or of another size than the CLIP takes.
            RuntimeError: If `prepare` was not called.
        """
        if self._shared is None or self._class_features is None:
            raise RuntimeError(
                "Expected `prepare(source, class_names)` before the first batch; the objective calls it."
            )
        column = "pixel_values" if self.processor is None else "clip_pixel_values"
        pixels, size = batch.get(column), input_size_of(self._shared)
        if pixels is None or pixels.ndim != 4 or (size is not None and tuple(pixels.shape[-2:]) != size):
            shape = None if pixels is None else tuple(pixels.shape)
            raise DataError(
                f"Expected `{column}` of {size} pixels per image for the CLIP of TSE, got {shape!r}. Give its image "
                "processor to both `ClipGuide(..., processor=...)` and `QuestionCollator(..., clip_processor=...)`."
            )
        towers = towers_of(self._shared)
        images = towers.finish_image(towers.embed_image(pixels), 0)  # frozen, yet with a gradient to the prompt
        return towers.similarity_logits(images, self._class_features)
