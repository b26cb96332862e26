"""Zero-shot beside each adapter, for any image, class list and template; and how right they are on test images."""

import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import torch
from PIL import Image

from peft_vlm.classifier import TEMPLATE, Prediction, PromptedClassifier
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.images import read_image
from peft_vlm.data.loading import load_image_dataset
from peft_vlm.errors import ClassNameError
from peft_vlm.evaluation.classify import EvalResult, classify
from peft_vlm.evaluation.run import LoadedModel, load_model
from peft_vlm.files import last_part
from peft_vlm.serving.escape import html, one_line
from peft_vlm.text.prompts import check_class_names

#: Most classes of a list that is typed in; each takes a text pass of every classifier.
MAX_CLASSES = 1000
#: Labels with a bar.
SHOWN_LABELS = 5
#: Letters of a name that are shown.
MAX_NAME = 80
#: Images that accuracy, calibration and confusion are measured on, and of the gallery.
MAX_TEST_IMAGES, NUM_EXAMPLES = 500, 12

#: What wrong input raises; everything else is a fault of the program.
WRONG = (ValueError, OSError)


@dataclass(frozen=True)
class Answer:
    """What one classifier says about an image.

    Args:
        name: The classifier.
        predictions: Its labels, best first; empty where it has none to give.
        error: Why it has none.
        note: The template it was asked with.
        text: An answer that it has written instead.
        is_base: True for a base model alone.
    """

    name: str
    predictions: tuple[Prediction, ...] = ()
    error: str = ""
    note: str = ""
    text: str = ""
    is_base: bool = False


def parse_classes(text: str) -> tuple[str, ...]:
    """The class names of a text box: one per line, or in a single line with commas between.

    Args:
        text: What was typed.

    Raises:
        ClassNameError: If there is no name, two read the same, or there are more than `MAX_CLASSES`.
    """
    lines = text.splitlines()
    parts = text.split(",") if len([line for line in lines if line.strip()]) == 1 else lines
    names = [part.strip() for part in parts if part.strip()]
    if not names:
        raise ClassNameError("Expected class names, got none. Write one per line.")
    if len(names) > MAX_CLASSES:
        raise ClassNameError(f"Expected at most {MAX_CLASSES:,} class names, got {len(names):,}. Take some out.")
    return check_class_names(names)


def unique_names(paths: Sequence[str]) -> list[str]:
    """A short name for each adapter or model: the last part of its path, and more of it where two would be equal.

    Args:
        paths: Folders or Hub ids.
    """
    short = [last_part(path) for path in paths]
    names = [path if short.count(name) > 1 else name for name, path in zip(short, paths, strict=True)]
    return [f"{name} ({i + 1})" if names.count(name) > 1 else name for i, name in enumerate(names)]


class Comparison:
    """Classifiers side by side: the base models alone, then the adapters.

    Class features are stored by each classifier, per class list and template, so that another image costs an image
    pass only. One image is classified at a time.

    Args:
        zero_shot: Base models alone, by the name that is shown.
        adapters: Classifiers with an adapter, by the name that is shown.
        bases: Which of the former belongs to each of the latter.
    """

    def __init__(
        self,
        zero_shot: Mapping[str, PromptedClassifier],
        adapters: Mapping[str, PromptedClassifier],
        bases: Mapping[str, str],
    ) -> None:
        self.zero_shot, self.adapters, self.bases = dict(zero_shot), dict(adapters), dict(bases)
        self.classifiers = self.zero_shot | self.adapters
        self._lock = threading.Lock()

    @classmethod
    def load(
        cls,
        adapters: Sequence[str],
        *,
        base_model: str | None = None,
        device: str | None = None,
        tell: Callable[[str], None] = lambda name: None,
    ) -> "Comparison":
        """Load adapters, each with a base model of its own, and each base model once more, alone.

        Args:
            adapters: Folders or Hub ids of adapters of CLIP-like models.
            base_model: Folder or id of the base model; None for what each adapter records.
            device: Device; None takes a GPU if there is one.
            tell: Called with the name of each before it is loaded.
        """
        loaded: dict[str, PromptedClassifier] = {}
        alone: dict[str, PromptedClassifier] = {}
        bases: dict[str, str] = {}
        for name, adapter in zip(unique_names(adapters), adapters, strict=True):
            tell(name)
            found = load_model(adapter, base_model=base_model, device=device)
            loaded[name] = _classifier(found)
            bases[name] = found.base_model
            if found.base_model not in alone:
                base = load_model(base_model=found.base_model, base_revision=found.base_revision, device=device)
                alone[found.base_model] = _classifier(replace(base, template=found.template))
        shown = [f"zero-shot ({name})" if len(alone) > 1 else "zero-shot" for name in unique_names(list(alone))]
        names = dict(zip(alone, shown, strict=True))
        zero_shot = {names[base]: classifier for base, classifier in alone.items()}
        return cls(zero_shot, loaded, {name: names[base] for name, base in bases.items()})

    @property
    def class_names(self) -> tuple[str, ...]:
        """The classes to begin with: those of the first adapter that records any."""
        return next((c.class_names for c in self.adapters.values() if c.class_names), ())

    def chosen_at_first(self) -> list[str]:
        """Names of the adapters that are shown at first: those of the same class list, six of them at most."""
        same = [name for name, c in self.adapters.items() if c.class_names == (self.class_names or None)]
        return (same or list(self.adapters))[:6]

    def answers(
        self,
        image: str | Path | Image.Image,
        class_names: Sequence[str],
        *,
        template: str = "",
        names: Sequence[str] | None = None,
    ) -> list[Answer]:
        """The labels of an image by the chosen adapters and their base models; what one cannot do is its own error.

        Args:
            image: File or image.
            class_names: Classes to choose from.
            template: Text around a class name with one `{}`; empty for that of each adapter.
            names: Adapters that are asked; None for all, none for the base models alone.

        Raises:
            DataError: If it is no image.
        """
        adapters = [name for name in self.adapters if names is None or name in names]
        wanted = {self.bases[name] for name in adapters} or self.zero_shot
        chosen = [*(name for name in self.zero_shot if name in wanted), *adapters]
        images: dict[object, Image.Image] = {}
        answers = []
        with self._lock:
            for name in chosen:
                classifier, is_base = self.classifiers[name], name in self.zero_shot
                span = classifier.value_range
                if span not in images:
                    images[span] = read_image(image, where="the image", value_range=span)
                asked = template.strip() or classifier.template
                note = f"template: {asked if isinstance(asked, str) else f'{len(asked)} texts'}"
                try:
                    found = classifier.predict(
                        images[span], class_names=class_names, template=asked, top_k=SHOWN_LABELS
                    )
                    answers.append(Answer(name, tuple(found), note=note, is_base=is_base))
                except WRONG as error:
                    answers.append(Answer(name, error=one_line(error), note=note, is_base=is_base))
        return answers


def _classifier(loaded: LoadedModel) -> PromptedClassifier:
    return PromptedClassifier(
        loaded.model,
        loaded.tokenizer,
        loaded.image_processor,
        class_names=loaded.class_names,
        template=loaded.template or TEMPLATE,
        value_range=loaded.value_range,
    )


class TestImages:
    """Labelled images, and what the classifiers make of them; each is measured once.

    Args:
        dataset: Labelled images; of more than `MAX_TEST_IMAGES` a part is drawn by seed 0.
    """

    __test__ = False  # no class of tests

    def __init__(self, dataset: ImageClassificationDataset) -> None:
        order = torch.randperm(len(dataset), generator=torch.Generator().manual_seed(0)).tolist()
        self.num_all = len(dataset)
        self.dataset = dataset.select(sorted(order[:MAX_TEST_IMAGES]))
        by_class: dict[int, list[int]] = {}
        for place, label in enumerate(self.dataset.labels):
            by_class.setdefault(label, []).append(place)
        ranks = [(rank, place) for places in by_class.values() for rank, place in enumerate(places)]
        #: Images of the gallery: the first of each class, then the second, ...
        self.examples = [place for _, place in sorted(ranks)[:NUM_EXAMPLES]]
        self._results: dict[str, EvalResult] = {}
        self._lock = threading.Lock()

    @classmethod
    def load(cls, source: str, *, split: str = "test") -> "TestImages":
        """Labelled images of a folder, file or Hub id.

        Args:
            source: As for `load_image_dataset`.
            split: Its part.
        """
        return cls(load_image_dataset(source, split=split))

    def image(self, number: int) -> Image.Image:
        """An image of the gallery.

        Args:
            number: Place in the gallery.
        """
        return self.dataset.image(self.examples[number])

    def result(self, name: str, classifier: PromptedClassifier) -> EvalResult:
        """Predictions of a classifier on all test images, among their classes and with its own template.

        Args:
            name: Key under which they are kept.
            classifier: Classifier.
        """
        with self._lock:
            if name not in self._results:
                images = self.dataset.with_transform(classifier.transform)
                self._results[name] = classify(classifier.logits_for(self.dataset.class_names), images)
            return self._results[name]

    def captions(self, result: EvalResult) -> list[str]:
        """Right or wrong, in words, for each image of the gallery.

        Args:
            result: Predictions on the test images.
        """
        captions = []
        for place in self.examples:
            true, said = (
                _short_name(result.class_names[int(ids[place])]) for ids in (result.labels, result.predicted)
            )
            captions.append(f"\u2713 {true}" if true == said else f"\u2717 {said} (is {true})")
        return captions


def _short_name(name: str) -> str:
    """A class name that fits into a line.

    Args:
        name: Name of any length.
    """
    return name if len(name) <= MAX_NAME else f"{name[:MAX_NAME]}\u2026"


def cards_html(answers: Sequence[Answer]) -> str:
    """Bars with probabilities, a card per classifier.

    Args:
        answers: Labels of one image.
    """
    cards = (_card(answer, is_base=answer.is_base) for answer in answers)
    return f'<div class="peft-cards">{"".join(cards)}</div>'


def message_html(text: object, *, is_error: bool = False) -> str:
    """A sentence in the place of a result.

    Args:
        text: Anything, also names of strangers.
        is_error: Show it as an error.
    """
    role = ' role="alert"' if is_error else ""
    return f'<p class="{"peft-error" if is_error else "peft-note"}"{role}>{html(one_line(text), 600)}</p>'


def pairs_html(pairs: Sequence[tuple[Answer, Answer]]) -> str:
    """Answers about the clean and the prompted image, model by model.

    Args:
        pairs: Answers of each model.
    """
    cards = []
    for clean, prompted in pairs:
        for answer, kind, base in ((clean, "clean image", True), (prompted, "prompted image", False)):
            cards.append(_card(replace(answer, note=kind), is_base=base))
    return f'<div class="peft-cards peft-pairs">{"".join(cards)}</div>'


def _card(answer: Answer, *, is_base: bool) -> str:
    kind = "peft-card peft-base" if is_base else "peft-card"
    note = f'<p class="peft-note" title="{html(answer.note)}">{html(answer.note, 60)}</p>' if answer.note else ""
    text = f'<p class="peft-answer">{html(answer.text, 400)}</p>' if answer.text else ""
    body = message_html(answer.error, is_error=True) if answer.error else text + "".join(map(_bar, answer.predictions))
    return f'<section class="{kind}"><h4>{html(answer.name, MAX_NAME)}</h4>{note}{body}</section>'


def _bar(prediction: Prediction) -> str:
    share = f"{100 * prediction.probability:.1f}"
    return (
        f'<div class="peft-bar"><span class="peft-label" title="{html(prediction.label)}">'
        f'{html(prediction.label, MAX_NAME)}</span><span class="peft-value">{share} %</span>'
        f'<span class="peft-track"><span style="width:{share}%"></span></span></div>'
    )
