"""Room for stored tensors; images that are decoded once."""

from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image
from torch.utils.data import DataLoader

from peft_vlm import VLMTrainingArguments
from peft_vlm.data import ImageClassificationDataset, TrainTransform, feature_store
from peft_vlm.data import dataset as dataset_module
from peft_vlm.data.feature_store import RowStore, keep_decoded
from peft_vlm.errors import DataError
from tests.short_run import train
from tests.tiny import clip_processor, noise_image
from tests.tiny_streams import stream, table

ROWS = (2**40, 2**10)  # 4 PB in float32


def test_what_memory_does_not_hold_is_refused_before_the_work_begins(tmp_path, monkeypatch):
    """The system grants such an allocation and kills the process when it is filled."""
    memory = tmp_path / "meminfo"
    memory.write_text("MemTotal: 4096 kB\nMemAvailable: 2048 kB\n")
    monkeypatch.setattr(feature_store, "_MEMORY", memory)
    with pytest.raises(DataError, match=r"room for 4194304.0 GB of states, got 0.0 GB free in RAM.*'none'"):
        RowStore("ram", name="states").allocate(ROWS, torch.float32)
    store = RowStore("ram", name="states")
    store.allocate((512, 1024), torch.float32)  # 2048 kB
    with pytest.raises(DataError):
        RowStore("ram", name="states").allocate((513, 1024), torch.float32)


def test_what_the_disk_does_not_hold_is_refused(tmp_path):
    """The file would be made, and the process would die of a bus error on the way."""
    folder = tmp_path / "not" / "made" / "yet"
    with pytest.raises(DataError, match=r"room for 4194304.0 GB of states, got .* free in "):
        RowStore("disk", name="states", folder=folder).allocate(ROWS, torch.float32)
    assert len(list(tmp_path.rglob("*.bin"))) == 0


def photos(folder: Path, *, broken: bool = False) -> ImageClassificationDataset:
    """Files of several sizes, one lying on its side, one grey, one with a palette; the last may be damaged."""
    images = [noise_image(30 + number, 20, seed=number) for number in range(6)]
    images[2], images[3] = images[2].convert("L"), images[3].convert("P")
    rows = []
    for number, image in enumerate(images):
        path, options = folder / f"{number}.png", {}
        if number == 1:
            options["exif"] = Image.Exif()
            options["exif"][0x0112] = 6  # turned by 90 degrees
        image.save(path, **options)
        rows.append({"image": str(path), "label": number % 2})
    if broken:
        (folder / "5.png").write_bytes((folder / "5.png").read_bytes()[:200])
    return ImageClassificationDataset(rows, ["even", "odd"], transform=TrainTransform(clip_processor()))


@pytest.mark.parametrize("storage", ["ram", "disk"])
@pytest.mark.parametrize("workers", [0, 2])
def test_images_that_are_decoded_once_have_the_pixels_of_their_files(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, storage: str, workers: int
) -> None:
    """Sizes by header and by content differ where a photo lies on its side; a subset has positions of its own."""
    plain, expected = photos(tmp_path), []
    for epoch in range(3):
        plain.set_epoch(epoch)
        expected.append(plain.collate([plain[i] for i in range(6)])["pixel_values"])
    images = [np.asarray(plain.image(i)) for i in (4, 1)]
    kept = keep_decoded(photos(tmp_path), storage, reads_once=False)
    for epoch in range(3):
        if epoch == 1:  # by now all are there
            monkeypatch.setattr(dataset_module, "read_image", lambda *args, **kwargs: pytest.fail("decoded again"))
        kept.set_epoch(epoch)
        loader = DataLoader(kept, 2, collate_fn=kept.collate, num_workers=workers)
        found = torch.cat([batch["pixel_values"] for batch in loader])
        assert torch.equal(found, expected[epoch])
    subset = kept.select([4, 1])
    assert all(np.array_equal(np.asarray(subset.image(i)), images[i]) for i in range(2))


def test_a_damaged_image_is_named_when_it_is_needed(tmp_path: Path) -> None:
    """Its header may announce pixels that are not there."""
    kept = keep_decoded(photos(tmp_path, broken=True), "ram", reads_once=False)
    for _ in range(2):
        with pytest.raises(DataError, match=r"5\.png"):
            kept.image(5)
    kept.unreadable.skip(True)
    assert kept[5]["labels"] == 1


def test_a_run_that_keeps_decoded_images_trains_the_same(tmp_path: Path) -> None:
    """And one in which nothing would be read from there twice is refused."""
    options: dict[str, Any] = {"data": {"augmented": True}, "save_strategy": "no"}
    losses = {}
    for storage in ("none", "ram"):
        trainer = train(tmp_path / storage, "promptsrc", decoded_images=storage, **options)
        losses[storage] = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    assert losses["ram"] == losses["none"]
    with pytest.raises(DataError, match="got 'ram': the objective stores features"):
        train(tmp_path / "stored", "coop", decoded_images="ram", save_strategy="no")
    with pytest.raises(DataError, match="got 'disk': a stream has no positions"):
        keep_decoded(stream(table()), "disk", reads_once=False)
    with pytest.raises(ValueError, match="decoded_images"):
        VLMTrainingArguments(output_dir=str(tmp_path), use_cpu=True, decoded_images="gpu")
