"""Hyper-parameters of the official TVP code."""

from typing import Any

from peft_vlm.errors import check_choice
from peft_vlm.registry import Preset, RunSize


def preset_for(recipe: str = "cifar10") -> Preset:
    """An official preset: steps of length 10 on batches of 16, a cosine per epoch without warm-up.

    `"cifar10"` is the command of the official README, one epoch over all images with both weights; `"script"` what its
    training script does when nothing is given: ten epochs and no FCA or TSE, which is visual prompting.

    Args:
        recipe: `"cifar10"` or `"script"`.
    """
    recipes: dict[str, tuple[int, float, float]] = {"cifar10": (1, 0.005, 0.001), "script": (10, 0.0, 0.0)}
    check_choice("recipe", recipe, sorted(recipes))
    epochs, fca, tse = recipes[recipe]
    training: dict[str, Any] = {"learning_rate": 10.0, "per_device_train_batch_size": 16, "num_train_epochs": epochs}
    training |= {"warmup_epochs": 0, "weight_decay": 0.0}
    config: dict[str, Any] = {"canvas_size": 224, "border": 30, "shape": "border", "clamp": False}
    return Preset(config=config, objective={"fca_weight": fca, "tse_weight": tse}, training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the README's, without TSE, whose CLIP no setting names.

    Args:
        run: Size of the run.
    """
    small: dict[str, Any] = {"shape": "full", "canvas_size": 2, "border": 0, "shrink": "none"}
    preset = run.recommend(preset_for("cifar10"), rate=0.3, batch=8, config=small)
    return Preset(config=preset.config, objective={**preset.objective, "tse_weight": 0.0}, training=preset.training)
