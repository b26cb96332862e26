"""What a language model says where the answer stands: its logits for the answer's tokens, and the right tokens."""

import inspect
from collections.abc import Mapping

from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_vlm.data.question_inputs import IGNORED
from peft_vlm.errors import DataError
from peft_vlm.models.towers import unwrap


def answers_of(batch: Mapping[str, Tensor]) -> Int[Tensor, "batch tokens"]:
    """The answers of a batch as token ids, -100 elsewhere.

    Args:
        batch: Columns of `QuestionCollator`.

    Raises:
        DataError: If no answer is known.
    """
    answers = batch.get("token_labels")
    if answers is None or not bool((answers != IGNORED).any()):
        raise DataError(
            "Expected a batch with answers (`token_labels`), got none. Train on a dataset with class names or an "
            "answer column, collated by a `QuestionCollator`."
        )
    return answers


def answer_logits(
    model: nn.Module, inputs: Mapping[str, Tensor], answers: Int[Tensor, "batch tokens"]
) -> tuple[Float[Tensor, "rows columns"], Int[Tensor, " rows"]]:
    """Logits in front of answer tokens, in float32, and the tokens they predict; one row per answer token.

    No others are computed where a model can do that. The mean cross-entropy of the rows is the model's own loss: a
    mean over all answer tokens of the batch, in which a long answer weighs more.

    Args:
        model: Multimodal or language model; with an encoder for the question, `answers` holds the answer alone.
        inputs: What the model takes.
        answers: What `answers_of` gave.
    """
    base = unwrap(model)
    if base.config.get_text_config().is_encoder_decoder:
        logits = model(**inputs, labels=answers, use_cache=False).logits
    else:
        answers = answers[:, 1:]
        places = (answers != IGNORED).any(dim=0).nonzero().squeeze(1)
        if "logits_to_keep" in inspect.signature(base.forward).parameters:
            logits = model(**inputs, use_cache=False, logits_to_keep=places).logits
        else:
            logits = model(**inputs, use_cache=False).logits[:, places]
        answers = answers[:, places]
    told = answers != IGNORED
    return logits[told].float(), answers[told]
