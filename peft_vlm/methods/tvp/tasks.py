"""What a prompted model is trained to say: an answer, by a multimodal model, or a class, by a CLIP."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Protocol, runtime_checkable

from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_vlm.data.question_collator import (
    answer_logits,
    answers_of,
    check_image_tokens,
    model_inputs,
    question_inputs,
)
from peft_vlm.errors import AdapterError
from peft_vlm.models.towers import towers_of
from peft_vlm.models.visual_tokens import encode_visual_tokens, record_visual_tokens
from peft_vlm.text.answers import Candidates, candidate_scores
from peft_vlm.text.class_features import ClassFeatureCache
from peft_vlm.text.prompts import ClassPrompts


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
        """Compute the class features, which a pixel prompt does not change.

        Args:
            model: CLIP-like `PeftModel` with an active pixel prompt.
            batch: Not used.
        """
        self._class_features = self._cache.get(model, self.prompts, divide=True)

    def run(self, model: nn.Module, batch: Mapping[str, Tensor]) -> TaskOutput:
        """Mean over the images.

        Args:
            model: CLIP-like model.
            batch: `pixel_values` and `labels`.

        Raises:
            RuntimeError: If `prepare` was not called.
        """
        if self._class_features is None:
            raise RuntimeError("Expected `prepare(model, dataset)` before the first batch; the trainer calls it.")
        features, labels = self.encode(model, batch), batch["labels"]
        logits = towers_of(model).similarity_logits(features, self._class_features)
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
