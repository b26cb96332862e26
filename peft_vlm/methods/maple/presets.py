"""Hyper-parameters of the official MaPLe runs (muzairkhattak/multimodal-prompt-learning: `configs/trainers/MaPLe`)."""

from typing import Any

from peft_vlm.errors import check_choice
from peft_vlm.registry import Preset, RunSize

#: Depth, epochs and learning rate: `vit_b16_c2_ep5_batch4_2ctx`, and the same with `_cross_datasets`.
PROTOCOLS: dict[str, tuple[int, int, float]] = {"base_to_new": (9, 5, 0.0035), "cross_dataset": (3, 2, 0.0026)}


def preset_for(protocol: str = "base_to_new") -> Preset:
    """Return an official preset: two vectors that start as "a photo", SGD, batch 4.

    Args:
        protocol: `"base_to_new"` or `"cross_dataset"`.
    """
    check_choice("protocol", protocol, tuple(PROTOCOLS))
    depth, epochs, rate = PROTOCOLS[protocol]
    training: dict[str, Any] = {"optim": "sgd", "learning_rate": rate, "momentum": 0.9, "weight_decay": 5e-4}
    training |= {"per_device_train_batch_size": 4, "num_train_epochs": epochs}
    training |= {"warmup_epochs": 1, "warmup_learning_rate": 1e-5}
    config = {"num_text_tokens": 2, "depth": depth, "context_init": "a photo of a"}
    return Preset(config=config, training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the official ones; on a small model its own depth and rate.

    Args:
        run: Size of the run.
    """
    return run.recommend(preset_for(), rate=0.01, config={"context_init": "a photo of a"})
