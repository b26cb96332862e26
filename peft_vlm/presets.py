"""The form of an official configuration; each method lists its own in `methods/<name>/presets.py`."""

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True, kw_only=True)
class Preset:
    """Settings of one official configuration, as keyword arguments for the three places settings live in.

    Args:
        config: For the method's configuration.
        objective: For its objective; empty where the objective has nothing to set.
        training: For `VLMTrainingArguments`.
    """

    config: dict[str, Any] = field(default_factory=dict)
    objective: dict[str, Any] = field(default_factory=dict)
    training: dict[str, Any] = field(default_factory=dict)
