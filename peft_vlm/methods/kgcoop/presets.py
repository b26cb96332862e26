"""Hyper-parameters of the official KgCoOp runs (htyao89/KgCoOp: `configs/trainers/KgCoOp`, `base2new_train.sh`)."""

from peft_vlm.errors import check_choice
from peft_vlm.registry import Preset, RunSize


def preset_for(protocol: str = "base_to_new") -> Preset:
    """Return an official preset: four vectors from "a photo of a", weight 8, SGD at 0.002, batch 128, 100 epochs.

    Args:
        protocol: `"base_to_new"`, the protocol of the official scripts (`vit_b16_ep100_ctxv1.yaml`, 16 shots).
    """
    check_choice("protocol", protocol, ("base_to_new",))
    training = {"optim": "sgd", "learning_rate": 0.002, "momentum": 0.9, "weight_decay": 5e-4}
    training |= {"per_device_train_batch_size": 128, "num_train_epochs": 100}
    training |= {"warmup_epochs": 1, "warmup_learning_rate": 1e-5}
    return Preset(
        config={"num_text_tokens": 4, "context_init": "a photo of a"}, objective={"weight": 8.0}, training=training
    )


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the official one.

    Args:
        run: Size of the run.
    """
    preset = run.recommend(preset_for(), rate=0.05, objective={"weight": 8.0})
    return Preset(config={"context_init": "a photo of a"}, objective=preset.objective, training=preset.training)
