"""Settings of whole runs: ours for the bundled models, and POMP's recipe with our prompts for ImageNet-21K."""

from typing import Any

from peft_vlm.errors import check_choice
from peft_vlm.registry import Preset, RunSize

PRESETS: dict[str, dict[str, dict[str, Any]]] = {
    # ours, for the bundled 48 px CLIPs: 4 text layers, 6 or 8 vision layers, so that J < L in both towers
    "demo": {
        "config": {"num_text_tokens": 4, "text_depth": 3, "num_vision_tokens": 4, "vision_depth": 5},
        "objective": {"num_sampled_classes": 128, "soft_weight": 0.5},
        "training": {
            "learning_rate": 0.02,  # ours, by validation accuracy of one run each at 0.005, 0.02, 0.05 and 0.2
            "max_steps": 150,
            "per_device_train_batch_size": 32,
            "lr_schedule": "transformers",
            "lr_scheduler_type": "cosine",
            "warmup_steps": 10,
            "save_strategy": "steps",
            "save_steps": 50,
            "logging_steps": 10,
        },
        "augmentation": {"scale": (0.7, 1.0), "flip_probability": 0.0},  # arrows and text must not be mirrored
        "few_shot": {
            "learning_rate": 0.02,  # ours, by validation accuracy over 0.005, 0.02, 0.05
            "max_steps": 12,
            "per_device_train_batch_size": 16,
            "warmup_epochs": 0,
            "logging_strategy": "no",
        },
    },
    # rate, schedule, batch (32 on each of 8 GPUs), epochs and K of POMP; RPP's own are not published
    "imagenet21k": {
        "config": {"num_text_tokens": 4, "text_depth": 9, "num_vision_tokens": 4, "vision_depth": 9},
        "objective": {"num_sampled_classes": 1000, "soft_weight": 0.5},
        "training": {
            "learning_rate": 0.002,
            "num_train_epochs": 5,
            "per_device_train_batch_size": 32,
            "warmup_epochs": 1,
            "warmup_learning_rate": 1e-5,
            "save_strategy": "steps",
            "save_steps": 500,
        },
        "augmentation": {"scale": (0.08, 1.0), "flip_probability": 0.5},
        "few_shot": {"learning_rate": 0.002, "num_train_epochs": 50, "per_device_train_batch_size": 32},
    },
}
"""Keyword arguments by preset: `config`, `objective`, `training`, `augmentation`, and `few_shot` training."""


def preset_for(name: str) -> Preset:
    """A preset as the parts that every method has.

    Args:
        name: Key of `PRESETS`.
    """
    check_choice("name", name, sorted(PRESETS))
    return Preset(**{part: dict(PRESETS[name][part]) for part in ("config", "objective", "training")})


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: POMP's few-shot training.

    Args:
        run: Size of the run.
    """
    official = Preset(training={"warmup_epochs": 0, **PRESETS["imagenet21k"]["few_shot"]})
    return run.recommend(official, rate=0.02)
