"""Which images a step sees: the same ones whatever the number of processes, each process with its part of them."""

import warnings
from collections.abc import Iterator, Sequence
from functools import partial
from typing import Any

import torch
from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader
from transformers.trainer_utils import seed_worker

from peft_vlm.distributed import num_processes, part_of, process_index
from peft_vlm.errors import PeftVLMWarning
from peft_vlm.objective import EpochBatchSampler, Objective
from peft_vlm.training.arguments import VLMTrainingArguments

FILLER = "is_filler"
"""Column of a batch that only fills a place: the step has fewer images than processes."""


class ShuffledBatches(EpochBatchSampler):
    """All images in random order; the last batch may be smaller, or is left out.

    Args:
        num_images: Images in the dataset.
        batch_size: Images per batch.
        seed: Seed of the run; the epoch is added to it.
        drop_last: Leave out a last batch that is not full.
    """

    def __init__(self, num_images: int, *, batch_size: int, seed: int, drop_last: bool = False) -> None:
        super().__init__(batch_size=batch_size, seed=seed)
        self.num_images, self.drop_last = num_images, drop_last

    def __iter__(self) -> Iterator[list[int]]:
        order = torch.randperm(self.num_images, generator=torch.Generator().manual_seed(self.seed + self.epoch))
        for batch in order.split(self.batch_size):
            if len(batch) == self.batch_size or not self.drop_last:
                yield batch.tolist()

    def __len__(self) -> int:
        return (self.num_images + (0 if self.drop_last else self.batch_size - 1)) // self.batch_size


class ProcessShard(EpochBatchSampler):
    """This process's part of every batch; no image is left out or comes twice.

    The batches are those of all processes together, so a method composes them as it would in one process: a batch of
    one class has one class on all of them. A process whose part is empty gets an empty list.

    Args:
        batches: Sampler that draws the same batches on every process.
    """

    def __init__(self, batches: EpochBatchSampler) -> None:
        super().__init__(batch_size=batches.batch_size, seed=batches.seed)
        self.batches = batches

    def set_epoch(self, epoch: int) -> None:
        """Choose the epoch of the next iteration."""
        self.batches.set_epoch(epoch)

    def __len__(self) -> int:
        return len(self.batches)

    def __iter__(self) -> Iterator[list[int]]:
        for batch in self.batches:
            part = part_of(len(batch), index=process_index(), parts=num_processes())
            yield batch[part.start : part.stop]


class FillingCollate:
    """The dataset's `collate`; for no items, its first one as a filler that counts nowhere.

    Args:
        dataset: Dataset with a `collate`.
    """

    def __init__(self, dataset: Any) -> None:
        self.dataset = dataset

    def __call__(self, items: Sequence[Any]) -> dict[str, Any]:
        """A batch."""
        if items:
            return self.dataset.collate(items)
        return {**self.dataset.collate([self.dataset[0]]), FILLER: torch.ones(1, dtype=torch.bool)}


def train_loader(images: Any, objective: Objective, args: VLMTrainingArguments, *, batch_size: int) -> DataLoader:
    """This process's batches, on the device of the run.

    Batches are those that the objective composes, else shuffled; without pixels when the objective stores features.

    Args:
        images: The run's `RunImages`.
        objective: Composes batches, and says whether they need pixels.
        args: Settings of the run.
        batch_size: Images per process and batch.
    """
    if not images.has_positions:
        return _stream_loader(images, args, batch_size=batch_size)
    dataset = images if objective.needs_pixels else images.without_pixels()
    size, seed = batch_size * num_processes(), args.seed if args.data_seed is None else args.data_seed
    batches = objective.batch_sampler(images.labels, batch_size=size, seed=args.seed)
    if batches is None:
        batches = ShuffledBatches(len(dataset), batch_size=size, seed=seed, drop_last=args.dataloader_drop_last)
    workers = args.dataloader_num_workers if objective.needs_pixels else 0
    several = num_processes() > 1
    loader = DataLoader(
        dataset,
        batch_sampler=ProcessShard(batches) if several else batches,
        collate_fn=FillingCollate(dataset) if several else dataset.collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
        persistent_workers=args.dataloader_persistent_workers and workers > 0,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
        worker_init_fn=partial(seed_worker, num_workers=workers, rank=args.process_index),
    )
    # already this process's part: accelerator.prepare would divide again and mistreat batches of different sizes
    return prepare_data_loader(loader, device=args.device, num_processes=1, process_index=0, put_on_device=True)


def _stream_loader(stream: Any, args: VLMTrainingArguments, *, batch_size: int) -> DataLoader:
    """The part of a stream that this process reads."""
    stream.divide(batch_size=batch_size, rank=args.process_index, world_size=args.world_size)
    if args.process_index == 0:
        name_uneven_shards(stream.num_shards, args.world_size, args.dataloader_num_workers)
    loader = DataLoader(
        stream,
        batch_size=batch_size,
        collate_fn=stream.collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
    )
    # already divided: by default one process would read for all
    options = {"num_processes": 1, "process_index": 0, "put_on_device": True, "dispatch_batches": False}
    return prepare_data_loader(loader, device=args.device, **options)


def evaluation_loader(dataset: Any, args: VLMTrainingArguments) -> DataLoader:
    """All images in their order, with the dataset's own collator; to be divided by `accelerator.prepare`.

    Args:
        dataset: A dataset with positions.
        args: Settings of the run; `dataloader_drop_last` is that of the training.
    """
    workers = args.dataloader_num_workers
    return DataLoader(
        dataset,
        batch_size=args.eval_batch_size,
        collate_fn=dataset.collate,
        num_workers=workers,
        pin_memory=args.dataloader_pin_memory,
        prefetch_factor=args.dataloader_prefetch_factor if workers else None,
    )


def name_uneven_shards(shards: int, processes: int, workers: int) -> None:
    """Warn of shards that readers cannot divide: rows are divided then, which costs time, or, by workers, images."""
    each, rest = divmod(shards, processes)
    if rest:
        message = f"{processes} processes cannot divide {shards} shards evenly, so each of them reads every row. "
    elif workers > 1 and each % workers:
        message = f"{workers} workers cannot divide {each} shards evenly: some images come twice, others not at all. "
    else:
        return
    advice = "Write another number of shards, or change the number of processes or `dataloader_num_workers`."
    warnings.warn(message + advice, PeftVLMWarning, stacklevel=3)
