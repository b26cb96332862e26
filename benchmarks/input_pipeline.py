"""Images per second that workers decode and augment, and what a cache of decoded images saves.

Photo-sized JPEG files (500 x 375 by default, random smooth colours with noise) go through `ImageClassificationDataset`
with `TrainTransform` (224 px, bicubic) and a data loader with persistent workers; then the same with
`decoded_images`, which keeps them as 8-bit RGB in a memory-mapped file that all workers share. Compare with the images
per second of a step in docs/scaling.md. No GPU.

    OMP_NUM_THREADS=1 python benchmarks/input_pipeline.py --json result.json
"""

import argparse
import json
import tempfile
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch.utils.data import DataLoader
from transformers import CLIPImageProcessorPil

from peft_vlm.data import ImageClassificationDataset, TrainTransform
from peft_vlm.data.feature_store import keep_decoded


def write_images(folder: Path, count: int, size: tuple[int, int]) -> list[dict[str, Any]]:
    """Random JPEG files of quality 90.

    Args:
        folder: Place of the files.
        count: Number of files.
        size: Columns and rows.
    """
    generator, rows = np.random.default_rng(0), []
    for number in range(count):
        coarse = generator.integers(0, 256, (12, 16, 3), dtype=np.uint8)
        smooth = np.asarray(Image.fromarray(coarse).resize(size, Image.Resampling.BICUBIC), dtype=np.int16)
        noisy = (smooth + generator.integers(-12, 13, smooth.shape)).clip(0, 255).astype(np.uint8)
        file = folder / f"{number}.jpg"
        Image.fromarray(noisy).save(file, quality=90)
        rows.append({"image": str(file), "label": number % 2})
    return rows


def images_per_second(source: Any, storage: str, *, workers: int, epochs: int, batch_size: int) -> float:
    """Images of whole epochs after a first one, which starts the workers and decodes what is kept.

    Args:
        source: Rows of images and labels.
        storage: Where decoded images are kept, or `"none"`.
        workers: Processes that read; 0 for this one.
        epochs: Epochs that are timed; the fastest counts, since other jobs may share the machine.
        batch_size: Images per batch.
    """
    dataset = ImageClassificationDataset(source, ["even", "odd"], transform=TrainTransform(CLIPImageProcessorPil()))
    dataset = keep_decoded(dataset, storage, reads_once=False)
    loader = DataLoader(
        dataset, batch_size, num_workers=workers, collate_fn=dataset.collate, persistent_workers=workers > 0
    )
    seconds = list(_epochs(loader, dataset, epochs + 1))[1:]
    return len(dataset) / min(seconds)


def _epochs(loader: DataLoader, dataset: ImageClassificationDataset, count: int) -> Iterator[float]:
    for epoch in range(count):
        dataset.set_epoch(epoch)
        start = time.perf_counter()
        for _ in loader:
            pass
        yield time.perf_counter() - start


def main() -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--images", type=int, default=256)
    parser.add_argument("--size", type=int, nargs=2, default=(500, 375), help="columns and rows")
    parser.add_argument("--workers", type=int, default=2)
    parser.add_argument("--epochs", type=int, default=3)
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--step", type=float, default=600.0, help="images per second of the step to be fed")
    parser.add_argument("--storage", choices=("ram", "disk"), default="disk", help="of the decoded images")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = write_images(Path(folder), options.images, tuple(options.size))
        same = {"workers": options.workers, "epochs": options.epochs, "batch_size": options.batch}
        plain, cached = (images_per_second(rows, storage, **same) for storage in ("none", options.storage))
    result = {
        "images_per_second": plain,
        "cached_images_per_second": cached,
        "cached_factor": cached / plain,
        "workers": options.workers,
        "workers_for_the_step": options.step / (plain / max(1, options.workers)),
        "cached_workers_for_the_step": options.step / (cached / max(1, options.workers)),
        "step_images_per_second": options.step,
        "storage": options.storage,
        "bytes_per_image": 3 * options.size[0] * options.size[1],
        "size": list(options.size),
        "torch": torch.__version__,
    }
    text = json.dumps(result, indent=2)
    print(text)
    if options.json is not None:
        options.json.write_text(text + "\n")


if __name__ == "__main__":
    main()
