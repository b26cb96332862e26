"""Hyper-parameters of the official PRE runs (minhanh151/PRE, commit 08be703)."""

from peft_vlm.errors import check_choice
from peft_vlm.registry import Preset, RunSize


def preset_for(protocol: str = "base_to_new") -> Preset:
    """Return the official preset: LSTM, four vectors from "a photo of a", SGD at 0.002, batch 32, 50 epochs.

    Args:
        protocol: `"base_to_new"`, the protocol of the official scripts (16 shots).
    """
    check_choice("protocol", protocol, ("base_to_new",))
    training = {"optim": "sgd", "learning_rate": 0.002, "momentum": 0.9, "weight_decay": 5e-4}
    training |= {"per_device_train_batch_size": 32, "num_train_epochs": 50}
    training |= {"warmup_epochs": 1, "warmup_learning_rate": 1e-5}
    config = {"num_text_tokens": 4, "context_init": "a photo of a", "network": "lstm"}
    return Preset(config=config, training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the official ones; on a small model its own rate.

    Args:
        run: Size of the run.
    """
    return run.recommend(preset_for(), rate=0.02, config={"context_init": "a photo of a"})
