"""One row per training method: how to build it on a tiny model. The contract tests run every promise on every row, and
the promises about adapters alone once per adapter type.
"""

from collections.abc import Callable, Sequence
from typing import Any

import torch
from peft import LoraConfig
from peft.tuners.tuners_utils import BaseTunerLayer
from torch import Tensor, nn
from transformers import CLIPProcessor

from peft_vlm import (
    ATPromptObjective,
    BayesianConfig,
    BayesianObjective,
    CLIPLoRAObjective,
    CoCoOpConfig,
    CoCoOpObjective,
    CoOpConfig,
    CoOpObjective,
    CPLObjective,
    KgCoOpObjective,
    MaPLeConfig,
    MaPLeObjective,
    PREObjective,
    PromptKDConfig,
    PromptKDObjective,
    PromptSRCConfig,
    PromptSRCObjective,
    RPPConfig,
    RPPObjective,
    SkipTuningConfig,
    SkipTuningObjective,
    TVPConfig,
    TVPObjective,
)
from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.transforms import EvalTransform, TrainTransform
from peft_vlm.models.towers import image_features
from peft_vlm.objective import Objective
from peft_vlm.text.class_features import conditioned_context, conditioned_logits
from peft_vlm.text.prompts import ClassPrompts, reserve_slots, tokenize_classes
from tests.case import Case
from tests.tiny import CONTEXT_LENGTH, clip_processor, colour_names, colour_rows, tiny_clip, tiny_tokenizer

NUM_CLASSES = 6
WORD_A = tiny_tokenizer()("a", add_special_tokens=False)["input_ids"]


def bayesian_config(**settings: Any) -> BayesianConfig:
    """Two vectors in three samples."""
    return BayesianConfig(**({"num_text_tokens": 2, "context_init": None, "num_samples": 3} | settings))


def skip_tuning_config(**settings: Any) -> SkipTuningConfig:
    """Upper two of three layers."""
    return SkipTuningConfig(**({"start_layer": 1} | settings))


def skip_tuning_objective(prompts: ClassPrompts, **settings: Any) -> SkipTuningObjective:
    """Random batches, so that a batch has several classes."""
    return SkipTuningObjective(prompts, **({"batch_composition": "random", "top_ratio": 0.5} | settings))


def lora_config(*, init_weights: bool = True, **settings: Any) -> LoraConfig:
    """Query, key and value of both towers; PEFT calls `init_weights` otherwise."""
    own = {"r": 2, "target_modules": ["q_proj", "k_proj", "v_proj"], "init_lora_weights": init_weights}
    return LoraConfig(**(own | settings))


def coop_config(**settings: Any) -> CoOpConfig:
    """One vector that starts as the word "a", with which the template begins."""
    return CoOpConfig(**({"context_init_ids": WORD_A} | settings))


def atprompt_config(**settings: Any) -> CoOpConfig:
    """One vector, the word "a" and two vectors."""
    own = {"num_text_tokens": 2, "attribute_ids": [WORD_A], "num_attribute_tokens": [1]}
    return CoOpConfig(**(own | settings))


def pre_config(**settings: Any) -> CoOpConfig:
    """Two vectors, encoded by an LSTM."""
    return CoOpConfig(**({"num_text_tokens": 2, "network": "lstm"} | settings))


def promptsrc_config(**settings: Any) -> PromptSRCConfig:
    """Three text layers and two vision layers of three, two tokens each."""
    own = {"num_text_tokens": 2, "text_depth": 3, "num_vision_tokens": 2, "vision_depth": 2, "context_init": None}
    return PromptSRCConfig(**(own | settings))


def cocoop_config(**settings: Any) -> CoCoOpConfig:
    """Two vectors."""
    return CoCoOpConfig(**({"num_text_tokens": 2, "context_init": None} | settings))


def maple_config(**settings: Any) -> MaPLeConfig:
    """Two tokens in two layers of three."""
    return MaPLeConfig(**({"depth": 2, "context_init": None} | settings))


def rpp_config(**settings: Any) -> RPPConfig:
    """Two layers of three in both towers, two slots each, so that every query prompt can act."""
    own = {"num_text_tokens": 2, "text_depth": 2, "num_vision_tokens": 2, "vision_depth": 2, "context_init": None}
    return RPPConfig(**(own | settings))


def rpp_objective(prompts: ClassPrompts, **settings: Any) -> RPPObjective:
    """Three classes per step, and soft labels of a random teacher."""
    return RPPObjective(prompts, **({"teacher": tiny_clip(seed=5, dim=24), "num_sampled_classes": 3} | settings))


TEACHER_DIM = 24


def promptkd_config(**settings: Any) -> PromptKDConfig:
    """Two vision layers of three and, with `init_weights=False`, random vectors of the colour classes."""
    own = {"class_dim": TEACHER_DIM, "vision_depth": 2, "num_vision_tokens": 2, "init_weights": False}
    return PromptKDConfig(**(own | {"num_classes": NUM_CLASSES, "class_names": list(colour_names())} | settings))


def promptkd_objective(prompts: ClassPrompts, **settings: Any) -> PromptKDObjective:
    """A random teacher with wider class vectors."""
    return PromptKDObjective(prompts, **({"teacher": tiny_clip(seed=5, dim=TEACHER_DIM)} | settings))


def tvp_config(**settings: Any) -> TVPConfig:
    """A canvas of the model's size with a border of 3 px."""
    return TVPConfig.for_processor(clip_processor(), **({"canvas_size": 16, "border": 3} | settings))


def tvp_objective(prompts: ClassPrompts, **settings: Any) -> TVPObjective:
    """Cross-entropy and feature consistency; the CLIP is its own critic."""
    return TVPObjective(prompts, **({"tse_weight": 0.0} | settings))


CASES = [
    Case(
        method="bayesian",
        config=bayesian_config,
        objective=BayesianObjective,
        other_shape={"num_text_tokens": 3, "conditional": True, "num_samples": 2},
        starts_as_base=False,
        image_conditioned=True,
        saved_module="visual_projection",
        batch_dependent="every step draws contexts of its own",
        bad_settings=(
            ({"num_text_tokens": 0}, "1 or more, got 0"),
            ({"num_samples": 0}, "1 or more, got 0"),
            ({"num_samples": 10**9}, "from 1 to 1000, got 1000000000"),
            ({"num_samples": 2.5}, "integer, got 2.5"),
            ({"noise_seed": -1}, "0 or more, got -1"),
            ({"noise_seed": 2**32}, "from 0 to 4294967295, got 4294967296"),
            ({"residual_std": 0.0}, "above 0 or None, got 0.0"),
            ({"residual_std": float("nan")}, "finite number"),
            ({"conditional": "yes"}, "True or False, got 'yes'"),
            ({"context_init": "a photo"}, "has no tokenizer to read them"),
            ({"target_modules": "q_proj"}, "chooses its modules"),
            ({"task_type": "FEATURE_EXTRACTION"}, "`task_type`=None"),
        ),
    ),
    Case(
        method="clip_lora",
        config=lora_config,
        objective=CLIPLoRAObjective,
        other_shape={"r": 4},
        bad_settings=(
            ({"r": 0}, "`r` should be a positive integer value but the value passed is 0"),
            ({"target_modules": "no_such_module"}, "not found in the base model"),
        ),
    ),
    Case(
        method="cocoop",
        config=cocoop_config,
        objective=CoCoOpObjective,
        other_shape={"num_text_tokens": 3},
        starts_as_base=False,
        image_conditioned=True,
        saved_module="visual_projection",
        bad_settings=(
            ({"num_text_tokens": 0}, "1 or more, got 0"),
            ({"num_text_tokens": 1.5}, "integer, got 1.5"),
            ({"context_init": "a photo"}, "has no tokenizer to read them"),
            ({"target_modules": "q_proj"}, "chooses its modules"),
            ({"task_type": "FEATURE_EXTRACTION"}, "`task_type`=None"),
        ),
    ),
    Case(
        method="coop",
        config=coop_config,
        objective=CoOpObjective,
        other_shape={"context_init_ids": None, "num_text_tokens": 5, "class_position": "end"},
        saved_module="visual_projection",
        bad_settings=(
            ({"num_text_tokens": 0}, "1 or more, got 0"),
            ({"num_text_tokens": 1.5}, "integer or None, got 1.5"),
            ({"class_position": "behind"}, "('end', 'middle', 'front'), got 'behind'"),
            ({"class_specific": True}, "nothing to say about new classes"),
            ({"context_init_ids": []}, "Expected words in `context_init`"),
            ({"context_init_ids": None, "context_init": "a photo"}, "has no tokenizer to read them"),
            ({"target_modules": "q_proj"}, "chooses its modules"),
            ({"task_type": "FEATURE_EXTRACTION"}, "`task_type`=None"),
        ),
    ),
    Case(
        method="atprompt",
        config=atprompt_config,
        objective=ATPromptObjective,
        starts_as_base=False,
        saved_module="visual_projection",
    ),
    Case(
        method="cpl",
        config=cocoop_config,
        objective=CPLObjective,
        starts_as_base=False,
        image_conditioned=True,
        saved_module="visual_projection",
    ),
    Case(
        method="kgcoop",
        config=coop_config,
        objective=KgCoOpObjective,
        saved_module="visual_projection",
    ),
    Case(
        method="maple",
        config=maple_config,
        objective=MaPLeObjective,
        other_shape={"num_text_tokens": 3, "depth": 3},
        starts_as_base=False,
        saved_module="visual_projection",
        bad_settings=(
            ({"depth": 0}, "1 or more, got 0"),
            ({"depth": 4}, "`text_depth` from 0 to 3"),
            ({"num_text_tokens": 0}, "1 or more, got 0"),
            ({"num_text_tokens": "2"}, "integer, got '2'"),
            ({"context_init_ids": WORD_A}, "`num_text_tokens` of at most 1"),
            ({"context_init": "a photo of a"}, "has no tokenizer to read them"),
            ({"target_modules": "q_proj"}, "chooses its modules"),
            ({"task_type": "FEATURE_EXTRACTION"}, "`task_type`=None"),
        ),
    ),
    Case(
        method="pre",
        config=pre_config,
        objective=PREObjective,
        starts_as_base=False,
        saved_module="visual_projection",
    ),
    Case(
        method="promptkd",
        config=promptkd_config,
        objective=promptkd_objective,
        other_shape={"vision_depth": 3, "num_vision_tokens": 1, "projector_depth": 3, "projector_norm": "layernorm"},
        starts_as_base=False,
        text_free=True,
        saved_module="post_layernorm",
        zero_gradients={"promptkd_linear1.default.bias": "BatchNorm takes the mean away"},
        batch_dependent="BatchNorm normalises by the batch",
        bad_settings=(
            ({"class_dim": None}, "class_dim=teacher.config.projection_dim"),
            ({"class_dim": 0}, "1 or more, got 0"),
            ({"vision_depth": 4}, "`vision_depth` from 0 to 3"),
            ({"vision_depth": -1}, "0 or more, got -1"),
            ({"num_vision_tokens": 0}, "1 or more, got 0"),
            ({"projector_depth": 4}, "from 1 to 3, got 4"),
            ({"projector_norm": "groupnorm"}, "('batchnorm', 'layernorm', 'none'), got 'groupnorm'"),
            ({"tune_vision": True}, "`vision_depth`=0 with `tune_vision`=True, got 2"),
            ({"num_classes": 5}, "6 names and `num_classes`=5"),
            ({"target_modules": "q_proj"}, "chooses its modules"),
            ({"task_type": "FEATURE_EXTRACTION"}, "`task_type`=None"),
        ),
    ),
    Case(
        method="promptsrc",
        config=promptsrc_config,
        objective=PromptSRCObjective,
        other_shape={"num_text_tokens": 4, "text_depth": 1, "num_vision_tokens": 1, "vision_depth": 3},
        starts_as_base=False,
        saved_module="visual_projection",
        bad_settings=(
            ({"text_depth": -1}, "0 or more, got -1"),
            ({"vision_depth": 4}, "`vision_depth` from 0 to 3"),
            ({"text_depth": 9}, "`text_depth` from 0 to 3"),
            ({"num_vision_tokens": "2"}, "integer, got '2'"),
            ({"num_text_tokens": 0, "vision_depth": 0}, "at least one tower"),
            ({"context_init_ids": WORD_A, "num_text_tokens": 2}, "`num_text_tokens` of at most 1"),
            ({"context_init": "a photo of a"}, "has no tokenizer to read them"),
            ({"target_modules": "q_proj"}, "chooses its modules"),
            ({"task_type": "FEATURE_EXTRACTION"}, "`task_type`=None"),
        ),
    ),
    Case(
        method="rpp",
        config=rpp_config,
        objective=rpp_objective,
        other_shape={"num_text_tokens": 3, "text_depth": 3, "vision_depth": 1, "share_qkv": "all"},
        starts_as_base=False,
        saved_module="visual_projection",
        batch_dependent="the drawn classes depend on the batch",
        bad_settings=(
            ({"text_depth": 3}, "text layers [0, 1, 2]: no unprompted layer follows"),
            ({"slot_residual": "replaced"}, "vision layers [0]: the next layer overwrites"),
            ({"vision_depth": 4}, "`vision_depth` from 0 to 3"),
            ({"num_vision_tokens": 1.5}, "integer, got 1.5"),
            ({"text_depth": -1}, "0 or more, got -1"),
            ({"text_depth": 0, "vision_depth": 0}, "at least one tower"),
            ({"share_qkv": "key"}, "('none', 'all'), got 'key'"),
            ({"slot_residual": "sum"}, "('stream', 'replaced'), got 'sum'"),
            ({"dead_prompts": "keep"}, "('refuse', 'omit'), got 'keep'"),
            ({"context_init": "a photo of a"}, "has no tokenizer to read them"),
            ({"context_init_ids": WORD_A}, "`num_text_tokens` of at most 1"),
            ({"target_modules": "q_proj"}, "chooses its modules"),
            ({"task_type": "FEATURE_EXTRACTION"}, "`task_type`=None"),
        ),
    ),
    Case(
        method="skip_tuning",
        config=skip_tuning_config,
        objective=skip_tuning_objective,
        other_shape={"start_layer": 2},
        can_merge=True,
        zero_gradients={"k_proj.skip_tuning_bias": "softmax does not change when all keys shift alike"},
        batch_dependent="CSkip chooses the classes by the whole batch",
        bad_settings=(
            ({"start_layer": -1}, "0 or more, got -1"),
            ({"start_layer": 3}, "from 0 to 2"),
            ({"start_layer": 1.5}, "integer or None, got 1.5"),
            ({"text_start_layer": 7}, "`text_start_layer` from 0 to 2"),
            ({"adapter_dtype": "int8"}, "got 'int8'"),
            ({"target_modules": "q_proj"}, "chooses its modules"),
            ({"task_type": "FEATURE_EXTRACTION"}, "`task_type`=None"),
        ),
    ),
    Case(
        method="tvp",
        config=tvp_config,
        objective=tvp_objective,
        other_shape={"canvas_size": 24, "border": 4, "shrink": "none"},
        starts_as_base=False,
        fits_any_base=True,
        bad_settings=(
            ({"canvas_size": 0}, "1 or more, got 0"),
            ({"canvas_size": 16.0}, "integer, got 16.0"),
            ({"border": -1}, "0 or more, got -1"),
            ({"border": 8}, "below half of `canvas_size`=16, got 8"),
            ({"border": 0}, "nothing to train"),
            ({"shape": "ring"}, "('border', 'full', 'patch'), got 'ring'"),
            ({"shape": "patch"}, "`patch_size` to be an integer, got None"),
            ({"shape": "patch", "patch_size": 17}, "up to `canvas_size`=16, got 17"),
            ({"patch_size": 4}, "only with `shape`='patch', got 4"),
            ({"shrink": "crop"}, "('model', 'processor', 'none'), got 'crop'"),
            ({"clamp": "yes"}, "`clamp` to be True or False, got 'yes'"),
            ({"image_mean": None}, "together, got None and"),
            ({"image_mean": [0.5], "image_std": [0.5]}, "3 values, got [0.5]"),
            ({"image_std": [0.5, 0.0, 0.5]}, "above 0, got [0.5, 0.0, 0.5]"),
            ({"image_mean": None, "image_std": None}, "TVPConfig.for_processor(processor)"),
            ({"target_modules": "q_proj"}, "chooses its modules"),
            ({"task_type": "FEATURE_EXTRACTION"}, "`task_type`=None"),
        ),
    ),
]

#: The first row of each adapter type, for promises that do not depend on how an adapter was trained.
ALL_ADAPTER_CASES = list({case.adapter: case for case in reversed(CASES)}.values())[::-1]
#: Those of this package, for promises that PEFT does not make for its own types.
ADAPTER_CASES = [case for case in ALL_ADAPTER_CASES if case.is_own]


def class_prompts(names: Sequence[str] | None = None) -> ClassPrompts:
    """Prompts of the colour classes."""
    names = names or colour_names(NUM_CLASSES)
    return tokenize_classes(tiny_tokenizer(), names, template="a {}.", max_length=CONTEXT_LENGTH)


def model_inputs(case: Case, model: nn.Module, pixel_values: Tensor) -> dict[str, Tensor]:
    """What the model's own forward takes with its adapter as it is now: prompts with that adapter's slots, or none."""
    layers = [module for module in model.modules() if isinstance(module, BaseTunerLayer)]
    if case.text_free and any(layer.active_adapters and not layer.disable_adapters for layer in layers):
        return {"pixel_values": pixel_values}
    return {"pixel_values": pixel_values, "input_ids": reserve_slots(model, class_prompts()).input_ids}


def pixels(count: int = 4) -> Tensor:
    """Images of the first classes, one each."""
    dataset = images(per_class=1)
    return torch.stack([dataset[i]["pixel_values"] for i in range(count)])


@torch.no_grad()
def logits_of(case: Case, model: nn.Module, pixel_values: Tensor | None = None) -> Tensor:
    """Logits of the model's own forward, over the colour classes; of `conditioned_logits` where it refuses."""
    if conditioned_context(model) is not None:
        images = pixels() if pixel_values is None else pixel_values
        features = image_features(model, images)
        return conditioned_logits(model, class_prompts(), features).to(features.dtype)
    inputs = model_inputs(case, model, pixels() if pixel_values is None else pixel_values)
    return model(**inputs).logits_per_image


def images(per_class: int = 4, *, seed: int = 0) -> ImageClassificationDataset:
    """Colour images with a deterministic transform."""
    rows = colour_rows(per_class, classes=NUM_CLASSES, seed=seed)
    return ImageClassificationDataset(rows, colour_names(NUM_CLASSES), transform=EvalTransform(clip_processor()))


def augmented() -> ImageClassificationDataset:
    """Colour images with random crops."""
    return images().with_transform(TrainTransform(clip_processor(), scale=(0.2, 1.0)))


def prepared(case: Case, model: nn.Module, dataset: ImageClassificationDataset, **settings: Any) -> Objective:
    """The method's objective, ready for batches of the dataset."""
    objective = case.objective(class_prompts(), **settings)
    objective.prepare(model, dataset)
    objective.epoch_start(model, dataset, 0)
    return objective


def perturb(model: nn.Module) -> None:
    """Move every trainable tensor a little, so that an adapter acts."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for parameter in model.parameters():
            if parameter.requires_grad:
                parameter += 0.1 * torch.randn(parameter.shape, generator=generator).to(parameter)


def base_model(**settings: Any) -> nn.Module:
    """The tiny CLIP of every case."""
    return tiny_clip(**settings)


def processor() -> CLIPProcessor:
    """Tokenizer and image processor of the tiny CLIP."""
    return CLIPProcessor(image_processor=clip_processor(), tokenizer=tiny_tokenizer())


def kept_for_backward(compute: Callable[[], Tensor]) -> int:
    """Bytes that autograd keeps for the backward pass of a loss, which then runs; each storage counts once."""
    sizes: dict[int, int] = {}

    def keep(tensor: Tensor) -> Tensor:
        sizes[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        loss = compute()
    total = sum(sizes.values())
    loss.backward()
    return total
