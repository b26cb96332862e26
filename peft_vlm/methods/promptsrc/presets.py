"""Hyper-parameters of the official runs, by protocol, for ViT-B/16 (`"teacher"`: ViT-L/14), and their templates."""

from peft_vlm.errors import check_choice
from peft_vlm.registry import Preset, RunSize

# 60 of OpenAI's 80 ImageNet templates (openai/CLIP, `Prompt_Engineering_for_ImageNet.ipynb`, MIT licence), as chosen
# in muzairkhattak/PromptSRC, `trainers/imagenet_templates.py`, commit 8be7dcf. They describe photographs.
OFFICIAL_TEMPLATES = (
    "a photo of a {}.",
    "a bad photo of a {}.",
    "a photo of many {}.",
    "a sculpture of a {}.",
    "a photo of the hard to see {}.",
    "a low resolution photo of the {}.",
    "a rendering of a {}.",
    "graffiti of a {}.",
    "a bad photo of the {}.",
    "a cropped photo of the {}.",
    "a tattoo of a {}.",
    "the embroidered {}.",
    "a photo of a hard to see {}.",
    "a bright photo of a {}.",
    "a photo of a clean {}.",
    "a photo of a dirty {}.",
    "a dark photo of the {}.",
    "a drawing of a {}.",
    "a photo of my {}.",
    "the plastic {}.",
    "a photo of the cool {}.",
    "a close-up photo of a {}.",
    "a black and white photo of the {}.",
    "a painting of the {}.",
    "a painting of a {}.",
    "a pixelated photo of the {}.",
    "a sculpture of the {}.",
    "a bright photo of the {}.",
    "a cropped photo of a {}.",
    "a plastic {}.",
    "a photo of the dirty {}.",
    "a jpeg corrupted photo of a {}.",
    "a blurry photo of the {}.",
    "a photo of the {}.",
    "a good photo of the {}.",
    "a rendering of the {}.",
    "a {} in a video game.",
    "a photo of one {}.",
    "a doodle of a {}.",
    "a close-up photo of the {}.",
    "the origami {}.",
    "the {} in a video game.",
    "a sketch of a {}.",
    "a doodle of the {}.",
    "a origami {}.",
    "a low resolution photo of a {}.",
    "the toy {}.",
    "a rendition of the {}.",
    "a photo of the clean {}.",
    "a photo of a large {}.",
    "a rendition of a {}.",
    "a photo of a nice {}.",
    "a photo of a weird {}.",
    "a blurry photo of a {}.",
    "a cartoon {}.",
    "art of a {}.",
    "a sketch of the {}.",
    "a embroidered {}.",
    "a pixelated photo of a {}.",
    "itap of the {}.",
)


def _preset(*, depth: int, epochs: int, rate: float, batch: int, mean: float, std: float) -> Preset:
    """The settings that all configurations share, with those that differ."""
    tokens = {"num_text_tokens": 4, "num_vision_tokens": 4, "context_init": "a photo of a"}
    weights = {"text_weight": 25.0, "image_weight": 10.0, "logit_weight": 1.0}
    training = {"optim": "sgd", "learning_rate": rate, "momentum": 0.9, "weight_decay": 5e-4}
    training |= {"per_device_train_batch_size": batch, "num_train_epochs": epochs}
    training |= {"warmup_epochs": 1, "warmup_learning_rate": 1e-5}
    return Preset(
        config=tokens | {"text_depth": depth, "vision_depth": depth},
        objective=weights | {"gpa_mean": mean, "gpa_std": std},
        training=training,
    )


PRESETS: dict[str, Preset] = {
    # vit_b16_c2_ep20_batch4_4+4ctx.yaml
    "base_to_new": _preset(depth=9, epochs=20, rate=0.0025, batch=4, mean=15.0, std=1.0),
    # vit_b16_c2_ep20_batch4_4+4ctx_cross_datasets.yaml; also for other domains
    "cross_dataset": _preset(depth=3, epochs=20, rate=0.0025, batch=4, mean=6.0, std=10.0),
    # vit_b16_c2_ep50_batch4_4+4ctx_few_shot.yaml, for the datasets that are not in `LATE_MEAN`
    "few_shot": _preset(depth=9, epochs=50, rate=0.0025, batch=4, mean=30.0, std=30.0),
    # the same file, for the datasets in `LATE_MEAN`
    "few_shot_late": _preset(depth=9, epochs=50, rate=0.0025, batch=4, mean=45.0, std=5.0),
    # PromptKD, stage 1: vit_l14_c2_ep20_batch8_4+4ctx.yaml
    "teacher": _preset(depth=9, epochs=20, rate=0.005, batch=8, mean=15.0, std=1.0),
}
"""Official configurations by protocol."""

LATE_MEAN = ("stanford_cars", "oxford_flowers", "fgvc_aircraft", "dtd", "eurosat")
"""Datasets that the official few-shot configuration gives the later Gaussian (`"few_shot_late"`)."""


def preset_for(protocol: str) -> Preset:
    """An official preset.

    Args:
        protocol: Key of `PRESETS`.
    """
    check_choice("protocol", protocol, sorted(PRESETS))
    preset = PRESETS[protocol]
    return Preset(config=dict(preset.config), objective=dict(preset.objective), training=dict(preset.training))


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: that of its protocol, its aggregation as long as the run.

    Args:
        run: Size of the run.
    """
    official = preset_for(run.protocol)
    preset = run.recommend(official, rate=0.01)
    share = preset.training["num_train_epochs"] / official.training["num_train_epochs"]
    scaled = {name: round(share * official.objective[name], 3) for name in ("gpa_mean", "gpa_std")}
    return Preset(config=preset.config, objective={**preset.objective, **scaled}, training=preset.training)
