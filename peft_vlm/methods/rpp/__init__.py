"""RPP (2024): prompts for queries, keys and values, pretrained once on thousands of classes with soft labels."""

from peft_vlm.methods.rpp.config import RPPConfig
from peft_vlm.methods.rpp.model import RPPModel
from peft_vlm.methods.rpp.objective import RPPObjective
from peft_vlm.methods.rpp.presets import PRESETS
from peft_vlm.registry import register_method

register_method("rpp", config_cls=RPPConfig, model_cls=RPPModel)

__all__ = ["PRESETS", "RPPConfig", "RPPModel", "RPPObjective"]
