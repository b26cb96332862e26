"""Streams of coloured squares, six classes, for tests."""

from pathlib import Path
from typing import Any

import datasets.config
from datasets import ClassLabel, Dataset, Features, Image

from peft_vlm.data import ImageStream, load_image_stream
from peft_vlm.data.transforms import EvalTransform
from tests.tiny import COLOURS, clip_processor, colour_rows

NAMES = list(COLOURS)
# `datasets` waits five seconds at the end of every pass over several parquet files, for threads of Arrow to end.
datasets.config.SLEEP_TIME_ON_THREADS_SHUTDOWN = 0.1


def table(per_class: int = 4) -> Dataset:
    """The images in memory."""
    features = Features({"image": Image(), "label": ClassLabel(names=NAMES)})
    return Dataset.from_list(colour_rows(per_class), features=features)


def write_shards(folder: Path) -> Path:
    """24 images in four parquet files; the folder."""
    folder.mkdir(exist_ok=True)
    for number in range(4):
        table().shard(4, number).to_parquet(folder / f"train-{number:05d}-of-00004.parquet")
    return folder


def stream(source: Any, **settings: Any) -> ImageStream:
    """A stream of 24 images per epoch."""
    own = {"num_images": 24, "transform": EvalTransform(clip_processor()), "shuffle_buffer": 8, "seed": 3}
    return load_image_stream(source, **(own | settings))
