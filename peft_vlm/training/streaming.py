"""Batches of a stream, which divides itself among processes."""

import warnings

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from peft_vlm.data.streams import ImageStream
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
    shards, readers = stream.source.num_shards, args.world_size * max(1, args.dataloader_num_workers)
    if shards % readers:
        message = (
            f"{shards} shards are not divided evenly by {args.world_size} processes with "
            f"{max(1, args.dataloader_num_workers)} readers each: in an epoch some images come twice and others not, "
            "and each process may read every row. Write a number of shards that both divide, or change "
            "`dataloader_num_workers`."
        )
        warnings.warn(message, PeftVLMWarning, stacklevel=2)
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
