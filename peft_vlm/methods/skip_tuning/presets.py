"""Hyper-parameters of the official runs, by protocol."""

from typing import Any

from peft_vlm.errors import check_choice
from peft_vlm.registry import Preset, RunSize

_TRAINING = {"optim": "sgd", "momentum": 0.9, "weight_decay": 5e-4, "per_device_train_batch_size": 4}
_OBJECTIVE = {"top_ratio": 0.5, "max_top": 50, "tail_scale": 0.3, "redraw_tail": "never"}


def _preset(**training: Any) -> Preset:
    """The settings that all configurations share, with the training settings that differ."""
    return Preset(config={"start_layer": 6}, objective=dict(_OBJECTIVE), training=_TRAINING | training)


PRESETS: dict[str, Preset] = {
    # vit_b16_bs4.yaml: "text 2e-5, image 5e-6", one warm-up epoch at 1e-6 for both towers
    "base_to_new": _preset(
        learning_rate=2e-5,
        vision_learning_rate=5e-6,
        num_train_epochs=20,
        warmup_epochs=1,
        warmup_learning_rate=1e-6,
    ),
    # vit_b16_bs4_cross_datasets.yaml
    "cross_dataset": _preset(
        learning_rate=1e-5,
        vision_learning_rate=1e-6,
        num_train_epochs=20,
        warmup_epochs=1,
        warmup_learning_rate=1e-8,
    ),
    # vit_b16_bs4_few_shot.yaml: one learning rate, no warm-up
    "few_shot": _preset(learning_rate=1e-5, num_train_epochs=40, warmup_epochs=0),
}
"""`base_to_new`, `cross_dataset` and `few_shot`; see `preset_for` for the data-dependent parts."""

QUARTER_EPOCHS = ("imagenet", "sun397", "food101")
"""Datasets on which the official scripts train a quarter of the epochs."""


def preset_for(protocol: str, *, shots: int, quarter_epochs: bool = False) -> Preset:
    """An official preset with the parts that depend on the data filled in.

    Args:
        protocol: Key of `PRESETS`.
        shots: Images per class; below 4 the official batches are random instead of one-class.
        quarter_epochs: Train `int(epochs / 4)` epochs, as the official scripts do on the `QUARTER_EPOCHS` datasets.
    """
    check_choice("protocol", protocol, sorted(PRESETS))
    preset = PRESETS[protocol]
    composition = "one_class" if shots >= 4 else "random"
    epochs = preset.training["num_train_epochs"] // (4 if quarter_epochs else 1)
    return Preset(
        config=dict(preset.config),
        objective={**preset.objective, "batch_composition": composition},
        training={**preset.training, "num_train_epochs": epochs},
    )


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: that of its protocol; on a small model random batches.

    Args:
        run: Size of the run.
    """
    official = preset_for(run.protocol, shots=run.fewest)
    return run.recommend(official, rate=0.02, objective={"batch_composition": "random"})
