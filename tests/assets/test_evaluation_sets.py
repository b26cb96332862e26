"""The committed evaluation sets: what they promise about classes, splits, licences and independence of pretraining."""

import json
import os
from collections import Counter
from pathlib import Path

import numpy as np
import pandas as pd
import pytest
import torch
from datasets import ClassLabel, Dataset, Image

from design_families import ALLOWED_LICENCES, PRETRAINING_EMOJI_SETS, PRETRAINING_FAMILIES, family_of
from duplicates import THRESHOLD, fingerprints, nearest
from fashion_set import PHOTO_THRESHOLD
from tests.source_tree import ROOT

ASSETS = ROOT / "examples" / "assets"
STYLES = ("", "_3d", "_high_contrast")
SPLITS = ("train", "val", "test")
FILES = [
    *(("icons", split) for split in SPLITS),
    *(("emoji", f"{split}{style}") for split in SPLITS for style in STYLES),
    *(("fashion", split) for split in SPLITS),
]


def load(name: str, split: str) -> Dataset:
    """One committed parquet file."""
    return Dataset.from_parquet(str(ASSETS / name / f"{split}.parquet"))


def pictures(data: Dataset) -> list[np.ndarray]:
    """Images of a dataset as uint8 arrays, grey or RGB as stored."""
    return [np.asarray(image) for image in data["image"]]


@pytest.fixture(scope="module")
def rows() -> pd.DataFrame:
    """Provenance of every committed icon and emoji."""
    columns = ["set", "icon", "licence", "author", "pretraining_correlation"]
    tables = [load(name, split).select_columns(columns).to_pandas() for name, split in FILES if name != "fashion"]
    assert len(tables) == 12
    return pd.concat(tables)


@pytest.fixture(scope="module")
def trained() -> pd.DataFrame:
    """Every pretraining image: collection, icon, family, name, licence, pixel hash."""
    table = pd.read_parquet(ASSETS / "pretraining_images.parquet")
    assert len(table) > 50_000
    return table


@pytest.mark.parametrize(("name", "split"), FILES)
def test_files_open_with_image_and_class_label_features(name: str, split: str) -> None:
    """Without the features in the file, `datasets` shows bytes and integers."""
    data = load(name, split)
    assert len(data) >= 60
    assert isinstance(data.features["image"], Image)
    assert isinstance(data.features["label"], ClassLabel)
    assert data[0]["image"].size == (48, 48)
    assert len(set(data.features["label"].names)) == data.features["label"].num_classes


def test_icons_have_enough_classes_shots_and_domains() -> None:
    """Base-to-new needs many classes; a class without shots or test images says nothing."""
    train, val, test = (load("icons", split) for split in SPLITS)
    num_classes = train.features["label"].num_classes
    assert num_classes >= 80
    assert train.features["label"].names == val.features["label"].names == test.features["label"].names
    shots, tested = Counter(train["label"]), Counter(test["label"])
    assert len(shots) == len(tested) == len(set(val["label"])) == num_classes
    assert min(shots.values()) >= 8
    assert sum(count >= 16 for count in shots.values()) >= 0.8 * num_classes
    assert min(tested.values()) >= 10
    assert set(train["domain"]) == {"plain"}
    assert set(test["domain"]) == {"plain", "pixel", "hand"}


def test_icon_splits_share_no_design_family() -> None:
    """The same designer's hand in shots and test would make recognition of styles look like recognition of things."""
    families = {split: set(load("icons", split)["family"]) for split in SPLITS}
    assert sum(map(len, families.values())) >= 60
    assert len(set.union(*families.values())) == sum(map(len, families.values()))


def test_emoji_splits_share_no_concept_and_styles_agree() -> None:
    """Test emoji must be other drawings of other things, in every style."""
    for style in STYLES:
        concepts = [set(load("emoji", f"{split}{style}")["concept"]) for split in SPLITS]
        assert len(set.union(*concepts)) == sum(map(len, concepts))
    plain = load("emoji", "test")
    assert plain.features["label"].num_classes >= 15
    assert min(Counter(load("emoji", "train")["label"]).values()) >= 8
    for style in STYLES[1:]:
        other = load("emoji", f"test{style}")
        assert set(other["concept"]) <= set(plain["concept"])
        assert other.features == plain.features
    assert sum(not seen for seen in plain["seen"]) >= 20


def test_fashion_is_balanced() -> None:
    """Accuracy over an unbalanced test split would hide classes."""
    for split, count in (("train", 48), ("val", 16), ("test", 300)):
        assert Counter(load("fashion", split)["label"]) == dict.fromkeys(range(10), count)


def test_every_collection_has_an_allowed_licence_and_is_in_the_notice(
    rows: pd.DataFrame, trained: pd.DataFrame
) -> None:
    """Share-alike, non-commercial and font licences stay out; attribution licences need their attribution."""
    assert set(rows["licence"]) | set(trained["licence"]) <= ALLOWED_LICENCES
    assert (rows["author"].str.len() > 0).all()
    records = json.loads((ASSETS / "collections.json").read_text())
    listed = {record["set"] for record in records}
    assert set(rows["set"]) | set(trained["set"]) <= listed
    assert {record["licence"] for record in records} <= ALLOWED_LICENCES
    notice = (ROOT / "NOTICE").read_text()
    assert len(records) > 100
    assert not [record["set"] for record in records if f"({record['set']})" not in notice]
    credited = [record for record in records if record["licence"].startswith("CC-BY")]
    assert not [record["set"] for record in credited if not record["author"] or not record["licence_url"]]


def test_no_evaluated_design_family_was_trained_on(rows: pd.DataFrame, trained: pd.DataFrame) -> None:
    """An unseen family is the point of the icon set, an unseen vendor of the emoji set."""
    evaluated = {family_of(prefix) for prefix in rows["set"]}
    assert len(evaluated) >= 60
    used = {family_of(prefix) for prefix in trained["set"]}
    assert used <= PRETRAINING_FAMILIES | {family_of(prefix) for prefix in PRETRAINING_EMOJI_SETS}
    assert not evaluated & used


def test_unseen_concepts_were_never_a_caption(trained: pd.DataFrame) -> None:
    """A concept that is called unseen must not be the name of any training image."""
    data = load("emoji", "train")
    names = data.features["concept"].names
    unseen = {names[concept] for concept, seen in zip(data["concept"], data["seen"], strict=True) if not seen}
    assert len(unseen) >= 20
    assert not unseen & set(trained["name"])


def test_no_evaluation_image_is_a_twin_of_a_training_image(rows: pd.DataFrame, trained: pd.DataFrame) -> None:
    """The recorded correlation with the nearest training image stays below the threshold, and no pixels are equal."""
    import hashlib

    assert rows["pretraining_correlation"].max() <= THRESHOLD
    assert rows["pretraining_correlation"].min() > 0
    images = [image for name, split in FILES if name != "fashion" for image in load(name, split)["image"]]
    assert len(images) == len(rows)
    hashes = {hashlib.sha256(np.asarray(image.convert("RGB")).tobytes()).hexdigest()[:16] for image in images}
    assert not hashes & set(trained["pixel_hash"])


@pytest.mark.parametrize(("name", "style"), [("icons", ""), *(("emoji", style) for style in STYLES)])
def test_no_two_splits_share_a_drawing(name: str, style: str) -> None:
    """Icon sets copy each other: a shot that is also a test image measures memory."""
    prints = [fingerprints(pictures(load(name, f"{split}{style}"))) for split in SPLITS]
    for first, second in ((0, 1), (0, 2), (1, 2)):
        assert nearest(prints[first], prints[second])[0].max() <= THRESHOLD + 1e-4


@pytest.mark.slow
def test_fashion_splits_share_no_photo() -> None:
    """The official halves are disjoint; near-copies between them were dropped from the shots."""
    prints = {split: fingerprints(pictures(load("fashion", split))) for split in SPLITS}
    shots = torch.cat([prints["train"], prints["val"]])
    assert nearest(shots, prints["test"])[0].max() <= PHOTO_THRESHOLD + 1e-4


@pytest.mark.slow
@pytest.mark.skipif(
    "PEFT_VLM_CORPUS" not in os.environ,
    reason="reads the drawn training images, which are too large to commit: draw them with "
    "examples/assets/scripts/build_corpus.py and set PEFT_VLM_CORPUS to its output folder",
)
def test_recorded_correlations_are_those_of_the_corpus(rows: pd.DataFrame, trained: pd.DataFrame) -> None:
    """With the drawn corpus at hand, every stored correlation is recomputed from pixels."""
    corpus = Path(os.environ["PEFT_VLM_CORPUS"])
    table = pd.read_parquet(corpus / "images.parquet")
    images = np.load(corpus / "images.npy", mmap_mode="r")[np.flatnonzero(table["side"] == "pretraining")]
    assert len(images) == len(trained)
    data = [image for name, split in FILES if name != "fashion" for image in pictures(load(name, split))]
    correlation, _ = nearest(fingerprints(data), fingerprints(images))
    assert np.abs(correlation - rows["pretraining_correlation"].to_numpy()).max() < 2e-3
