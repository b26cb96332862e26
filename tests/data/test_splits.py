"""CoOp's protocol: which images are drawn, which classes are base, what a split file says."""

import json
import logging
import random
from collections import defaultdict
from pathlib import Path

import pytest

from peft_vlm.data import (
    BENCHMARKS,
    SKIP_TUNING_TEMPLATES,
    ImageClassificationDataset,
    base_and_new_classes,
    base_to_new_split,
    few_shot,
    few_shot_indices,
    read_zhou_split,
)
from peft_vlm.errors import DataError
from peft_vlm.text.prompts import fill
from tests.tiny import colour_names, colour_rows, noise_image

LABELS = [2, 0, 2, 1, 0, 2, 0, 1, 2, 0]


def coop_sample(labels: list[int], shots: int) -> list[int]:
    """The official rule with the global generator: group in order of appearance, sample from each group."""
    groups = defaultdict(list)
    for position, label in enumerate(labels):
        groups[label].append(position)
    chosen = []
    for positions in groups.values():
        chosen.extend(random.sample(positions, shots) if len(positions) >= shots else positions)
    return chosen


def test_the_draws_are_python_randoms_in_order_of_first_appearance() -> None:
    """Worked out class by class: class 2 appears first, then 0, then 1; the three draws share one generator."""
    generator = random.Random(1)
    by_hand = [generator.sample(items, 2) for items in ([0, 2, 5, 8], [1, 4, 6, 9], [3, 7])]
    assert by_hand == [[2, 5], [1, 4], [3, 7]]
    assert few_shot_indices(LABELS, shots=2, seed=1) == [2, 5, 1, 4, 3, 7]


@pytest.mark.parametrize("seed", [1, 2, 3])
@pytest.mark.parametrize("shots", [1, 2, 4, 8, 16])
def test_the_draws_equal_those_of_the_seeded_global_generator(seed: int, shots: int) -> None:
    """CoOp calls `random.seed` and then draws; another generator or order gives other images."""
    labels = [random.Random(position).randrange(7) for position in range(200)]
    random.seed(seed)
    expected = coop_sample(labels, shots)  # before any call under runtime type checks, which draw random numbers too
    assert few_shot_indices(labels, shots=shots, seed=seed) == expected


def test_validation_shots_go_on_with_the_same_generator() -> None:
    """CoOp draws `min(k, 4)` validation images after the training images."""
    random.seed(2)
    expected = coop_sample(LABELS, 3), coop_sample(LABELS[::-1], 2)
    generator = random.Random(2)
    drawn = [few_shot_indices(part, shots=k, seed=generator) for part, k in ((LABELS, 3), (LABELS[::-1], 2))]
    assert tuple(drawn) == expected


def test_a_class_with_fewer_images_gives_all_and_says_so(caplog: pytest.LogCaptureFixture) -> None:
    """Repeating images would weight them twice; dropping the class would change the task."""
    with caplog.at_level(logging.WARNING, logger="peft_vlm"):
        chosen = few_shot_indices(LABELS, shots=3, seed=1)
    assert [LABELS[i] for i in chosen].count(1) == 2
    assert len(set(chosen)) == len(chosen) == 8
    assert "1 of 3 classes have fewer than 3 images (class 1: 2); all of their images are used." in caplog.text


def test_few_images_are_said_once_for_all_seeds(caplog: pytest.LogCaptureFixture) -> None:
    """Ten seeds would say the same line ten times, between the lines that differ."""
    with caplog.at_level(logging.WARNING, logger="peft_vlm"):
        drawn = {tuple(few_shot_indices(LABELS, shots=3, seed=seed)) for seed in range(4)}
    assert len(drawn) > 1
    assert caplog.text.count("have fewer than 3 images") == 1


def test_strict_refuses_classes_with_fewer_images() -> None:
    """For comparisons that need equal shots."""
    with pytest.raises(DataError, match=r"1 of 3 classes .*\(class 1: 2\). Use at most 2 shots"):
        few_shot_indices(LABELS, shots=3, seed=1, strict=True)
    with pytest.raises(ValueError, match="`shots` of at least 1, got 0"):
        few_shot_indices(LABELS, shots=0, seed=1)


def test_a_class_without_images_is_named(caplog: pytest.LogCaptureFixture) -> None:
    """Nothing would be learned about it, and its accuracy would be taken for the method's."""
    dataset = ImageClassificationDataset(colour_rows(3, classes=2), colour_names(3))
    with caplog.at_level(logging.WARNING, logger="peft_vlm"):
        assert sorted(few_shot(dataset, shots=2, seed=1).labels) == [0, 0, 1, 1]
    assert f"1 of 3 classes have fewer than 2 images ({colour_names(3)[2]}: 0)" in caplog.text
    with pytest.raises(DataError, match=rf"\({colour_names(3)[2]}: 0\). Leave out the classes without images"):
        few_shot(dataset, shots=2, seed=1, strict=True)


@pytest.mark.parametrize(("count", "num_base"), [(2, 1), (37, 19), (47, 24), (101, 51), (1000, 500)])
def test_base_is_the_first_half_rounded_up(count: int, num_base: int) -> None:
    """Class counts of the published protocol."""
    base, new = base_and_new_classes(count)
    assert (len(base), base + new) == (num_base, list(range(count)))


def test_one_class_has_no_new_half() -> None:
    """An empty half would give a nan later."""
    with pytest.raises(ValueError, match="at least 2 classes"):
        base_and_new_classes(1)


def colours(per_class: int, classes: int = 5, seed: int = 0) -> ImageClassificationDataset:
    """Class by class, so that base classes come first."""
    return ImageClassificationDataset(colour_rows(per_class, classes=classes, seed=seed), colour_names(classes))


def test_shots_are_drawn_over_all_classes_before_the_halves_are_parted() -> None:
    """Drawing inside the base half would use other images where new classes come first in the file."""
    train, test = colours(6).select([*range(29, -1, -1)]), colours(2, seed=1)
    split = base_to_new_split(train, test, shots=2, seed=3)
    drawn = few_shot(train, shots=2, seed=3)
    assert split.train.labels == [label for label in drawn.labels if label < 3] == [2, 2, 1, 1, 0, 0]
    for position in range(6):
        assert split.train.image(position).tobytes() == drawn.restrict([0, 1, 2]).image(position).tobytes()
    assert split.train.class_names == split.base.class_names == ("red", "orange", "yellow")
    assert (split.base.labels, split.new.labels) == ([0, 0, 1, 1, 2, 2], [0, 0, 1, 1])
    assert split.new.class_names == ("green", "blue")


def test_a_seed_varies_the_shots_and_nothing_else() -> None:
    """Spread over seeds must not mix in other halves."""
    first, second = (base_to_new_split(colours(9), colours(2), shots=2, seed=seed) for seed in (1, 2))
    assert first.base.class_names == second.base.class_names
    images = [[split.train.image(i).tobytes() for i in range(len(split.train))] for split in (first, second)]
    assert images[0] != images[1]
    assert len(base_to_new_split(colours(9), colours(2), shots=None, seed=1).train) == 27


def test_different_classes_in_training_and_test_data_are_refused() -> None:
    """Labels would point at other names."""
    test = ImageClassificationDataset(colour_rows(1, classes=5), [*colour_names(4), "violet"])
    with pytest.raises(DataError, match="class 4 is 'blue' and 'violet'. Load both with the same `class_names`"):
        base_to_new_split(colours(2), test, shots=1, seed=1)


def write_split(folder: Path, **parts: list[list[object]]) -> Path:
    """A split file beside three images."""
    for name in ("a b.png", "sub/c.png", "d.png"):
        (folder / "images" / name).parent.mkdir(parents=True, exist_ok=True)
        noise_image(4, 4).save(folder / "images" / name)
    path = folder / "split_zhou_Pets.json"
    path.write_text(json.dumps(parts))
    return path


TRAIN = [["sub/c.png", 1, "golden_retriever"], ["a b.png", 0, "cat"]]


def test_split_files_keep_their_order_and_labels(tmp_path: Path) -> None:
    """The order decides which shots are drawn; names come from all parts, by label."""
    path = write_split(tmp_path, train=TRAIN, val=[], test=[["d.png", 2, "ox"]])
    dataset = read_zhou_split(path, root=tmp_path / "images")
    assert dataset.labels == [1, 0]
    assert dataset.class_names == ("cat", "golden_retriever", "ox")
    assert dataset.image(0).size == (4, 4)
    assert read_zhou_split(path, root=tmp_path / "images", split="test").labels == [2]


@pytest.mark.parametrize(
    ("parts", "message"),
    [
        ({"test": TRAIN}, r"has the parts \['test'\], got `split`='train'"),
        ({"train": [*TRAIN, ["d.png", 1, "dog"]]}, "Label 1 has two class names, 'golden_retriever' and 'dog'"),
        ({"train": [["d.png", 3, "dog"]]}, r"labels 0 to 0 without gaps, got \[3\]"),
        ({"train": [*TRAIN, ["gone.png", 2, "x"]]}, "1 of 3 image files are missing, the first is '.*gone.png'"),
        ({"train": [["d.png", "dog"]]}, "lists of \\[image path, label, class name\\]"),
    ],
)
def test_split_files_that_do_not_fit_are_explained(tmp_path: Path, parts: dict, message: str) -> None:
    """A wrong root or a damaged file must fail before training."""
    with pytest.raises(DataError, match=message):
        read_zhou_split(write_split(tmp_path, **parts), root=tmp_path / "images")


def test_specs_are_the_published_counts() -> None:
    """Base plus new of the eleven sets, from the papers' tables; the variants are test sets."""
    counts = {
        name: (spec.num_base, spec.num_classes - spec.num_base) for name, spec in BENCHMARKS.items() if spec.num_train
    }
    assert list(counts.values()) == [
        (500, 500), (50, 50), (19, 18), (98, 98), (51, 51), (51, 50), (50, 50), (199, 198), (24, 23), (5, 5), (51, 50),
    ]  # fmt: skip
    assert len(BENCHMARKS) == 15
    assert sum(spec.split_file is not None for spec in BENCHMARKS.values()) == 9
    for spec in BENCHMARKS.values():
        assert "dog" in fill(spec.template, "dog")
    assert set(SKIP_TUNING_TEMPLATES) < set(BENCHMARKS)
    assert all(fill(template, "dog") for template in SKIP_TUNING_TEMPLATES.values())
