"""Training: arguments, trainer, schedules, checkpoints and the files a run leaves behind."""

from peft_vlm.training.arguments import VLMTrainingArguments
from peft_vlm.training.trainer import VLMTrainer

__all__ = ["VLMTrainer", "VLMTrainingArguments"]
