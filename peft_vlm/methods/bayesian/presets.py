"""Hyper-parameters of the official runs (saic-fi/Bayesian-Prompt-Learning, commit 8a73fff)."""

from peft_vlm.errors import check_choice
from peft_vlm.registry import Preset, RunSize


def preset_for(protocol: str = "base_to_new", *, samples: int = 20, epochs: int = 20) -> Preset:
    """Return the official preset: four vectors from "a photo of a", SGD at 0.002, batch 1.

    Args:
        protocol: `"base_to_new"`, 16 shots.
        samples: Official `L`, from 5 to 40 by dataset.
        epochs: From 10 to 60 by dataset; `examples/train_bayesian.py` lists both.
    """
    check_choice("protocol", protocol, ("base_to_new",))
    training = {"optim": "sgd", "learning_rate": 0.002, "momentum": 0.9, "weight_decay": 5e-4}
    training |= {"per_device_train_batch_size": 1, "num_train_epochs": epochs}
    training |= {"warmup_epochs": 1, "warmup_learning_rate": 1e-5}
    config = {"num_text_tokens": 4, "context_init": "a photo of a", "num_samples": samples}
    return Preset(config=config, training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the official ones; on a small model its own rate, width and samples.

    Args:
        run: Size of the run.
    """
    small = {"context_init": "a photo of a", "num_samples": 5, "residual_std": 0.1}
    return run.recommend(preset_for(), rate=0.05, config=small)
