"""Hyper-parameters of the official runs, by protocol; `class_dim` comes from the teacher."""

from peft_vlm.errors import check_choice
from peft_vlm.registry import Preset, RunSize

_TRAINING = {
    **{"optim": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "learning_rate": 0.005, "num_train_epochs": 20},
    **{"warmup_epochs": 1, "warmup_learning_rate": 1e-5, "per_device_train_batch_size": 8},
    "dataloader_drop_last": True,
}

VISION_DEPTHS = {"base_to_new": 9, "cross_dataset": 3}
"""Layers with visual prompts by protocol, for a tower of 12 (the base-to-new and the cross-dataset configuration)."""

WEIGHT, LOW_WEIGHT = 1000.0, 200.0

LOW_WEIGHT_DATASETS = ("fgvc_aircraft", "oxford_flowers", "dtd")
"""Datasets for which a comment in the official scripts advises the lower weight."""

NUM_CLASSES = {
    **{"imagenet": 1000, "caltech101": 100, "oxford_pets": 37, "stanford_cars": 196, "oxford_flowers": 102},
    **{"food101": 101, "fgvc_aircraft": 100, "sun397": 397, "dtd": 47, "eurosat": 10, "ucf101": 101},
}
"""Classes of the official datasets. The official weight divided by it is the weight with `reduction="batchmean"`."""


def preset_for(protocol: str, *, low_weight: bool = False) -> Preset:
    """An official preset.

    Args:
        protocol: `"base_to_new"` or `"cross_dataset"`.
        low_weight: Loss weight 200 instead of 1000, as advised for the `LOW_WEIGHT_DATASETS`.
    """
    check_choice("protocol", protocol, sorted(VISION_DEPTHS))
    return Preset(
        config={"num_vision_tokens": 4, "vision_depth": VISION_DEPTHS[protocol]},
        objective={"weight": LOW_WEIGHT if low_weight else WEIGHT, "reduction": "official", "temperature": 1.0},
        training=dict(_TRAINING),
    )


def batchmean_weight(weight: float | int, num_classes: int) -> float:
    """The weight that gives the same loss with `reduction="batchmean"`.

    Args:
        weight: Weight with `reduction="official"`.
        num_classes: Classes of the prompts.
    """
    return weight / num_classes


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the base-to-new one; on a small model the default loss.

    Args:
        run: Size of the run.
    """
    return run.recommend(preset_for("base_to_new"), rate=0.01)
