"""The methods, one folder each. Every one is imported here by name, which registers it with PEFT."""

from peft_vlm.methods import coop  # isort: skip - first: other methods train its adapter type
from peft_vlm.methods import (
    atprompt,
    bayesian,
    clip_lora,
    cocoop,
    cpl,
    kgcoop,
    maple,
    pre,
    promptkd,
    promptsrc,
    rpp,
    skip_tuning,
    tvp,
)

__all__ = [
    "atprompt",
    "bayesian",
    "clip_lora",
    "cocoop",
    "coop",
    "cpl",
    "kgcoop",
    "maple",
    "pre",
    "promptkd",
    "promptsrc",
    "rpp",
    "skip_tuning",
    "tvp",
]
