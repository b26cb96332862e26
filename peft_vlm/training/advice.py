"""What to do about errors of the machine: too little memory, a worker that died."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch

from peft_vlm.errors import PeftVLMError

OUT_OF_MEMORY = ("out of memory", "not enough memory", "can't allocate memory", "cannot allocate memory")
CACHES = ("image_cache", "state_cache", "fca_cache", "cache_storage")


@contextmanager
def with_advice(args: Any, settings: dict[str, Any]) -> Iterator[None]:
    """Errors of the machine leave this with a message that says what to change.

    Args:
        args: Settings of the run.
        settings: Those of the objective, for caches that could lie elsewhere.

    Raises:
        MemoryError: In place of what torch raises.
        PeftVLMError: If a worker died.
    """
    try:
        yield
    except (RuntimeError, MemoryError) as error:
        first = str(error).partition("\n")[0] or "Out of memory."
        is_memory = isinstance(error, torch.OutOfMemoryError | MemoryError)
        if is_memory or any(words in str(error).lower() for words in OUT_OF_MEMORY):
            raise MemoryError(f"{first} {what_to_lower(args, settings)}") from error
        if "DataLoader worker" in str(error):
            raise PeftVLMError(
                f"A process that reads images died: {first} The system usually ends it for want of memory. Lower "
                f"`dataloader_num_workers` (now {args.dataloader_num_workers}) or the objective's `num_workers`, give "
                "a container more shared memory (`--shm-size`), and go on with `resume_from_checkpoint='auto'`."
            ) from error
        raise


def what_to_lower(args: Any, settings: dict[str, Any]) -> str:
    """How the same training takes less memory.

    Args:
        args: Settings of the run.
        settings: Those of the objective.
    """
    size, accumulation = args.per_device_train_batch_size, args.gradient_accumulation_steps
    advice = []
    if size > 1:
        advice.append(
            f"`per_device_train_batch_size={size // 2}` with `gradient_accumulation_steps={2 * accumulation}` (now "
            f"{size} and {accumulation}) takes half of the images' activations"
        )
    if not args.activation_checkpointing:
        advice.append("`gradient_checkpointing=True` recomputes them")
    if not (args.bf16 or args.fp16):
        advice.append("`bf16=True` halves them")
    for name in CACHES:
        if settings.get(name) == "ram":
            advice.append(f"the objective's `{name}='ram'` holds features in memory, 'disk' and 'none' do not")
    advice.append("fewer classes per run shorten the text side")
    return f"Lower what the run needs: {'; '.join(advice)}. Then go on with `resume_from_checkpoint='auto'`."
