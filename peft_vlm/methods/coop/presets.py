"""Hyper-parameters of the official CoOp runs; the objective has nothing to set."""

from typing import Any

from peft_vlm.errors import check_choice
from peft_vlm.registry import Preset, RunSize

CONFIGS: dict[str, dict[str, Any]] = {
    "random": {"num_text_tokens": 16, "context_init": None},
    "words": {"num_text_tokens": 4, "context_init": "a photo of a"},  # *_ctxv1.yaml
}
"""`"random"`: the paper's 16 vectors; `"words"`: the four of the base-to-new comparisons."""


def preset_for(context: str = "random", *, shots: int, imagenet: bool = False) -> Preset:
    """An official preset: SGD at 0.002, batch 32, 50 epochs for 1 shot, 100 up to 4, 200 above; ImageNet always 50.

    Args:
        context: Key of `CONFIGS`.
        shots: Images per class.
        imagenet: Train 50 epochs whatever the number of shots (Sec. 4.1).

    Raises:
        ValueError: If there is no shot.
    """
    check_choice("context", context, sorted(CONFIGS))
    if shots < 1:
        raise ValueError(f"Expected `shots` of 1 or more, got {shots!r}.")
    epochs = 50 if shots == 1 or imagenet else 100 if shots <= 4 else 200
    training = {"optim": "sgd", "learning_rate": 0.002, "momentum": 0.9, "weight_decay": 5e-4}
    training |= {"per_device_train_batch_size": 32, "num_train_epochs": epochs}
    training |= {"warmup_epochs": 1, "warmup_learning_rate": 1e-5}
    return Preset(config=dict(CONFIGS[context]), training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the random context of the few-shot runs; on a small model four words.

    Args:
        run: Size of the run.
    """
    official = preset_for("random", shots=max(1, min(run.fewest, 16)))
    return run.recommend(official, rate=0.05, config={"context_init": "a photo of a"})
