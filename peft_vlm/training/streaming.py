"""Batches of a stream, which divides itself among processes."""

from accelerate.data_loader import prepare_data_loader
from torch.utils.data import DataLoader

from peft_vlm.data.streams import ImageStream
from peft_vlm.training.arguments import VLMTrainingArguments


def stream_loader(stream: ImageStream, args: VLMTrainingArguments, *, batch_size: int) -> DataLoader:
    """The loader of this process.

    Args:
        stream: Training images.
        args: Settings of the run.
        batch_size: Images per batch of a process.
    """
    stream.divide(batch_size=batch_size, rank=args.process_index, world_size=args.world_size)
    loader = DataLoader(
        stream,
        batch_size=batch_size,
        collate_fn=stream.collate,
        num_workers=args.dataloader_num_workers,
        pin_memory=args.dataloader_pin_memory and args.device.type == "cuda",
    )
    # already divided: accelerator.prepare would let one process read for all
    return prepare_data_loader(loader, device=args.device, num_processes=1, process_index=0, put_on_device=True)
