"""Settings of train_tvp.py: how the prompt looks and is trained, and the losses that are compared."""

from typing import Any

# "demo" is ours, for the bundled 48 to 64 px models; "official" is the paper's recipe for CIFAR-10.
PRESETS: dict[str, dict[str, Any]] = {
    "demo": {
        "prompt": {"shape": "full", "canvas_size": 2, "border": 0, "shrink": "none"},
        "objective": {"fca_weight": 0.005, "tse_weight": 0.001},
        "training": {"learning_rate": 0.3, "num_train_epochs": 2, "per_device_train_batch_size": 8},
        "crop": None,
    },
    "official": {
        "prompt": {},
        "objective": {"fca_weight": 0.005, "tse_weight": 0.001},
        "training": {"learning_rate": 10.0, "num_train_epochs": 1, "per_device_train_batch_size": 16},
        "crop": {"scale": (0.5, 1.0), "flip_probability": 0.5},
    },
}
VARIANTS = {
    "tvp": {},
    "no_fca": {"fca_weight": 0.0},
    "no_tse": {"tse_weight": 0.0},
    "visual_prompting": {"fca_weight": 0.0, "tse_weight": 0.0},
}
