"""Hyper-parameters of CPL: those of CoCoOp, as its configuration files are not public."""

from peft_vlm.errors import check_choice
from peft_vlm.registry import Preset, RunSize


def preset_for(protocol: str = "base_to_new") -> Preset:
    """Return CoCoOp's official preset: four vectors from "a photo of a", SGD at 0.002, batch 1, 10 epochs.

    Args:
        protocol: `"base_to_new"`, 16 shots.
    """
    check_choice("protocol", protocol, ("base_to_new",))
    training = {"optim": "sgd", "learning_rate": 0.002, "momentum": 0.9, "weight_decay": 5e-4}
    training |= {"per_device_train_batch_size": 1, "num_train_epochs": 10}
    training |= {"warmup_epochs": 1, "warmup_learning_rate": 1e-5}
    return Preset(config={"num_text_tokens": 4, "context_init": "a photo of a"}, training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the official ones; on a small model its own rate.

    Args:
        run: Size of the run.
    """
    return run.recommend(preset_for(), rate=0.01, batch=8, config={"context_init": "a photo of a"})
