"""Names of the files in an adapter folder, and what identifies its weights."""

import hashlib
from pathlib import Path

CONFIG_NAME = "adapter_config.json"
WEIGHTS_NAME = "adapter_model.safetensors"
SUMMARY_NAME = "training_summary.json"
METRICS_NAME = "metrics.json"
CURVE_NAME = "training_curve.png"
#: Evaluation of the adapter, and of the base model alone with the same images and texts.
REPORT_NAME = "report.json"
BASELINE_NAME = "zero_shot.json"
#: Evaluation of a pixel prompt on several multimodal models, which holds its own baselines, and the prompt's picture.
TRANSFER_NAME = "transfer.json"
PICTURE_NAME = "prompt.png"
#: What became of each tensor of an official checkpoint that the adapter was converted from.
CONVERSION_NAME = "conversion.json"
CLASSES_NAME = "class_names.txt"
CARD_NAME = "README.md"


def weights_sha256(folder: Path) -> str | None:
    """SHA-256 of an adapter's weights file; None where there is no such file, as for an id on a Hub.

    Args:
        folder: Local adapter folder.
    """
    path = folder / WEIGHTS_NAME
    return hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else None
