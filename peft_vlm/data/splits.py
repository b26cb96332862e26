"""Few-shot samples and base/new halves by CoOp's protocol, and its published split files.

The protocol (CoOp, arXiv 2109.01134; base-to-new: CoCoOp, arXiv 2203.05557; code: KaiyangZhou/CoOp and Dassl.pytorch):
`k` images per class are drawn with Python's `random` under the seed, over *all* classes; base is the first
`ceil(n / 2)` classes in label order; each half is relabelled from 0 and tested with its own class names only.

What matches published runs, and what cannot: for the datasets with a `split_zhou_*.json`, `few_shot_indices` on its
training part draws the images that the official code draws when it starts without a cached sample, because the seed is
set right before. It cannot match where the order of the images is that of a file system (ImageNet), where the official
code drew its training/validation split in the same run, or where authors shipped a
`split_fewshot/shot_{k}-seed_{s}.pkl` made in another way; early versions of Dassl also repeated images of classes with
fewer than `k`. Such pickles are not read here: they run code when loaded.

Test images that were trained on are told by their content, whatever split they are called.
"""

import hashlib
import json
import logging
import math
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path, PureWindowsPath
from typing import Any, NamedTuple

import numpy as np
from PIL import Image

from peft_vlm.data.dataset import ImageClassificationDataset, is_hf_dataset
from peft_vlm.data.folders import check_files_exist
from peft_vlm.errors import DataError, shown
from peft_vlm.files import last_part, read_text
from peft_vlm.objective import EpochBatchSampler
from peft_vlm.serving.images import log_once

logger = logging.getLogger(__name__)


def few_shot_indices(
    labels: Sequence[int],
    *,
    shots: int,
    seed: int | random.Random,
    strict: bool = False,
    num_classes: int | None = None,
    class_names: Sequence[str] | None = None,
) -> list[int]:
    """Positions of `shots` images per class, drawn as CoOp's code does.

    Classes come in the order in which they first appear, and each draws `random.sample` from its images in dataset
    order. A class with fewer images gives all of them, which is logged with the counts.

    Args:
        labels: Label of every image.
        shots: Images per class, at least 1.
        seed: Seed of a new generator; or a generator to go on with, as CoOp does for its validation images
            (`min(shots, 4)` per class, after the training images).
        strict: Refuse classes with fewer images instead.
        num_classes: Number of classes, so that those without any image are counted and logged too.
        class_names: Names of all classes in label order, for the log and errors; gives `num_classes` as well.

    Returns:
        Positions in `labels`, class by class.

    Raises:
        DataError: If `strict` and a class has fewer images than `shots`.
        ValueError: If `shots` is below 1.
    """
    if shots < 1:
        raise ValueError(f"Expected `shots` of at least 1, got {shots!r}. Use the full dataset for no limit.")
    positions: dict[int, list[int]] = defaultdict(list)
    for position, label in enumerate(labels):
        positions[label].append(position)
    if class_names is not None:
        num_classes = len(class_names)
    classes = sorted(positions) if num_classes is None else range(num_classes)
    short = {label: len(positions.get(label, ())) for label in classes if len(positions.get(label, ())) < shots}
    if short:
        name_of = class_names or {label: f"class {label}" for label in short}
        found = ", ".join(f"{name_of[label]}: {count}" for label, count in list(short.items())[:10])
        more = ", ..." if len(short) > 10 else ""
        message = f"{len(short)} of {len(classes)} classes have fewer than {shots} images ({found}{more})"
        if strict:
            fewest = min(short.values())
            advice = f"Use at most {fewest} shots" if fewest else "Leave out the classes without images"
            raise DataError(f"{message}. {advice}, or `strict=False` to take them all.")
        log_once(f"{message}; all of their images are used.")
    generator = seed if isinstance(seed, random.Random) else random.Random(seed)
    chosen = (items if label in short else generator.sample(items, shots) for label, items in positions.items())
    return [position for items in chosen for position in items]


def base_and_new_classes(num_classes: int) -> tuple[list[int], list[int]]:
    """Ids of the base classes, the first `ceil(n / 2)`, and of the new ones, the rest.

    Args:
        num_classes: At least 2.

    Raises:
        ValueError: If there is no new class.
    """
    if num_classes < 2:
        raise ValueError(f"Expected at least 2 classes to part into base and new, got {num_classes!r}.")
    num_base = math.ceil(num_classes / 2)
    return list(range(num_base)), list(range(num_base, num_classes))


class BaseToNewSplit(NamedTuple):
    """Base-to-new data, relabelled from 0: training images of the base classes, test images of each half."""

    train: ImageClassificationDataset
    base: ImageClassificationDataset
    new: ImageClassificationDataset


def base_to_new_split(
    train: ImageClassificationDataset,
    test: ImageClassificationDataset,
    *,
    shots: int | None,
    seed: int,
    strict: bool = False,
) -> BaseToNewSplit:
    """Draw shots over all classes, then split the classes, in this order as CoOp does.

    Args:
        train: Training images of all classes.
        test: Test images of the same classes.
        shots: Images per class; None for all.
        seed: Varies the shots; the halves stay the same.
        strict: Refuse classes with fewer images than `shots`.

    Raises:
        DataError: If the two datasets have different classes.
    """
    if train.class_names != test.class_names:
        raise DataError(
            f"Expected the same classes in training and test data, got {len(train.class_names)} and "
            f"{len(test.class_names)}; first difference: {_first_difference(train.class_names, test.class_names)}. "
            "Load both with the same `class_names`."
        )
    base, new = base_and_new_classes(len(train.class_names))
    shown = train if shots is None else few_shot(train, shots=shots, seed=seed, strict=strict)
    return BaseToNewSplit(shown.restrict(base), test.restrict(base), test.restrict(new))


def few_shot(
    dataset: ImageClassificationDataset, *, shots: int, seed: int, strict: bool = False
) -> ImageClassificationDataset:
    """The dataset cut to `shots` images per class; see `few_shot_indices`."""
    names = dataset.class_names
    return dataset.select(few_shot_indices(dataset.labels, shots=shots, seed=seed, strict=strict, class_names=names))


def read_zhou_split(path: str | Path, *, root: str | Path, split: str = "train") -> ImageClassificationDataset:
    """Read one part of a `split_zhou_<Dataset>.json`, the split files that CoOp publishes.

    Args:
        path: The JSON file: lists `train`, `val` and `test` of [image path, label, class name].
        root: Folder that the image paths start from (for Oxford Pets the folder `images`).
        split: Part to read.

    Returns:
        The images in the file's order; class names in label order.

    Raises:
        DataError: If the file is no split file, has no such part, its labels have gaps or two names, or images are
            missing.
    """
    parts = _zhou_parts(Path(path))
    if split not in parts:
        raise DataError(f"{str(path)!r} has the parts {sorted(parts)!r}, got `split`={split!r}.")
    names = _zhou_class_names([entry for part in parts.values() for entry in part])
    rows = [{"image": path_inside(Path(root), file), "label": label} for file, label, _ in parts[split]]
    check_files_exist([row["image"] for row in rows])
    return ImageClassificationDataset(rows, names)


def path_inside(root: Path, name: str) -> str:
    """Path of an image that a list of a stranger names, below a folder; either system's separators are read.

    Args:
        root: Folder that the name starts from. Links in it are the user's own, and are followed.
        name: Relative path.

    Raises:
        DataError: If it leads out of the folder.
    """
    path = PureWindowsPath(name)
    if path.anchor or ".." in path.parts or not path.parts:
        raise DataError(f"Expected image paths that stay below {str(root)!r}, got {shown(name)}. Get the list again.")
    return str(root.joinpath(*path.parts))


def _zhou_parts(path: Path) -> dict[str, list[tuple[str, int, str]]]:
    wanted = f"Expected {str(path)!r} to be a split file with lists of [image path, label, class name]; got"
    try:
        parts = json.loads(read_text(path))
    except (ValueError, OSError, RecursionError) as error:
        raise DataError(f"{wanted} {error}.") from error
    if not isinstance(parts, dict) or not all(isinstance(part, list) for part in parts.values()):
        raise DataError(f"{wanted} {shown(parts)}.")
    for name, part in parts.items():
        for entry in part:
            if not isinstance(entry, list) or [type(cell) for cell in entry] != [str, int, str]:
                raise DataError(f"{wanted} {shown(entry)} in its part {name!r}.")
    return {name: [(file, label, text) for file, label, text in part] for name, part in parts.items()}


def _zhou_class_names(entries: list[tuple[str, int, str]]) -> list[str]:
    names: dict[int, str] = {}
    for _, label, name in entries:
        if names.setdefault(label, name) != name:
            raise DataError(f"Label {label} has two class names, {names[label]!r} and {name!r}.")
    if sorted(names) != list(range(len(names))):
        raise DataError(f"Expected labels 0 to {len(names) - 1} without gaps, got {sorted(names)[:20]!r}.")
    return [names[label] for label in range(len(names))]


def _first_difference(first: Sequence[str], second: Sequence[str]) -> str:
    for index, (a, b) in enumerate(zip(first, second, strict=False)):
        if a != b:
            return f"class {index} is {a!r} and {b!r}"
    return f"class {min(len(first), len(second))} is missing in one"


class BalancedBatches(EpochBatchSampler):
    """As many images per epoch as the dataset has, the same number of every class, give or take one.

    A class is drawn again only after all others; within a class, images come in random order and start over when the
    class is exhausted.

    Args:
        labels: Label of each image.
        batch_size: Images per batch; the last one may be smaller.
        seed: Seed of the run.
    """

    def __init__(self, labels: Sequence[int], *, batch_size: int, seed: int) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        # Positions sorted by class, cut where another class begins; classes without images have no part.
        order = np.argsort(np.asarray(labels), kind="stable")
        _, starts = np.unique(np.asarray(labels)[order], return_index=True)
        self._images = np.split(order, starts[1:])

    def __len__(self) -> int:
        return math.ceil(sum(map(len, self._images)) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng([self.seed, self.epoch])
        total, classes = sum(map(len, self._images)), len(self._images)
        rounds = math.ceil(total / classes)
        # A row is a round, in which every class comes once; a column repeats the images of one class.
        columns = np.empty((rounds, classes), dtype=np.int64)
        for column, images in enumerate(self._images):
            passes = math.ceil(rounds / len(images))
            columns[:, column] = np.concatenate([random.permutation(images) for _ in range(passes)])[:rounds]
        positions = random.permuted(columns, axis=1).flatten()[:total]
        for start in range(0, total, self.batch_size):
            yield positions[start : start + self.batch_size].tolist()


#: Training images whose content is remembered, evenly spaced.
SAMPLE = 256


def image_sample(images: ImageClassificationDataset) -> list[str]:
    """Size and digest of the content of some images, evenly spaced, as a training summary records them.

    Args:
        images: Training images.
    """
    return sorted({entry for entry in _sample(images) if entry is not None})


def content_digest(images: ImageClassificationDataset) -> str:
    """Digest of what an epoch shows, in its order: all labels and file names, the content of some images.

    The folder of the files does not count, so that a dataset may be moved. Names inside a `datasets.Dataset` are not
    read, since its rows bring their images along.

    Args:
        images: Training images.
    """
    digest = hashlib.blake2b(np.asarray(images.labels, dtype=np.int64).tobytes(), digest_size=8)
    for cell in images.some_images(SAMPLE if is_hf_dataset(images.source) else len(images)):
        path = cell.get("path") if isinstance(cell, dict) else cell
        if isinstance(path, str | Path):
            digest.update(f"{last_part(path)}\n".encode(errors="surrogatepass"))
    digest.update("".join(map(str, _sample(images))).encode())
    return digest.hexdigest()


def _sample(images: ImageClassificationDataset) -> list[str | None]:
    """Size and digest of the content of some images, in their order; None for one that cannot be read."""
    return [_fingerprint(cell) for cell in images.some_images(SAMPLE)]


def check_not_trained_on(
    test: ImageClassificationDataset, sample: Sequence[str], *, num_train: int, refuse: bool = True
) -> None:
    """Refuse a test set that holds half of the training images, or consists of them by half; count fewer in the log.

    Args:
        test: Test images.
        sample: What `image_sample` gave for the training images.
        num_train: Number of training images.
        refuse: False: only log, for an accuracy on training images that is called so.

    Raises:
        DataError: Saying how many.
    """
    found = _found(test, sample)
    if not found:
        return
    share_of_train = len(set(found)) / len(set(sample))
    share_of_test = min(1.0, len(found) / len(set(sample)) * num_train / len(test))
    text = f"About {100 * share_of_test:.0f} % of the test images are training images, byte for byte"
    if refuse and max(share_of_train, share_of_test) >= 0.5:
        raise DataError(
            f"{text} ({100 * share_of_train:.0f} % of those that were trained on), so the accuracy would say nothing. "
            "Pass another split or dataset for the test."
        )
    logger.warning("%s.", text)


def is_chosen_on(test: ImageClassificationDataset, sample: Sequence[str]) -> bool:
    """True if a test set holds half of the validation images, on which the checkpoint of a run was chosen, or more.

    Args:
        test: Test images.
        sample: What `image_sample` gave for the validation images.
    """
    return bool(sample) and 2 * len(set(_found(test, sample))) >= len(set(sample))


def _found(test: ImageClassificationDataset, sample: Sequence[str]) -> list[str]:
    """Entries of a sample that are images of the test set, as often as they are."""
    known, sizes = set(sample), {entry.partition(":")[0] for entry in sample}
    prints = [_fingerprint(cell, sizes) for cell in test.some_images(len(test))] if sample else []
    return [entry for entry in prints if entry in known]


def _can_be_read(image: Image.Image) -> bool:
    try:
        image.load()
    except (OSError, ValueError, SyntaxError):  # training says so where it meets the image
        return False
    return True


def _fingerprint(cell: Any, sizes: set[str] | None = None) -> str | None:
    """Size and digest of an image's content; None where it has none to read, or its size is not among some."""
    if isinstance(cell, dict):
        cell = cell["bytes"] if cell.get("bytes") is not None else cell.get("path")
    if isinstance(cell, str | Path):
        path = Path(cell)
        if not path.is_file() or (sizes is not None and str(path.stat().st_size) not in sizes):
            return None
        content = path.read_bytes()
    elif isinstance(cell, Image.Image) and not _can_be_read(cell):
        return None
    else:
        content = cell if isinstance(cell, bytes) else np.ascontiguousarray(np.asarray(cell)).tobytes()
    if sizes is not None and str(len(content)) not in sizes:
        return None
    return f"{len(content)}:{hashlib.blake2b(content, digest_size=8).hexdigest()}"
