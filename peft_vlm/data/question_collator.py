"""Collate questions: the inputs of a model, the part before the answers, and image tokens."""

import inspect
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import (
    BaseImageProcessor,
    Blip2Processor,
    InstructBlipProcessor,
    PaliGemmaProcessor,
)

from peft_vlm.data.questions import QuestionItem
from peft_vlm.data.shrink import ShrinkingProcessor
from peft_vlm.errors import DataError, UnsupportedModelError
from peft_vlm.models.towers import unwrap
from peft_vlm.text.answers import (
    Candidates,
    answer_token_ids,
    check_right_padding,
    last_positions,
    resolve_end_token,
    tokenize_candidates,
)

#: Columns of a batch that are no inputs of the model.
NOT_INPUTS = ("labels", "index", "token_labels", "clip_pixel_values")
#: Columns with one entry per token of the sequence.
TOKEN_COLUMNS = ("input_ids", "attention_mask", "token_type_ids", "mm_token_type_ids")
#: Entry of `token_labels` where no answer is expected.
IGNORED = -100


def model_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The columns of a batch that the model takes.

    Args:
        batch: Result of `QuestionCollator`.
    """
    return {name: value for name, value in batch.items() if name not in NOT_INPUTS}


def question_inputs(batch: Mapping[str, Any]) -> dict[str, Tensor]:
    """The model's inputs without the answers, for scoring answers; padded on the right.

    Args:
        batch: Result of `QuestionCollator`.
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
        batch: Result of `QuestionCollator`; on the model's device.

    Raises:
        DataError: If a question has no image token, the numbers differ, or token ids are not in the vocabulary.
        UnsupportedModelError: If the model does not name its image token.
    """
    base: Any = unwrap(model)
    token_id = getattr(base.config, "image_token_id", None)
    if token_id is None:
        raise UnsupportedModelError(
            f"The configuration of `{type(base).__name__}` names no image token (`image_token_id`). Checkpoints of "
            "BLIP-2 from before 2024 need `config.image_token_index`; save model and processor again with it."
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


def _check_image_settings(processor: Any) -> None:
    """Refuse a processor that counts the tokens of an image by the patch size and has none, as LLaVA's from 2023."""
    if "patch_size" in inspect.signature(type(processor).__init__).parameters and processor.patch_size is None:
        raise DataError(
            f"`{type(processor).__name__}` has no `patch_size`, by which it counts the tokens of an image. Set it as "
            "the model has it: `processor.patch_size = model.config.vision_config.patch_size`, and likewise "
            "`processor.vision_feature_select_strategy = model.config.vision_feature_select_strategy`."
        )


class QuestionCollator:
    r"""Makes model inputs from images, questions and answers with the model's own processor.

    The question is written with the processor's chat template, or else with `template`; the answer is tokenised on its
    own, appended to it and ended by the end token. Sequences are padded on the right.

    Columns: what the processor gives (`input_ids`, `attention_mask`, `pixel_values`, ...), `token_labels` (the tokens
    of the answer, -100 elsewhere; not there when no answer is known), `labels`, `index`, and `clip_pixel_values` when
    there is a second image processor. `model(**model_inputs(batch), labels=batch["token_labels"])` is the mean loss
    over all answer tokens of the batch.

    Args:
        processor: The model's processor: tokenizer and image processor in one. Images are handed to it as one list per
            question.
        template: Text with `{question}` and, where the processor wants one, its image token, such as
            `"<image>\n{question}"`. None: the chat template, or else the form the model family was trained with.
        answer_prefix: Text between question and answer, such as `"This is a photo of a"`.
        answer_format: Text around an answer with one `{}`; `" {}"` for byte-level tokenizers when the question ends
            without a space.
        end_token: Token that ends an answer; None: the tokenizer's end token. The official TVP code uses a newline.
        encoder_decoder: The language model has an encoder for the question and a decoder for the answer (BLIP-2 with
            T5): `token_labels` then holds the answer alone.
        clip_processor: Image processor of a CLIP that sees the same images, for `clip_pixel_values`.

    Raises:
        DataError: If the tokenizer cannot pad, the processor cannot count its image tokens, or `template` has no
            `{question}`.
    """

    def __init__(
        self,
        processor: Any,
        *,
        template: str | None = None,
        answer_prefix: str = "",
        answer_format: str = "{}",
        end_token: str | None = None,
        encoder_decoder: bool = False,
        clip_processor: BaseImageProcessor | None = None,
    ) -> None:
        self.processor, self.tokenizer = processor, processor.tokenizer
        if self.tokenizer.pad_token_id is None:
            raise DataError(
                f"`{type(self.tokenizer).__name__}` has no padding token. Set it, for example with "
                "`processor.tokenizer.pad_token = processor.tokenizer.eos_token`."
            )
        _check_image_settings(processor)
        if template is not None and "{question}" not in template:
            raise DataError(f"Expected a `template` with '{{question}}', got {template!r}.")
        self.template = template
        self.answer_prefix, self.answer_format = answer_prefix, answer_format
        self.end_token = resolve_end_token(self.tokenizer, end_token)
        self.encoder_decoder, self.clip_processor = encoder_decoder, clip_processor

    def prompt(self, question: str) -> str:
        """The text before the answer, with the image token where the processor needs one.

        Args:
            question: Text of the question.

        Raises:
            DataError: If the question contains the image token.
        """
        token = _image_text(self.processor)
        if token and token in question:
            raise DataError(f"The question {question!r} contains the image token {token!r}. Take it out.")
        if self.template is None and self.processor.chat_template is not None:
            content = [{"type": "image"}, {"type": "text", "text": question}]
            messages = [{"role": "user", "content": content}]
            text = self.processor.apply_chat_template(messages, add_generation_prompt=True)
        else:
            template = self.template or _default_template(self.processor)
            text = template.replace("{question}", question)
        return text + self.answer_prefix

    def encode_questions(self, items: Sequence[QuestionItem], *, padding_side: str = "right") -> dict[str, Tensor]:
        """Images and questions without answers.

        Args:
            items: Items of a dataset.
            padding_side: `"right"`, or `"left"` for generation.

        Raises:
            DataError: If the tokenizer ends every text with its end token, after which no answer can follow.
        """
        texts = [self.prompt(item["question"]) for item in items]
        bos = self.tokenizer.bos_token
        encoded = self.processor(
            images=[[item["image"]] for item in items],
            text=texts,
            padding=True,
            padding_side=padding_side,
            # a chat template writes the start token itself
            add_special_tokens=not (bos and texts[0].startswith(bos)),
            return_tensors="pt",
        )
        columns = {name: value for name, value in encoded.items() if isinstance(value, Tensor) and name != "labels"}
        last = columns["input_ids"][0, int(last_positions(columns["attention_mask"])[0])]
        if (
            not self.encoder_decoder
            and int(last) == self.tokenizer.eos_token_id
            and not texts[0].endswith(str(self.tokenizer.eos_token))
        ):
            raise DataError(
                f"`{type(self.tokenizer).__name__}` puts its end token after every question, and an answer after "
                "the end is never read. Load the tokenizer of the language model, or set "
                "`tokenizer.add_eos_token = False`; for a model with an encoder pass `encoder_decoder=True`."
            )
        return columns

    def __call__(self, items: Sequence[QuestionItem]) -> dict[str, Tensor]:
        """A batch, see the class.

        Args:
            items: Items of a dataset, all with an answer or all without.

        Raises:
            DataError: If some items have an answer and others not.
        """
        batch = self.encode_questions(items)
        answers = [item["answer"] for item in items]
        known = [answer for answer in answers if answer is not None]
        if known and len(known) < len(answers):
            position = items[answers.index(None)]["index"]
            raise DataError(f"Image {position} has no answer, others of its batch have one. Give all an answer.")
        if known:
            ids = answer_token_ids(self.tokenizer, known, answer_format=self.answer_format, end_token=self.end_token)
            batch = self._with_answers(batch, ids)
        batch["labels"] = torch.tensor([item["labels"] for item in items])
        batch["index"] = torch.tensor([item["index"] for item in items])
        if self.clip_processor is not None:
            images = [item["image"] for item in items]
            batch["clip_pixel_values"] = self.clip_processor(images, return_tensors="pt")["pixel_values"]
        return batch

    def candidates(self, names: Sequence[str], *, include_end: bool) -> Candidates:
        """Answers to choose from, tokenised as the answers of a batch are.

        Args:
            names: Answers, such as class names.
            include_end: As for `tokenize_candidates`.
        """
        options = {"answer_format": self.answer_format, "end_token": self.end_token}
        return tokenize_candidates(self.tokenizer, names, include_end=include_end, **options)

    def _with_answers(self, questions: dict[str, Tensor], answers: list[list[int]]) -> dict[str, Tensor]:
        if self.encoder_decoder:
            width = max(map(len, answers))
            rows = [[*ids, *[IGNORED] * (width - len(ids))] for ids in answers]
            return questions | {"token_labels": torch.tensor(rows)}
        lengths = questions["attention_mask"].sum(dim=1).tolist()
        check_right_padding(questions["attention_mask"])
        width = max(length + len(ids) for length, ids in zip(lengths, answers, strict=True))
        types = self._answer_types(questions)
        fills = {"input_ids": self.tokenizer.pad_token_id, "token_labels": IGNORED}
        present = [name for name in TOKEN_COLUMNS if name in questions]
        columns = {
            name: torch.full((len(lengths), width), fills.get(name, 0), dtype=torch.long)
            for name in (*present, "token_labels")
        }
        for row, (length, ids) in enumerate(zip(lengths, answers, strict=True)):
            tokens, end = torch.tensor(ids), length + len(ids)
            for name in present:
                columns[name][row, :length] = questions[name][row, :length]
                columns[name][row, length:end] = tokens if name == "input_ids" else types[name]
            columns["token_labels"][row, length:end] = tokens
        return questions | columns

    def _answer_types(self, questions: Mapping[str, Tensor]) -> dict[str, int]:
        """Values of each column other than the ids at answer tokens."""
        types = {"attention_mask": 1, "token_type_ids": 0, "mm_token_type_ids": 0}
        # PaliGemma marks what follows the prefix with 1; Gemma 3 marks the image with 1 and all text with 0.
        if isinstance(_own_processor(self.processor), PaliGemmaProcessor):
            types["token_type_ids"] = 1
        return types


def _image_text(processor: Any) -> str:
    """The text that represents one image in a question; empty where the processor adds it itself.

    Args:
        processor: Processor of an image-text model.
    """
    own = _own_processor(processor)
    if isinstance(own, Blip2Processor | InstructBlipProcessor):
        return ""
    return str(own.image_token)


def _default_template(processor: Any) -> str:
    """The text of a question for a processor without chat template.

    Args:
        processor: Processor of an image-text model.
    """
    own = _own_processor(processor)
    if isinstance(own, Blip2Processor | InstructBlipProcessor):
        return "{question}"
    separator = "" if isinstance(own, PaliGemmaProcessor) else "\n"
    return _image_text(processor) + separator + "{question}"


def check_shrinking(collator: Any, prompt: Any) -> None:
    """Refuse a collator that shrinks images twice, not at all, or into another window than a pixel prompt's.

    Args:
        collator: A `QuestionCollator`; others are left alone.
        prompt: The prompt's `PixelSettings`.

    Raises:
        DataError: If its processors do not fit the prompt; every image would be wrong, without an error.
    """
    if not isinstance(collator, QuestionCollator):
        return
    for name in ("processor", "clip_processor"):
        processor = getattr(collator, name)
        shrinks = isinstance(processor, ShrinkingProcessor)
        if shrinks and prompt.shrink == "model":
            raise DataError(
                f"Expected a `{name}` without `ShrinkingProcessor`, since the model shrinks images (`shrink='model'`) "
                "or gets them at full size, got one. Give the collator the model's own."
            )
        if processor is None or prompt.shrink != "processor":
            continue
        if not shrinks or processor.border * prompt.canvas_size != prompt.border * processor.canvas_size:
            got = f"canvas {processor.canvas_size}, border {processor.border}" if shrinks else type(processor).__name__
            raise DataError(
                f"Expected a `{name}` that shrinks images for a prompt with `shrink='processor'`, got {got}. Give the "
                f"collator `ShrinkingProcessor({name}, canvas_size={prompt.canvas_size}, border={prompt.border})`."
            )


def _own_processor(processor: Any) -> Any:
    return processor.processor if isinstance(processor, ShrinkingProcessor) else processor


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
    """Logits before the answer tokens, in float32, and the tokens they predict; one row per answer token.

    No others are computed where a model can do that. The mean cross-entropy of the rows is the model's own loss: a
    mean over all answer tokens of the batch, in which a long answer weighs more.

    Args:
        model: Multimodal or language model; with an encoder for the question, `answers` holds the answer alone.
        inputs: Inputs of the model.
        answers: Result of `answers_of`.
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
    is_answer = answers != IGNORED
    return logits[is_answer].float(), answers[is_answer]
