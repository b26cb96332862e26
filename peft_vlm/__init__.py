"""Prompts and selective tuning for vision-language models, as PEFT methods. Importing it registers them with PEFT."""

from peft_vlm.classifier import PromptedClassifier
from peft_vlm.hub import publish
from peft_vlm.methods.coop import CoOpConfig, CoOpModel, CoOpObjective
from peft_vlm.methods.promptkd import PromptKDConfig, PromptKDModel, PromptKDObjective
from peft_vlm.methods.promptsrc import PromptSRCConfig, PromptSRCModel, PromptSRCObjective
from peft_vlm.methods.rpp import RPPConfig, RPPModel, RPPObjective
from peft_vlm.methods.skip_tuning import (
    SkipTuningAnswerObjective,
    SkipTuningConfig,
    SkipTuningModel,
    SkipTuningObjective,
)
from peft_vlm.methods.tvp import TVPConfig, TVPModel, TVPObjective
from peft_vlm.training import VLMTrainer, VLMTrainingArguments

__all__ = [
    "CoOpConfig",
    "CoOpModel",
    "CoOpObjective",
    "PromptKDConfig",
    "PromptKDModel",
    "PromptKDObjective",
    "PromptSRCConfig",
    "PromptSRCModel",
    "PromptSRCObjective",
    "PromptedClassifier",
    "RPPConfig",
    "RPPModel",
    "RPPObjective",
    "SkipTuningAnswerObjective",
    "SkipTuningConfig",
    "SkipTuningModel",
    "SkipTuningObjective",
    "TVPConfig",
    "TVPModel",
    "TVPObjective",
    "VLMTrainer",
    "VLMTrainingArguments",
    "publish",
]
