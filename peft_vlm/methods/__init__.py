"""The methods, one folder each. Every one is imported here by name, which registers it with PEFT."""

from peft_vlm.methods import clip_lora, cocoop, coop, kgcoop, maple, pre, promptkd, promptsrc, rpp, skip_tuning, tvp

__all__ = [
    "clip_lora",
    "cocoop",
    "coop",
    "kgcoop",
    "maple",
    "pre",
    "promptkd",
    "promptsrc",
    "rpp",
    "skip_tuning",
    "tvp",
]
