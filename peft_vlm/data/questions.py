"""Images with questions and answers for models that read an image and write text."""

import copy
import hashlib
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, Any, TypedDict

import torch
from PIL import Image

from peft_vlm.data.dataset import ImageClassificationDataset, check_columns, is_hf_dataset
from peft_vlm.data.transforms import ImageAugmentation
from peft_vlm.errors import DataError

if TYPE_CHECKING:
    import datasets


class QuestionItem(TypedDict):
    """One image in RGB, its question, the expected answer (None when unknown), class id (-1 without one),
    and position in the dataset.
    """

    image: Image.Image
    question: str
    answer: str | None
    labels: int
    index: int


#: Makes a batch of model inputs from items.
Collator = Callable[[Sequence[QuestionItem]], dict[str, torch.Tensor]]


class ImageQuestionDataset(ImageClassificationDataset):
    """Images with one question and one answer each.

    Three kinds of tasks, in columns of the same dataset: classes by name (`label_column` and `class_names`; the answer
    is the name), free answers (`answer_column`), and answers out of a list (`answer_column` and `class_names`, for
    example yes/no or counts; the label is the answer's place in the list). Selecting, restricting to classes and
    random augmentation work as in `ImageClassificationDataset`.

    Args:
        source: A `datasets.Dataset`, or a sequence of mappings. Folders, CSV files and Hub ids: see `from_images`.
        class_names: Name of label 0, 1, ...; none for free answers.
        question: Asked about every image; an empty text is possible (models without instructions).
        question_column: Column with a question per image, instead of `question`.
        answer_column: Column with the answers; None: the class names.
        image_column: Column of the image.
        label_column: Column of the label, integers from 0; None where the answers give the labels, or there are none.
        augmentation: Changes images at random, drawn from (seed, epoch, position) alone; None: the images are the
            same in every epoch, and what models make of them may be cached.
        collator: Makes model inputs from items, usually a `QuestionCollator`; the trainer takes it from here.
        seed: Seed of the augmentation.
        value_range: See `read_image`.

    Raises:
        DataError: If the question is given twice or not at all, or labels and answers contradict each other.
    """

    def __init__(
        self,
        source: "datasets.Dataset | Sequence[Mapping[str, Any]]",
        class_names: Sequence[str] = (),
        *,
        question: str | None = None,
        question_column: str | None = None,
        answer_column: str | None = None,
        image_column: str = "image",
        label_column: str | None = None,
        augmentation: ImageAugmentation | None = None,
        collator: Collator | None = None,
        seed: int = 0,
        value_range: Sequence[int | float] | None = None,
    ) -> None:
        columns = {"image_column": image_column, "label_column": label_column}
        super().__init__(source, class_names, seed=seed, value_range=value_range, **columns)
        self._set_questions(question, question_column)
        self._answers: list[str] | None = None
        if answer_column is not None:
            self._answers = _texts(self.source, answer_column)
            if label_column is None:
                self.labels = _labels_of(self._answers, self.class_names)
        self.augmentation, self.collator = augmentation, collator

    @classmethod
    def from_images(
        cls,
        images: ImageClassificationDataset,
        *,
        question: str | None = None,
        question_column: str | None = None,
        augmentation: ImageAugmentation | None = None,
        collator: Collator | None = None,
    ) -> "ImageQuestionDataset":
        """Ask about the classes of labelled images, from whatever `load_image_dataset` opens.

        Args:
            images: Labelled images with class names; their transform is left out.
            question: Asked about every image.
            question_column: Column of the source with a question per image, instead of `question`.
            augmentation: Changes images at random.
            collator: Makes model inputs.
        """
        other = cls.__new__(cls)
        other.__dict__.update(copy.copy(images).__dict__)
        other._epoch = images._epoch.clone().share_memory_()
        other.transform, other._answers = None, None
        other._set_questions(question, question_column)
        other.augmentation, other.collator = augmentation, collator
        return other

    def _set_questions(self, question: str | None, column: str | None) -> None:
        if (question is None) == (column is None):
            raise DataError(
                f"Expected either `question` or `question_column`, got {question!r} and {column!r}. Pass for example "
                "`question='What is this?'`."
            )
        self._question = question
        self._questions = None if column is None else _texts(self.source, column)

    def text_digest(self) -> str:
        """Digest of all questions and answers, in the order of the images."""
        digest = hashlib.blake2b(repr(self._question).encode(), digest_size=8)
        for texts in (self._questions, self._answers):
            if texts is not None:
                digest.update(repr([texts[row] for row in self._rows]).encode())
        return digest.hexdigest()

    @property
    def has_fixed_pixels(self) -> bool:
        """True if every epoch sees the same images."""
        return self.augmentation is None

    @property
    def is_augmented(self) -> bool:
        """Whether images are changed at random."""
        return self.augmentation is not None

    def collate(self, items: Sequence[QuestionItem]) -> dict[str, torch.Tensor]:
        """Items of this dataset as model inputs.

        Args:
            items: Result of `__getitem__`.

        Raises:
            DataError: If the dataset has no collator.
        """
        if self.collator is None:
            raise DataError(
                "The dataset has no collator. Set `dataset.collator`, for example `QuestionCollator(processor)`."
            )
        return self.collator(items)

    def question(self, index: int) -> str:
        """The question about the image at a position."""
        if self._question is not None:
            return self._question
        assert self._questions is not None, "one of both is set"
        return self._questions[self._rows[index]]

    def answer(self, index: int) -> str | None:
        """The answer for a position; None for images without answer and label."""
        if self._answers is not None:
            return self._answers[self._rows[index]]
        label = self.labels[index]
        return None if label < 0 else self.class_names[label]

    def __getitem__(self, index: int) -> QuestionItem:
        position, image = self._readable(index)
        if self.augmentation is not None:
            image = self.augmentation(image, self._generator(index))
        return {
            "image": image,
            "question": self.question(position),
            "answer": self.answer(position),
            "labels": self.labels[position],
            "index": index,
        }

    def with_augmentation(self, augmentation: ImageAugmentation | None) -> "ImageQuestionDataset":
        """The same images and questions under another augmentation; this dataset keeps its own."""
        other = self.select(range(len(self)))
        other.augmentation = augmentation
        return other

    def with_collator(self, collator: Collator | None) -> "ImageQuestionDataset":
        """The same images and questions for another model; this dataset keeps its own collator."""
        other = self.select(range(len(self)))
        other.collator = collator
        return other

    def select(self, indices: Sequence[int]) -> "ImageQuestionDataset":
        """The images at some positions, in that order.

        Args:
            indices: Positions in this dataset; one may come several times.
        """
        other = super().select(indices)
        assert isinstance(other, ImageQuestionDataset)
        return other

    def restrict(self, class_ids: Sequence[int]) -> "ImageQuestionDataset":
        """The images of some classes, relabelled from 0 in the order given.

        Args:
            class_ids: Labels of this dataset; the first becomes class 0.
        """
        other = super().restrict(class_ids)
        assert isinstance(other, ImageQuestionDataset)
        return other


def _texts(source: "datasets.Dataset | Sequence[Mapping[str, Any]]", column: str) -> list[str]:
    check_columns(source, (column,))
    values = source[column][:] if is_hf_dataset(source) else [row[column] for row in source]
    for row, value in enumerate(values):
        if not isinstance(value, str | int) or isinstance(value, bool):
            raise DataError(f"Expected texts or integers in column {column!r}, got {value!r} in row {row}.")
    return [str(value) for value in values]


def _labels_of(answers: Sequence[str], class_names: Sequence[str]) -> list[int]:
    if not class_names:
        return [-1] * len(answers)
    place = {name: label for label, name in enumerate(class_names)}
    for row, answer in enumerate(answers):
        if answer not in place:
            raise DataError(
                f"Row {row} has the answer {answer!r}, which is not among the {len(place)} class names, beginning "
                f"{list(class_names)[:5]!r}. Add it, or leave `class_names` out for free answers."
            )
    return [place[answer] for answer in answers]
