"""CLIP-LoRA's objective: cross-entropy over class prompts, the class features computed again in every step.

Low-Rank Few-Shot Adaptation of Vision-Language Models, 2024, arXiv 2405.18541.
"""

from typing import Any

from peft_vlm.classification import ClassificationObjective
from peft_vlm.errors import check_choice, check_number
from peft_vlm.objective import Paper
from peft_vlm.registry import Preset, RunSize

PAPER = Paper(
    title="Low-Rank Few-Shot Adaptation of Vision-Language Models",
    year=2024,
    arxiv_id="2405.18541",
    venue="CVPR Workshops 2024",
    bibtex="""@inproceedings{zanella2024low,
  title     = {Low-Rank Few-Shot Adaptation of Vision-Language Models},
  author    = {Zanella, Maxime and Ben Ayed, Ismail},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition Workshops},
  year      = {2024}
}""",
)


class CLIPLoRAObjective(ClassificationObjective):
    """Cross-entropy over all classes with a LoRA in one tower or both: `ClassificationObjective` as it is.

    Requirements:
        A `PeftModel` with an active LoRA (`peft.LoraConfig`); the rest as for its base.

    Relations:
        Any other adapter of PEFT trains with `ClassificationObjective` itself.

    Deviation: The official code multiplies cosines by the constant 100, the scale of OpenAI's CLIPs. Here it is the
        model's own scale, so that training and use agree on every base model.

    References:
        arXiv 2405.18541, Sec. 3.
    """

    paper = PAPER


# Hyper-parameters of the official CLIP-LoRA runs (MaxZanella/CLIP-LoRA, commit 358f0d7).

#: Query, key and value of both towers; the scale is alpha / sqrt(r), which PEFT calls rank-stabilised.
CONFIG: dict[str, Any] = {
    "r": 2,
    "lora_alpha": 1,
    "use_rslora": True,
    "lora_dropout": 0.25,
    "target_modules": ["q_proj", "k_proj", "v_proj"],
}


def preset_for(protocol: str = "few_shot", *, shots: int) -> Preset:
    """Return the official preset: AdamW at 2e-4, weight decay 0.01, batch 32, 500 steps per shot, cosine to 1e-6.

    Args:
        protocol: `"few_shot"`, the protocol of the official scripts, 1 to 16 shots.
        shots: Images per class.

    Raises:
        ValueError: If there is no shot.
    """
    check_choice("protocol", protocol, ("few_shot",))
    check_number("shots", shots, least=1)
    training = {"optim": "adamw_torch", "learning_rate": 2e-4, "weight_decay": 0.01, "max_grad_norm": 0.0}
    training |= {"per_device_train_batch_size": 32, "max_steps": 500 * shots, "warmup_epochs": 0}
    training |= {"lr_schedule": "transformers", "lr_scheduler_type": "cosine_with_min_lr"}
    training |= {"lr_scheduler_kwargs": {"min_lr": 1e-6}}
    return Preset(config=dict(CONFIG), training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the official ones, at most those of 16 shots.

    Args:
        run: Size of the run.
    """
    return run.recommend(preset_for(shots=max(1, min(run.fewest, 16))), rate=5e-3, optim="adamw_torch")
