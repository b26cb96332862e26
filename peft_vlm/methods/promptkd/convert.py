"""Official PromptKD checkpoints to adapter folders. A teacher's is a PromptSRC file."""

from collections.abc import Mapping, Sequence
from pathlib import Path

from jaxtyping import Float
from peft import get_peft_model, get_peft_model_state_dict
from torch import Tensor

from peft_vlm.conversion.base_model import ADAPTER_PREFIX, load_base, official_weights, write_adapter
from peft_vlm.conversion.formats import OfficialFormat, register_format
from peft_vlm.conversion.learned_tokens import VISION, take_learned_tokens
from peft_vlm.conversion.official_file import ConversionReport, OfficialFile
from peft_vlm.methods.promptkd.config import PromptKDConfig
from peft_vlm.methods.promptkd.model import PromptKDModel

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
    )
    model = get_peft_model(base, config)
    model.set_class_vectors(
        class_names, class_vectors, teacher_name=teacher_name, teacher_logit_scale=teacher_logit_scale
    )
    own = get_peft_model_state_dict(model)
    vectors = {k.removeprefix(ADAPTER_PREFIX): v for k, v in own.items() if k.endswith("class_vectors")}
    return write_adapter(model, tensors | vectors, folder, file=file, kind=KIND)


def is_promptkd(tensors: Mapping[str, Tensor]) -> bool:
    """Whether a file has the projector of a student.

    Args:
        tensors: Tensors of the file.
    """
    return any(name.startswith("VPT_image_trans.") for name in tensors)


register_format(OfficialFormat(KIND, is_promptkd, convert_checkpoint, "promptkd"))
