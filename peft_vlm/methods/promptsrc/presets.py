"""Hyper-parameters of the official runs, by protocol, for ViT-B/16 (`"teacher"`: ViT-L/14)."""

from peft_vlm.registry import Preset


def _preset(*, depth: int, epochs: int, rate: float, batch: int, mean: float, std: float) -> Preset:
    """The settings that all configurations share, with those that differ."""
    tokens = {"num_text_tokens": 4, "num_vision_tokens": 4, "context_init": "a photo of a"}
    weights = {"text_weight": 25.0, "image_weight": 10.0, "logit_weight": 1.0}
    training = {"optim": "sgd", "learning_rate": rate, "momentum": 0.9, "weight_decay": 5e-4}
    training |= {"per_device_train_batch_size": batch, "num_train_epochs": epochs}
    training |= {"warmup_epochs": 1, "warmup_learning_rate": 1e-5}
    return Preset(
        config=tokens | {"text_depth": depth, "vision_depth": depth},
        objective=weights | {"gpa_mean": mean, "gpa_std": std},
        training=training,
    )


PRESETS: dict[str, Preset] = {
    # vit_b16_c2_ep20_batch4_4+4ctx.yaml
    "base_to_new": _preset(depth=9, epochs=20, rate=0.0025, batch=4, mean=15.0, std=1.0),
    # vit_b16_c2_ep20_batch4_4+4ctx_cross_datasets.yaml; also for other domains
    "cross_dataset": _preset(depth=3, epochs=20, rate=0.0025, batch=4, mean=6.0, std=10.0),
    # vit_b16_c2_ep50_batch4_4+4ctx_few_shot.yaml, for the datasets that are not in `LATE_MEAN`
    "few_shot": _preset(depth=9, epochs=50, rate=0.0025, batch=4, mean=30.0, std=30.0),
    # the same file, for the datasets in `LATE_MEAN`
    "few_shot_late": _preset(depth=9, epochs=50, rate=0.0025, batch=4, mean=45.0, std=5.0),
    # PromptKD, stage 1: vit_l14_c2_ep20_batch8_4+4ctx.yaml
    "teacher": _preset(depth=9, epochs=20, rate=0.005, batch=8, mean=15.0, std=1.0),
}
"""Official configurations by protocol."""

LATE_MEAN = ("stanford_cars", "oxford_flowers", "fgvc_aircraft", "dtd", "eurosat")
"""Datasets that the official few-shot configuration gives the later Gaussian (`"few_shot_late"`)."""


def preset_for(protocol: str) -> Preset:
    """An official preset.

    Args:
        protocol: Key of `PRESETS`.

    Raises:
        ValueError: If the protocol is unknown.
    """
    if protocol not in PRESETS:
        raise ValueError(f"Expected a protocol out of {sorted(PRESETS)}, got {protocol!r}.")
    preset = PRESETS[protocol]
    return Preset(config=dict(preset.config), objective=dict(preset.objective), training=dict(preset.training))
