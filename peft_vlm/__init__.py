"""Prompts and selective tuning for vision-language models, as PEFT methods. Importing it registers them with PEFT."""

from peft_vlm.classifier import PromptedClassifier
from peft_vlm.methods.skip_tuning import SkipTuningConfig, SkipTuningModel, SkipTuningObjective
from peft_vlm.training import VLMTrainer, VLMTrainingArguments

__all__ = [
    "PromptedClassifier",
    "SkipTuningConfig",
    "SkipTuningModel",
    "SkipTuningObjective",
    "VLMTrainer",
    "VLMTrainingArguments",
]
