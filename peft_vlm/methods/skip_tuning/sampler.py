"""Batch composition of Skip Tuning: batches of one class each, or shuffled ones, drawn by the official rule."""

import logging
import random
from collections.abc import Iterator, Sequence

from peft_vlm.errors import DataError
from peft_vlm.objective import EpochBatchSampler

logger = logging.getLogger(__name__)


class SkipTuningBatchSampler(EpochBatchSampler):
    """Batches for one epoch.

    `"one_class"`: repeatedly choose one of the remaining classes uniformly and draw a batch of its remaining images.
    `"random"`: draw batches from all remaining images. What is left when fewer than a full batch remain is kept as a
    smaller batch (`remainder="keep"`) or left out of this epoch (`remainder="drop"`, the official rule).

    Args:
        labels: Class of each image.
        batch_size: Images per batch.
        seed: Seed of the run; the epoch is added to it.
        composition: `"one_class"` (official for 4 or more shots) or `"random"` (official below that).
        remainder: What happens to images that do not fill a batch.

    Raises:
        DataError: With `remainder="drop"`, if a class (or the whole set) has fewer images than a batch, which would
            never be seen. The official code crashes there.

    Deviation: The default keeps remainders, so that every shot is used in every epoch.
    """

    def __init__(
        self,
        labels: Sequence[int],
        *,
        batch_size: int,
        seed: int,
        composition: str,
        remainder: str = "keep",
    ) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.composition, self.remainder = composition, remainder
        self.pools: dict[int, list[int]] = {}
        for index, label in enumerate(labels):
            self.pools.setdefault(label if composition == "one_class" else 0, []).append(index)
        small = {label: len(pool) for label, pool in self.pools.items() if len(pool) < batch_size}
        if remainder == "drop" and small:
            raise DataError(
                f"Expected at least `batch_size`={batch_size} images in each "
                f"{'class' if composition == 'one_class' else 'training set'} with remainder='drop', got {small!r} "
                "(class: images). Use remainder='keep' or a smaller batch."
            )
        dropped = sum(len(pool) % batch_size for pool in self.pools.values()) if remainder == "drop" else 0
        if dropped:
            logger.info("Batches of %d leave out %d of %d images in each epoch.", batch_size, dropped, len(labels))

    def __len__(self) -> int:
        """Batches in an epoch; the same in every epoch."""
        extra = self.batch_size - 1 if self.remainder == "keep" else 0
        return sum((len(pool) + extra) // self.batch_size for pool in self.pools.values())

    def __iter__(self) -> Iterator[list[int]]:
        """Batches of the epoch set by `set_epoch`."""
        return self.draw(random.Random(self.seed + self.epoch))

    def draw(self, rng: random.Random) -> Iterator[list[int]]:
        """Batches drawn with a given generator.

        Args:
            rng: Python generator; seeded like the official run's, it gives the official batches.

        Yields:
            Lists of dataset positions.
        """
        pools = {label: list(pool) for label, pool in self.pools.items()}
        while pools:
            label = rng.choice(list(pools)) if self.composition == "one_class" else 0
            pool = pools[label]
            batch = rng.sample(pool, min(self.batch_size, len(pool)))
            taken = set(batch)
            pools[label] = pool = [index for index in pool if index not in taken]
            if not pool or (self.remainder == "drop" and len(pool) < self.batch_size):
                del pools[label]
            yield batch
