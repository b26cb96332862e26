"""The two bundled architectures as plain `CLIPModel`s, their initialisation, and growing one into a deeper one."""

import copy

import torch
from torch import nn
from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPTokenizer

from captions import CONTEXT_LENGTH
from pixels import IMAGE_SIZE

PATCH_SIZE = 8
# Of images over white after recolouring; close to the mean and spread of the pretraining batches.
IMAGE_MEAN = (0.6, 0.6, 0.6)
IMAGE_STD = (0.35, 0.35, 0.35)

# name: ((vision width, layers, heads), (text width, layers, heads), embedding)
ARCHITECTURES = {
    "student": ((192, 6, 6), (160, 4, 5), 160),
    "teacher": ((192, 9, 6), (160, 5, 5), 160),
    "tiny": ((96, 2, 2), (96, 2, 2), 96),
}


def build_config(architecture: str, tokenizer: CLIPTokenizer) -> CLIPConfig:
    """Configuration of one of the `ARCHITECTURES`; the special tokens come from the tokenizer."""
    (v_width, v_layers, v_heads), (t_width, t_layers, t_heads), dim = ARCHITECTURES[architecture]
    return CLIPConfig(
        vision_config={
            "hidden_size": v_width,
            "intermediate_size": 4 * v_width,
            "num_hidden_layers": v_layers,
            "num_attention_heads": v_heads,
            "image_size": IMAGE_SIZE,
            "patch_size": PATCH_SIZE,
            "projection_dim": dim,
        },
        text_config={
            "hidden_size": t_width,
            "intermediate_size": 4 * t_width,
            "num_hidden_layers": t_layers,
            "num_attention_heads": t_heads,
            "vocab_size": len(tokenizer),
            "max_position_embeddings": CONTEXT_LENGTH,
            "bos_token_id": tokenizer.bos_token_id,
            "eos_token_id": tokenizer.eos_token_id,
            "pad_token_id": tokenizer.pad_token_id,
            "projection_dim": dim,
        },
        projection_dim=dim,
    )


def build_model(architecture: str, tokenizer: CLIPTokenizer) -> CLIPModel:
    """Randomly initialised model, with eager attention: its backward is several times faster on a CPU at 37 tokens."""
    model = CLIPModel._from_config(build_config(architecture, tokenizer), attn_implementation="eager")
    # The default initialisation (0.02) is made for far wider towers.
    nn.init.normal_(model.text_model.embeddings.token_embedding.weight, std=0.15)
    nn.init.normal_(model.text_model.embeddings.position_embedding.weight, std=0.05)
    nn.init.normal_(model.vision_model.embeddings.position_embedding.weight, std=0.05)
    nn.init.normal_(model.vision_model.embeddings.class_embedding, std=0.15)
    return model


def _grow_tower(target: nn.Module, source: nn.Module) -> None:
    """Copy a tower and spread its layers evenly over a deeper one; each inserted layer starts as the identity.

    An inserted layer is a copy of the layer before it whose two output projections are zero, so that the grown tower
    computes the same function while its inner weights are already useful.
    """
    old, new = source.encoder.layers, target.encoder.layers
    parents = [index * len(old) // len(new) for index in range(len(new))]
    weights = source.state_dict()
    weights = {key: value for key, value in weights.items() if not key.startswith("encoder.layers.")}
    for index, parent in enumerate(parents):
        state = copy.deepcopy(old[parent].state_dict())
        if index and parents[index - 1] == parent:
            for name in ("self_attn.out_proj", "mlp.fc2"):
                state[f"{name}.weight"].zero_()
                state[f"{name}.bias"].zero_()
        weights |= {f"encoder.layers.{index}.{name}": value for name, value in state.items()}
    target.load_state_dict(weights)


@torch.no_grad()
def grow(source: CLIPModel, architecture: str, tokenizer: CLIPTokenizer) -> CLIPModel:
    """A deeper model of equal widths that computes exactly what `source` computes."""
    target = build_model(architecture, tokenizer)
    _grow_tower(target.vision_model, source.vision_model)
    _grow_tower(target.text_model, source.text_model)
    target.visual_projection.load_state_dict(source.visual_projection.state_dict())
    target.text_projection.load_state_dict(source.text_projection.state_dict())
    target.logit_scale.copy_(source.logit_scale)
    return target


def image_processor() -> CLIPImageProcessor:
    """Preprocessing of both models: 48 px, bicubic, RGB, fixed mean and standard deviation."""
    return CLIPImageProcessor(
        size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        crop_size={"height": IMAGE_SIZE, "width": IMAGE_SIZE},
        resample=3,
        do_convert_rgb=True,
        image_mean=list(IMAGE_MEAN),
        image_std=list(IMAGE_STD),
    )
