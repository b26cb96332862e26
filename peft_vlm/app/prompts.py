"""A pixel prompt on several multimodal models: the prompted image, the prompt, and what each model answers."""

import threading
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path

import torch
from peft import PeftModel
from PIL import Image
from torch import nn
from transformers import AutoModelForImageTextToText, AutoProcessor

from peft_vlm.adapters.adapter_files import AdapterSource
from peft_vlm.adapters.config import check_weights, config_of
from peft_vlm.adapters.pixel_prompt import (
    active_name,
    draw_prompt,
    prompt_layer_of,
    prompt_of,
    show_prompted,
)
from peft_vlm.app.compare import SHOWN_LABELS, WRONG, Answer, unique_names
from peft_vlm.classifier import Prediction
from peft_vlm.data.images import read_image
from peft_vlm.data.question_collator import QuestionCollator, question_inputs
from peft_vlm.data.questions import ImageQuestionDataset, QuestionItem
from peft_vlm.errors import AdapterError, DataError
from peft_vlm.evaluation.mllm import generate_answers
from peft_vlm.models.repository import hub_options
from peft_vlm.models.towers import device_of
from peft_vlm.serving.escape import one_line
from peft_vlm.text.answers import candidate_scores

#: Rows and columns of the images that are shown.
SIDE = 224
#: Letters of a question.
MAX_QUESTION = 500


def is_pixel_prompt(adapter: str) -> bool:
    """Return whether an adapter is a pixel prompt for a multimodal model.

    Args:
        adapter: Folder or Hub id.
    """
    config = config_of(AdapterSource.find(adapter))
    made_for = str((getattr(config, "base_architecture", None) or {}).get("model_type", ""))
    return hasattr(config, "pixel_settings") and not made_for.startswith(("clip", "siglip"))


@contextmanager
def _prompt_strength(model: nn.Module, strength: float) -> Iterator[None]:
    """Inside, the active prompt of a model acts with so many times its values.

    Args:
        model: `PeftModel` with a pixel prompt.
        strength: Factor; 0 for none of it, 1 for the prompt as it was trained.
    """
    layer = prompt_layer_of(model)
    prompt = layer.prompts[active_name(layer)].data
    trained = prompt.clone()
    prompt.mul_(strength)
    try:
        yield
    finally:
        prompt.copy_(trained)


class PromptedModels:
    """Multimodal models that share one pixel prompt; one question is answered at a time.

    Args:
        models: Models with the prompt and their collators, by the name that is shown.

    Raises:
        AdapterError: If there is none.
    """

    def __init__(self, models: Mapping[str, tuple[PeftModel, QuestionCollator]]) -> None:
        if not models:
            raise AdapterError("Expected at least one multimodal model for a pixel prompt, got none.")
        self.models = dict(models)
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        adapter: str,
        bases: Sequence[str] = (),
        *,
        device: str | None = None,
        tell: Callable[[str], None] = lambda name: None,
    ) -> "PromptedModels":
        """Put a prompt onto the model it was trained on and onto others.

        Args:
            adapter: Folder or Hub id of a TVP adapter.
            bases: Folders or ids of further multimodal models.
            device: Device; None takes a GPU if there is one.
            tell: Called with the name of each before it is loaded.

        Raises:
            AdapterError: If the adapter names no base model, or a model cannot be loaded.
        """
        source = AdapterSource.find(adapter)
        config = config_of(source)
        check_weights(source, config)
        own = config.base_model_name_or_path
        if not own and not bases:
            raise AdapterError(f"The adapter {adapter!r} records no base model. Pass `models=` with one.")
        wanted = list(dict.fromkeys([*filter(None, [own]), *bases]))
        target = torch.device(device or ("cuda" if torch.cuda.is_available() else "cpu"))
        models = {}
        for name, base in zip(unique_names(wanted), wanted, strict=True):
            tell(name)
            models[name] = _load(base, source, config.revision if base == own else None, target)
        return cls(models)

    @property
    def first(self) -> PeftModel:
        """The model it was trained on."""
        return next(iter(self.models.values()))[0]

    def views(self, image: str | Path | Image.Image, strength: float = 1.0) -> tuple[Image.Image, ...]:
        """The clean image, the prompted one, and the prompt itself, as squares of 224 px.

        Args:
            image: File or image.
            strength: See `_prompt_strength`.
        """
        opened = read_image(image, where="the image")
        with self._lock:
            limit = float(prompt_of(self.first).abs().max()) or 1.0
            with _prompt_strength(self.first, strength):
                sheet = show_prompted(self.first, [opened], side=SIDE)
                layer = prompt_layer_of(self.first)
                mask = layer.settings[active_name(layer)].mask()
                prompt = draw_prompt(prompt_of(self.first), mask, limit=limit, side=SIDE)
        clean, prompted = sheet.crop((0, 0, SIDE, SIDE)), sheet.crop((0, SIDE, SIDE, 2 * SIDE))
        return clean, prompted, prompt

    def answers(
        self, image: str | Path | Image.Image, question: str, classes: Sequence[str] = (), *, strength: float = 1.0
    ) -> list[tuple[Answer, Answer]]:
        """What each model answers about the clean and the prompted image.

        Args:
            image: File or image.
            question: Question about it.
            classes: Answers to choose from; without any the model writes one.
            strength: See `_prompt_strength`.

        Raises:
            DataError: If there is no question or no image.
        """
        if not question.strip() or len(question) > MAX_QUESTION:
            raise DataError(f"Expected a question of 1 to {MAX_QUESTION} characters, got {len(question.strip())}.")
        opened = read_image(image, where="the image")
        pairs = []
        with self._lock:
            for name, (model, collator) in self.models.items():
                with model.disable_adapter():
                    clean = _answer(name, model, collator, opened, question, classes)
                with _prompt_strength(model, strength):
                    pairs.append((clean, _answer(name, model, collator, opened, question, classes)))
        return pairs


def _load(
    base: str, source: AdapterSource, revision: str | None, device: torch.device
) -> tuple[PeftModel, QuestionCollator]:
    options = hub_options(base, revision=revision)
    twice = {"adapter_kwargs": {"local_files_only": options["local_files_only"]}}
    try:
        model = AutoModelForImageTextToText.from_pretrained(base, **options, **twice)
        processor = AutoProcessor.from_pretrained(base, **options)
    except (OSError, ValueError, LookupError, AttributeError, RuntimeError) as error:
        raise AdapterError(f"The multimodal model {base!r} could not be loaded: {one_line(error)}") from error
    model = PeftModel.from_pretrained(model, str(source.folder()))
    return model.eval().to(device), QuestionCollator(processor)


def _answer(
    name: str,
    model: PeftModel,
    collator: QuestionCollator,
    image: Image.Image,
    question: str,
    classes: Sequence[str],
) -> Answer:
    try:
        if not classes:
            rows = ImageQuestionDataset([{"image": image}], question=question, collator=collator)
            return Answer(name, text=generate_answers(model, rows)[0] or "(nothing)")
        item = QuestionItem(image=image, question=question, answer=None, labels=-1, index=0)
        inputs = {key: column.to(device_of(model)) for key, column in question_inputs(collator([item])).items()}
        candidates = collator.candidates(classes, include_end=True)
        shares = candidate_scores(model, inputs, candidates)[0].softmax(dim=-1)
        best = shares.topk(min(SHOWN_LABELS, len(classes)))
        pairs = zip(best.indices.tolist(), best.values.tolist(), strict=True)
        return Answer(name, tuple(Prediction(candidates.names[index], value) for index, value in pairs))
    except WRONG as error:
        return Answer(name, error=one_line(error))
