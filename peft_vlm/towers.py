"""The two towers of a CLIP-like model, cut at any layer. The only file that knows Hugging Face module paths.

`towers_of(model)` returns an object with the same methods for every supported family:

    hidden = towers.embed_image(pixel_values)            embeddings, what enters layer 0
    hidden = towers.run_vision(hidden, start, stop)      layers start .. stop-1
    features = towers.pool_image(hidden)                 final norm, pooled token, projection

so that a method may run the lower layers without autograd, keep their output, and run the upper layers later.
The whole chain gives the same tensors as the model's own forward.
"""

from collections.abc import Sequence
from typing import Any

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedModel, Siglip2Model, SiglipModel
from transformers.masking_utils import create_causal_mask

from peft_vlm.errors import UnsupportedModelError

LEAVES_OF_A_LAYER = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
)


class Towers:
    """CLIP's towers; the base of the other families.

    Args:
        model: The Hugging Face model, not wrapped in a `PeftModel`.
    """

    text_layers_path = "text_model.encoder.layers"
    vision_layers_path = "vision_model.encoder.layers"
    text_head_paths: Sequence[str] = ("text_model.final_layer_norm", "text_projection")
    vision_head_paths: Sequence[str] = ("vision_model.post_layernorm", "visual_projection")
    text_is_causal = True

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # its attributes differ by family

    @property
    def text_layers(self) -> nn.ModuleList:
        """Transformer layers of the text tower."""
        return self.model.get_submodule(self.text_layers_path)

    @property
    def vision_layers(self) -> nn.ModuleList:
        """Transformer layers of the vision tower."""
        return self.model.get_submodule(self.vision_layers_path)

    def embed_text(self, input_ids: Int[Tensor, "prompts tokens"]) -> Float[Tensor, "prompts tokens width"]:
        """What enters text layer 0: token plus position embeddings."""
        return self.model.text_model.embeddings(input_ids=input_ids)

    def embed_image(
        self, pixel_values: Float[Tensor, "batch channels rows cols"]
    ) -> Float[Tensor, "batch tokens width"]:
        """What enters vision layer 0: patch and class embeddings with positions, after CLIP's first norm."""
        vision = self.model.vision_model
        return vision.pre_layrnorm(vision.embeddings(pixel_values))

    def run_text(
        self, hidden: Float[Tensor, "prompts tokens width"], start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "prompts tokens width"]:
        """Text layers `start` to `stop - 1`; every text is treated as unpadded (exact under the causal mask)."""
        config = self.model.config.text_config
        mask = create_causal_mask(config=config, inputs_embeds=hidden, attention_mask=None, past_key_values=None)
        for layer in self.text_layers[start:stop]:
            hidden = layer(hidden, attention_mask=mask, is_causal=True)
        return hidden

    def run_vision(
        self, hidden: Float[Tensor, "batch tokens width"], start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "batch tokens width"]:
        """Vision layers `start` to `stop - 1`."""
        for layer in self.vision_layers[start:stop]:
            hidden = layer(hidden, attention_mask=None)
        return hidden

    def pooled_positions(self, input_ids: Int[Tensor, "prompts tokens"]) -> Int[Tensor, " prompts"]:
        """Position that the text tower pools: the first end-of-text token (highest id for old configs, as in HF)."""
        eos = self.model.text_model.eos_token_id
        ids = input_ids.to(torch.int)
        return ids.argmax(dim=-1) if eos == 2 else (ids == eos).int().argmax(dim=-1)

    def pool_text(
        self, hidden: Float[Tensor, "prompts tokens width"], input_ids: Int[Tensor, "prompts tokens"]
    ) -> Float[Tensor, "prompts dim"]:
        """Text features before normalisation: the end-of-text state after the final norm, projected."""
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        pooled = hidden[rows, self.pooled_positions(input_ids).to(hidden.device)]
        return self.model.text_projection(self.model.text_model.final_layer_norm(pooled))

    def pool_image(self, hidden: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch dim"]:
        """Image features before normalisation: the class token after the final norm, projected."""
        return self.model.visual_projection(self.model.vision_model.post_layernorm(hidden[:, 0]))

    def similarity_logits(
        self, image_features: Float[Tensor, "batch dim"], text_features: Float[Tensor, "classes dim"]
    ) -> Float[Tensor, "batch classes"]:
        """Cosine similarities multiplied by the logit scale, in float32. Inputs need not be normalised."""
        image = nn.functional.normalize(image_features.float(), dim=-1)
        text = nn.functional.normalize(text_features.float(), dim=-1)
        return self.model.logit_scale.float().exp() * (image @ text.T)


class SiglipTowers(Towers):
    """SigLIP and SigLIP 2 (fixed resolution): bidirectional text, last token pooled, attention-pooled image."""

    text_head_paths = ("text_model.final_layer_norm", "text_model.head")
    # The pooling attention and its probe belong to the frozen part: nn.MultiheadAttention has no leaf layers to copy.
    vision_head_paths = (
        "vision_model.post_layernorm",
        "vision_model.head.layernorm",
        "vision_model.head.mlp.fc1",
        "vision_model.head.mlp.fc2",
    )
    text_is_causal = False

    def embed_image(
        self, pixel_values: Float[Tensor, "batch channels rows cols"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Patch embeddings with positions."""
        return self.model.vision_model.embeddings(pixel_values)

    def run_text(
        self, hidden: Float[Tensor, "prompts tokens width"], start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "prompts tokens width"]:
        """Text layers `start` to `stop - 1`, without a mask: SigLIP attends to its padding, by its training."""
        for layer in self.text_layers[start:stop]:
            hidden = layer(hidden, attention_mask=None)
        return hidden

    def pool_text(
        self, hidden: Float[Tensor, "prompts tokens width"], input_ids: Int[Tensor, "prompts tokens"]
    ) -> Float[Tensor, "prompts dim"]:
        """Text features before normalisation: the last position after the final norm, through the head."""
        text = self.model.text_model
        return text.head(text.final_layer_norm(hidden[:, -1]))

    def pool_image(self, hidden: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch dim"]:
        """Image features before normalisation: attention pooling over the normalised patches."""
        vision = self.model.vision_model
        return vision.head(vision.post_layernorm(hidden))

    def similarity_logits(
        self, image_features: Float[Tensor, "batch dim"], text_features: Float[Tensor, "classes dim"]
    ) -> Float[Tensor, "batch classes"]:
        """Scaled cosine similarities plus SigLIP's logit bias, in float32. Inputs need not be normalised."""
        return super().similarity_logits(image_features, text_features) + self.model.logit_bias.float()


FAMILIES: dict[type[PreTrainedModel], type[Towers]] = {CLIPModel: Towers, SiglipModel: SiglipTowers}


def unwrap(model: nn.Module) -> nn.Module:
    """The Hugging Face model inside a `PeftModel`, whose layers keep the injected adapters; others as they are."""
    from peft import PeftModel

    return model.get_base_model() if isinstance(model, PeftModel) else model


def towers_of(model: nn.Module) -> Towers:
    """The towers of a CLIP-like model, with or without a `PeftModel` around it.

    Args:
        model: `CLIPModel`, `SiglipModel` (also loads fixed-resolution SigLIP 2), or a `PeftModel` around one.

    Raises:
        UnsupportedModelError: For every other architecture.
    """
    base = unwrap(model)
    for family, towers in FAMILIES.items():
        if isinstance(base, family):
            return towers(base)
    hint = " Its NaFlex inputs carry a size per image; load the fixed-resolution checkpoint as `SiglipModel`."
    raise UnsupportedModelError(
        f"Expected one of {sorted(f.__name__ for f in FAMILIES)}, got `{type(base).__name__}`."
        + (hint if isinstance(base, Siglip2Model) else " Open an issue if you need this architecture.")
    )


def text_features(model: nn.Module, input_ids: Int[Tensor, "prompts tokens"]) -> Float[Tensor, "prompts dim"]:
    """Projected text features, not normalised, by the model's own forward (adapters included)."""
    return unwrap(model).get_text_features(input_ids=input_ids).pooler_output


def image_features(
    model: nn.Module, pixel_values: Float[Tensor, "batch channels rows cols"]
) -> Float[Tensor, "batch dim"]:
    """Projected image features, not normalised, by the model's own forward (adapters included)."""
    return unwrap(model).get_image_features(pixel_values=pixel_values).pooler_output


def similarity_logits(
    model: nn.Module, image_features: Float[Tensor, "batch dim"], text_features: Float[Tensor, "classes dim"]
) -> Float[Tensor, "batch classes"]:
    """Logits of the model's family from image and class features (either may already be unit-norm), in float32."""
    return towers_of(model).similarity_logits(image_features, text_features)
