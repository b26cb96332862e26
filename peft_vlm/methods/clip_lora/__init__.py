"""CLIP-LoRA (CVPR Workshops 2024): PEFT's LoRA on the attention of both towers, with the settings of the paper."""

from peft import LoraConfig, LoraModel

from peft_vlm.methods.clip_lora.convert import OFFICIAL_FORMATS, convert_checkpoint
from peft_vlm.methods.clip_lora.objective import CONFIG, PAPER, CLIPLoRAObjective, preset_for, recommended
from peft_vlm.objective import Paper
from peft_vlm.registry import AdapterType, TrainingMethod, register_adapter, register_method

register_adapter(
    AdapterType(
        name="lora",
        config=LoraConfig,
        tuner=LoraModel,
        title="LoRA",
        trained="low-rank updates of weight matrices",
        paper=Paper(
            title="LoRA: Low-Rank Adaptation of Large Language Models",
            year=2021,
            arxiv_id="2106.09685",
            venue="ICLR 2022",
            bibtex="""@inproceedings{hu2022lora,
  title     = {{LoRA}: Low-Rank Adaptation of Large Language Models},
  author    = {Hu, Edward J. and Shen, Yelong and Wallis, Phillip and Allen-Zhu, Zeyuan and Li, Yuanzhi and Wang, Shean
               and Wang, Lu and Chen, Weizhu},
  booktitle = {International Conference on Learning Representations},
  year      = {2022}
}""",
        ),
        formats=OFFICIAL_FORMATS,
    )
)
register_method(
    TrainingMethod(
        name="clip_lora",
        title="CLIP-LoRA",
        adapter="lora",
        paper=PAPER,
        objective=CLIPLoRAObjective,
        preset_for=preset_for,
        presets=("few_shot",),
        recommended=recommended,
        defaults=CONFIG,
    )
)

__all__ = ["CLIPLoRAObjective", "convert_checkpoint", "preset_for"]
