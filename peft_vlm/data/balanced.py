"""Batches in which every class comes equally often, however many images it has."""

import math
from collections.abc import Iterator, Sequence

import numpy as np

from peft_vlm.objective import EpochBatchSampler


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
        order = np.argsort(np.asarray(labels), kind="stable")
        _, starts = np.unique(np.asarray(labels)[order], return_index=True)
        self._images = np.split(order, starts[1:])

    def __len__(self) -> int:
        return math.ceil(sum(map(len, self._images)) / self.batch_size)

    def __iter__(self) -> Iterator[list[int]]:
        random = np.random.default_rng([self.seed, self.epoch])
        total, classes = sum(map(len, self._images)), len(self._images)
        rounds = math.ceil(total / classes)
        columns = np.empty((rounds, classes), dtype=np.int64)
        for column, images in enumerate(self._images):
            passes = math.ceil(rounds / len(images))
            columns[:, column] = np.concatenate([random.permutation(images) for _ in range(passes)])[:rounds]
        positions = random.permuted(columns, axis=1).flatten()[:total]
        for start in range(0, total, self.batch_size):
            yield positions[start : start + self.batch_size].tolist()
