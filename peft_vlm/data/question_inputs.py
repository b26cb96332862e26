"""What a batch of questions holds: the columns a model takes, the part before the answers, and image tokens."""

import inspect
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn

from peft_vlm.errors import DataError, UnsupportedModelError
from peft_vlm.models.towers import unwrap

#: Columns of a batch that are no inputs of the model.
NOT_INPUTS = ("labels", "index", "token_labels", "clip_pixel_values")
#: Columns with one entry per token of the sequence.
TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
#: Entry of `token_labels` where no answer is expected.
IGNORED = -100


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The columns of a batch that the model takes.

    Args:
        batch: What `QuestionCollator` made.
    """
    return {name: value for name, value in batch.items() if name not in NOT_INPUTS}


def question_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's inputs without the answers, for scoring answers; padded on the right.

    Args:
        batch: What `QuestionCollator` made.
    """
    inputs = model_inputs(batch)
    token_labels = batch.get("token_labels")
    # No decoder-only sequence begins with the answer; one for an encoder-decoder model holds nothing else.
    if token_labels is None or bool((token_labels[:, 0] != IGNORED).any()):
        return inputs
    is_answer = token_labels != IGNORED
    lengths = is_answer.int().argmax(dim=1)
    width = int(lengths.max())
    for name in TOKEN_COLUMNS:
        if name in inputs:
            inputs[name] = inputs[name][:, :width]
    # What is left of shorter questions' answers is masked, so that no model sees it.
    inputs["attention_mask"] = inputs["attention_mask"].masked_fill(is_answer[:, :width], 0)
    return inputs


@torch.no_grad()
def check_image_tokens(model: nn.Module, batch: Mapping[str, Any]) -> None:
    """Compare the image tokens of a batch with the image features the model makes, before training starts.

    Some models (BLIP-2) drop surplus features without a word, others stop in the first step.

    Args:
        model: Image-text model, with or without adapters.
        batch: What `QuestionCollator` made; on the model's device.

    Raises:
        DataError: If a question has no image token, the numbers differ, or token ids are not in the vocabulary.
        UnsupportedModelError: If the model does not say which token stands for an image.
    """
    base: Any = unwrap(model)
    token_id = getattr(base.config, "image_token_id", None)
    if token_id is None:
        raise UnsupportedModelError(
            f"The configuration of `{type(base).__name__}` names no image token (`image_token_id`). Checkpoints of "
            "BLIP-2 from before 2024 need `config.image_token_index`; save model and processor anew with it."
        )
    ids = batch["input_ids"]
    counts = (ids == token_id).sum(dim=1)
    if bool((counts == 0).any()):
        raise DataError(
            f"Question {int(counts.argmin())} of the batch has no image token (id {token_id}). Put the processor's "
            "image token into the template, and load processor and model from the same folder."
        )
    size = base.get_input_embeddings().num_embeddings
    largest = int(ids[ids != token_id].max())
    if largest >= size:
        raise DataError(
            f"Expected token ids below the vocabulary's {size}, got {largest}: the tokenizer is another model's."
        )
    parameters = inspect.signature(base.get_image_features).parameters
    columns = {name: batch[name] for name in parameters if name in batch}
    features = base.get_image_features(**columns, return_dict=True).pooler_output
    parts = [features] if isinstance(features, Tensor) else list(features)
    made = sum(part.numel() // part.shape[-1] for part in parts)
    if made != int(counts.sum()):
        raise DataError(
            f"Image tokens and image features differ: {int(counts.sum())} tokens ({counts.tolist()[:8]} per question) "
            f"and {made} features for {len(ids)} images. The processor's settings (`patch_size`, `image_seq_length`, "
            "`num_additional_image_tokens`, `vision_feature_select_strategy`, image size, `num_query_tokens`) must be "
            "those of the model: load both from the same folder."
        )
