"""Batches of a stream, which divides itself among processes."""

import warnings

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from peft_vlm.data.streaming import ImageStream
from peft_vlm.errors import PeftVLMWarning
from peft_vlm.training.arguments import VLMTrainingArguments


def stream_loader(stream: ImageStream, args: VLMTrainingArguments, *, batch_size: int) -> DataLoader:
    """The loader of this process.

    Args:
        stream: Training images.
        args: Settings of the run.
        batch_size: Images per batch of a process.
    """
    stream.divide(batch_size=batch_size, rank=args.process_index, world_size=args.world_size)
    if args.process_index == 0:
        name_uneven_shards(stream.source.num_shards, args.world_size, args.dataloader_num_workers)
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
