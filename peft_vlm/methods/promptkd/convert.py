"""Official PromptKD checkpoints to adapter folders. A teacher's is a PromptSRC file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtyping import Float
from peft import PeftModel, get_peft_model, get_peft_model_state_dict
from torch import Tensor
from transformers import PreTrainedTokenizerBase

from peft_vlm.conversion.base_model import (
    ADAPTER_PREFIX,
    VISION,
    load_base,
    official_names,
    official_pixels,
    official_weights,
    take_learned_tokens,
    write_adapter,
)
from peft_vlm.conversion.export import OfficialCheckpoint, adapter_tensors, base_tensors, official_tokens
from peft_vlm.conversion.official_file import ConversionReport, OfficialFile
from peft_vlm.errors import AdapterError
from peft_vlm.methods.promptkd.config import PromptKDConfig
from peft_vlm.methods.promptkd.model import PromptKDModel
from peft_vlm.registry import OfficialFormat

KIND = "PromptKD"
PROJECTOR = {
    "VPT_image_trans.conv1.0": "linear1",
    "VPT_image_trans.conv1.1": "norm1",
    "VPT_image_trans.conv1.3": "linear2",
}
"""Official 1x1 convolution, BatchNorm, 1x1 convolution, and ours."""


def convert_checkpoint(
    source: str | Path | OfficialFile,
    folder: str | Path,
    *,
    base_model: str | Path,
    class_names: Sequence[str],
    class_vectors: Float[Tensor, "classes dim"],
    template: str | None = None,
    teacher_name: str | None = None,
    teacher_logit_scale: float | None = None,
) -> ConversionReport:
    """Write an adapter folder from `VLPromptLearner/model.pth.tar-*` of a PromptKD student.

    Args:
        source: The official file: visual tokens and projector; no class vectors, no class names.
        folder: New folder.
        base_model: Folder or id of the student's CLIP.
        class_names: Classes in label order, all that the student is to know.
        class_vectors: The teacher's class features, `encode_classes(teacher, prompts)`; convert the teacher's
            checkpoint first, as PromptSRC.
        template: Text around a class name that the teacher read; recorded.
        teacher_name: Whose vectors they are; recorded.
        teacher_logit_scale: The factor in the teacher's logits; recorded.
    """
    file = OfficialFile.open(source)
    base = load_base(base_model)
    tensors, num_vision, depth = take_learned_tokens(file, VISION, prefix=PromptKDModel.prefix)
    for official, own in PROJECTOR.items():
        for name in file.names(rf"{official}\..*".replace(".conv1.", r"\.conv1\.")):
            kind, tensor = name.rpartition(".")[2], file.take(name)
            weight = tensor[..., 0, 0] if tensor.ndim == 4 else tensor
            tensors[f"visual_projection.{PromptKDModel.prefix}{own}.{kind}"] = weight.contiguous()
    frozen = {k: v for k, v in official_weights(base).items() if k.startswith("image_encoder.") or k == "logit_scale"}
    file.compare_frozen(frozen, base_name=base.name_or_path)
    config = PromptKDConfig(
        class_dim=len(file.tensors["VPT_image_trans.conv1.3.bias"]),
        num_vision_tokens=num_vision or 4,
        vision_depth=depth,
        template=template,
        **official_pixels(base),
    )
    model = get_peft_model(base, config)
    model.set_class_vectors(
        class_names, class_vectors, teacher_name=teacher_name, teacher_logit_scale=teacher_logit_scale
    )
    own = get_peft_model_state_dict(model)
    vectors = {k.removeprefix(ADAPTER_PREFIX): v for k, v in own.items() if k.endswith("class_vectors")}
    return write_adapter(model, tensors | vectors, folder, file=file, kind=KIND)


def to_official(model: PeftModel, tokenizer: PreTrainedTokenizerBase | None) -> OfficialCheckpoint:
    """`VLPromptLearner/model.pth.tar-*` of an official PromptKD student; its class vectors stay behind.

    Args:
        model: Model with the active adapter.
        tokenizer: The base model's; the file holds no texts.

    Raises:
        AdapterError: If the student has another projector than the official ones, or no visual tokens.
    """
    config, own = model.active_peft_config, adapter_tensors(model)
    shape = (config.projector_depth, config.projector_norm)
    if shape != (2, "batchnorm") or not config.vision_depth:
        raise AdapterError(
            "Expected a student with visual tokens and a projector of 2 layers with BatchNorm, the only one of the "
            f"official code, got `vision_depth`={config.vision_depth}, `projector_depth`={shape[0]}, "
            f"`projector_norm`={shape[1]!r}."
        )
    frozen = official_names(base_tensors(model)).items()
    tensors = {name: t for name, t in frozen if name.startswith("image_encoder.") or name == "logit_scale"}
    tensors |= official_tokens(own, VISION, prefix=PromptKDModel.prefix)
    for official, module in PROJECTOR.items():
        path_in_model = f"visual_projection.{PromptKDModel.prefix}{module}."
        for name, tensor in own.items():
            if name.startswith(path_in_model):
                weight = tensor[..., None, None] if tensor.ndim == 2 else tensor
                tensors[f"{official}.{name.removeprefix(path_in_model)}"] = weight
    settings = {"N_CTX_VISION": config.num_vision_tokens, "PROMPT_DEPTH_VISION": config.vision_depth}
    return OfficialCheckpoint(tensors, settings)


def _is_promptkd(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has the projector of a student."""
    return any(name.startswith("VPT_image_trans.") for name in tensors)


OFFICIAL_FORMATS = (OfficialFormat(KIND, _is_promptkd, convert_checkpoint),)
