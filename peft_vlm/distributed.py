"""What the processes of one training agree on. With one process, or none started, nothing here communicates.

Every function that communicates must be called by all processes at the same place.
"""

import logging
import os
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from weakref import WeakSet

import torch
from torch import Tensor, distributed
from tqdm.auto import tqdm

_bars: "WeakSet[Any]" = WeakSet()
_left_out = False
_apart = False


def num_processes() -> int:
    """Processes of this training."""
    return distributed.get_world_size() if _started() and not _apart else 1


def process_index() -> int:
    """Number of this process, from 0."""
    return distributed.get_rank() if _started() else 0


def local_place() -> tuple[int, int]:
    """Number of this process among those of this machine, and how many they are, as the launcher says."""
    if not _started():
        return 0, 1
    return int(os.environ.get("LOCAL_RANK", 0)), int(os.environ.get("LOCAL_WORLD_SIZE", distributed.get_world_size()))


def local_index() -> int:
    """Number of this process on its machine, which is that of its GPU; the launcher's word."""
    return int(os.environ.get("LOCAL_RANK", 0))


def is_main_process() -> bool:
    """Whether this process writes; before the processes are connected the launcher's word counts."""
    return process_index() == 0 if _started() else int(os.environ.get("RANK", 0)) == 0


def shows_progress() -> bool:
    """Whether this process says how far it is: the main one, unless the logger `peft_vlm` is set above WARNING."""
    return is_main_process() and logging.getLogger("peft_vlm").isEnabledFor(logging.WARNING)


def progress_bar(items: Any = None, *, disable: bool = False, **options: Any) -> Any:
    """A `tqdm` bar where progress is shown, and none of these bars is open already: one line at a time.

    Args:
        items: What is gone through, if anything.
        disable: Show no bar.
        **options: For `tqdm`.
    """
    is_inside = any(not bar.disable for bar in _bars)  # a bar that was closed is a disabled one
    bar = tqdm(items, disable=disable or is_inside or not shows_progress(), **options)
    _bars.add(bar)
    return bar


def wait_for_everyone() -> None:
    """Go on when all processes are here."""
    if num_processes() > 1:
        distributed.barrier()


def all_agree(value: bool) -> bool:
    """Whether a statement holds on every process.

    Args:
        value: The statement on this process.
    """
    if num_processes() == 1:
        return value
    flag = torch.tensor(int(value), device=_device())
    distributed.all_reduce(flag, op=distributed.ReduceOp.MIN)
    return bool(flag)


def from_main(value: Any) -> Any:
    """The main process's value, on every process.

    Args:
        value: Anything that pickles; of the other processes it is not used.
    """
    if num_processes() == 1:
        return value
    box = [value]
    distributed.broadcast_object_list(box, src=0)
    return box[0]


def from_all(value: Any) -> list[Any]:
    """The values of all processes in their order.

    Args:
        value: Anything that pickles.
    """
    box = [value] * num_processes()
    if num_processes() > 1:
        distributed.all_gather_object(box, value)
    return box


@contextmanager
def apart() -> Iterator[None]:
    """Within this, every process works for itself: all do the same work, and exchange nothing."""
    global _apart
    before, _apart = _apart, True
    try:
        yield
    finally:
        _apart = before


@contextmanager
def left_out(leave_out: bool) -> Iterator[None]:
    """Within this, the rows of this process count nowhere: they only fill a place in a step that has too few.

    Args:
        leave_out: False: they count.
    """
    global _left_out
    before, _left_out = _left_out, leave_out
    try:
        yield
    finally:
        _left_out = before


def is_left_out() -> bool:
    """Whether the rows of this process are mere fillers."""
    return _left_out


def share_of(count: Tensor) -> Tensor:
    """Factors that turn means over this process's items into parts whose mean over the processes is the mean over all
    items: n_i W / (n_1 + ... + n_W), and 0 where there are no items at all.

    Args:
        count: Number of items behind each mean.
    """
    count = count.float() * (0.0 if _left_out else 1.0)
    if num_processes() == 1:
        return torch.ones_like(count)
    return count * num_processes() / sum_over_processes(count).clamp(min=1.0)


def shared_mean(means: Sequence[tuple[Tensor, int]]) -> Tensor:
    """The mean of several means, each turned into this process's part of the mean over all processes.

    Args:
        means: Scalars, each with the number of items that it is the mean of on this process.
    """
    counts = torch.tensor([count for _, count in means], device=means[0][0].device)
    return (torch.stack([mean for mean, _ in means]) * share_of(counts)).mean()


def sum_over_processes(value: Tensor) -> Tensor:
    """Sum of the processes' tensors; those that are left out count as 0.

    Args:
        value: Of the same shape everywhere.
    """
    if num_processes() == 1:
        return value
    total = torch.zeros_like(value) if _left_out else value.detach().clone()
    distributed.all_reduce(total)
    return total


def gather_rows(rows: Tensor) -> Tensor:
    """Rows of all processes below each other in the order of the processes, without gradient.

    Args:
        rows: Any number of rows on each process; those that are left out do not appear.
    """
    if num_processes() == 1:
        return rows
    rows = rows.detach()[: 0 if _left_out else None]
    counts = [torch.zeros((), dtype=torch.long, device=rows.device) for _ in range(num_processes())]
    distributed.all_gather(counts, torch.tensor(len(rows), device=rows.device))
    longest = int(max(counts))
    padded = rows.new_zeros(longest, *rows.shape[1:])
    padded[: len(rows)] = rows
    gathered = [torch.empty_like(padded) for _ in counts]
    distributed.all_gather(gathered, padded)
    return torch.cat([part[: int(count)] for part, count in zip(gathered, counts, strict=True)])


def divided(count: int, function: Callable[[Tensor], Tensor], *, chunk_size: int) -> Tensor:
    """A row for each of `count` items, computed by all processes together and then there on all of them.

    Args:
        count: Number of items, at least one.
        function: Rows of some items by their numbers.
        chunk_size: Items per call.
    """
    part = part_of(count, index=0 if _apart else process_index(), parts=num_processes())
    chunks = equal_passes(part, total=count, parts=num_processes(), size=chunk_size)
    return gather_rows(torch.cat([function(chunk) for chunk in chunks])[: len(part)])


def equal_passes(part: range, *, total: int, parts: int, size: int) -> list[Tensor]:
    """A process's part of some items in chunks, as many on every process: layers with divided weights run together.

    A process that is an item short has a smaller chunk, or its last item once more.

    Args:
        part: Numbers of this process's items, by `part_of`.
        total: Number of items of all processes, at least one.
        parts: Number of processes.
        size: Items per chunk at most.
    """
    if parts == 1:
        return list(torch.arange(total).split(size))
    passes = -(-len(part_of(total, index=parts - 1, parts=parts)) // size)  # the last part is never the shorter one
    return in_passes(torch.tensor(part or [0]), passes)


def in_passes(rows: Tensor, passes: int) -> list[Tensor]:
    """Rows in so many chunks of about equal size, none of them empty: if there are too few, the last comes again.

    Args:
        rows: At least one.
        passes: Number of chunks.
    """
    missing = max(0, passes - len(rows))
    return list(torch.cat([rows, rows[-1:].expand(missing, *rows.shape[1:])]).tensor_split(passes))


def part_of(total: int, *, index: int, parts: int) -> range:
    """A contiguous part of `range(total)`; the parts differ by one in length at most.

    Args:
        total: Number of items.
        index: Which part, from 0.
        parts: Number of parts.
    """
    return range(total * index // parts, total * (index + 1) // parts)


def _started() -> bool:
    return distributed.is_available() and distributed.is_initialized()


def _device() -> torch.device:
    """Where small tensors must lie for the backend in use."""
    is_nccl = "nccl" in distributed.get_backend()
    return torch.device("cuda", torch.cuda.current_device()) if is_nccl else torch.device("cpu")
