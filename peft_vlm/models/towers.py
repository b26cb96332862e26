"""The two towers of a CLIP-like model, cut at any layer, and where prompts enter them.

This folder alone knows module paths of Hugging Face models; a new family is a subclass of `Towers` and a row in
`FAMILIES`.

`towers_of(model)` returns an object with the same methods for every supported family:

    hidden = towers.embed_image(pixel_values)            embeddings, what enters layer 0
    hidden = towers.run_vision(hidden, start, stop)      layers start .. stop-1
    features = towers.pool_image(hidden)                 final norm, pooled token, projection

so that a method may run the lower layers without autograd, keep their output, and run the upper layers later.
The whole chain gives the same tensors as the model's own forward. `finish_image(hidden, start)` and `finish_text` are
the rest of the chain in one call, without the part of the last layer that nothing reads.
"""

import inspect
from collections.abc import Iterator, Sequence
from contextlib import ExitStack, contextmanager
from typing import Any, Literal

import torch
from accelerate.hooks import AlignDevicesHook, SequentialHook
from jaxtyping import Float, Int
from torch import Tensor, nn
from transformers import CLIPModel, PreTrainedConfig, PreTrainedModel, Siglip2Model, SiglipModel
from transformers.masking_utils import create_causal_mask
from transformers.models.clip.modeling_clip import CLIPEncoderLayer, CLIPVisionEmbeddings

from peft_vlm.errors import UnsupportedModelError
from peft_vlm.models.packed_texts import run_packed

LEAVES_OF_A_LAYER = (
    *(f"self_attn.{name}" for name in ("q_proj", "k_proj", "v_proj", "out_proj")),
    *("layer_norm1", "layer_norm2", "mlp.fc1", "mlp.fc2"),
)

PROJECTIONS = {"query": "q_proj", "key": "k_proj", "value": "v_proj"}
"""Names of the three input projections inside `attention_of(layer)`."""

Side = Literal["text", "vision"]

_VISION_PARTS = {"vision_model", "visual_projection"}
_LOGIT_PARAMETERS = ("logit_scale", "logit_bias")
_OLD_EOS = 2
"""OpenAI's configs say `bos_token_id=0, eos_token_id=2`, which are not the tokens of their tokenizer: those are the
last two of the vocabulary."""


def side_of(name: str) -> Side | None:
    """Return the side of the model that a parameter or module belongs to; None for those that only scale logits.

    Args:
        name: Full name, with or without the prefix of a `PeftModel`. Everything that is not the vision side counts as
            text, so that a method may add text modules anywhere.
    """
    parts = name.split(".")
    if parts[-1] in _LOGIT_PARAMETERS:
        return None
    return "text" if _VISION_PARTS.isdisjoint(parts) else "vision"


def text_length_of(config: PreTrainedConfig) -> int:
    """Return the tokens that a model's text tower takes at most.

    Args:
        config: Configuration of a CLIP-like model.
    """
    text: Any = config.get_text_config()
    return int(text.max_position_embeddings)


def _offload_hook(module: nn.Module) -> AlignDevicesHook | None:
    """Return the hook by which accelerate fills a module's offloaded weights before each forward pass."""
    hook = getattr(module, "_hf_hook", None)
    hooks = hook.hooks if isinstance(hook, SequentialHook) else (hook,)
    return next((one for one in hooks if isinstance(one, AlignDevicesHook) and one.offload), None)


def missing_weights(model: nn.Module) -> list[str]:
    """Return the names of weights on `meta` that no offload hook fills.

    Args:
        model: Model, with or without adapters.
    """
    hooks = {name: hook for name, module in model.named_modules() if (hook := _offload_hook(module))}

    def is_filled(name: str) -> bool:
        owner = name.rpartition(".")[0]
        return owner in hooks or any(
            hook.place_submodules and (not path or f"{owner}.".startswith(f"{path}.")) for path, hook in hooks.items()
        )

    tensors = [*model.named_parameters(remove_duplicate=False), *model.named_buffers(remove_duplicate=False)]
    return [name for name, tensor in tensors if tensor.is_meta and not is_filled(name)]


def is_placed(model: nn.Module) -> bool:
    """Tell whether accelerate has put the parts of a model into several places (`device_map`), so that it stays there.

    Args:
        model: Model, with or without adapters.
    """
    return len(getattr(unwrap(model), "hf_device_map", ())) > 1


def device_of(model: nn.Module) -> torch.device:
    """Return the device that takes a model's input.

    Args:
        model: Model, with or without adapters; weights that accelerate has offloaded are on `meta` between two calls.
    """
    first = next(model.parameters())
    if first.is_meta:
        for module in model.modules():
            if (hook := _offload_hook(module)) is not None:
                return torch.device("cpu" if hook.execution_device is None else hook.execution_device)
    return first.device


@contextmanager
def filled(*modules: nn.Module) -> Iterator[None]:
    """Hold the offloaded weights of modules, without their submodules', on the device that computes with them.

    Args:
        *modules: Modules of a model that accelerate may have offloaded.
    """
    with ExitStack() as stack:
        for module in modules:
            hook = _offload_hook(module)
            if hook is not None:
                hook.pre_forward(module)
                stack.callback(hook.post_forward, module, None)
        yield


class Towers:
    """CLIP's towers; the base of the other families.

    Args:
        model: The Hugging Face model, not wrapped in a `PeftModel`.
    """

    text_tower_path = "text_model"
    layers_paths: dict[str, str] = {"text": "text_model.encoder.layers", "vision": "vision_model.encoder.layers"}
    #: Modules through which tokens and images enter; prompts of the first layer's input wrap them.
    entrance_paths: dict[str, str] = {
        "text": "text_model.embeddings.token_embedding",
        "vision": "vision_model.embeddings",
    }
    #: Norms and projections after the last layer, in order; the last one gives the features.
    text_head_paths: Sequence[str] = ("text_model.final_layer_norm", "text_projection")
    vision_head_paths: Sequence[str] = ("vision_model.post_layernorm", "visual_projection")
    vision_norm_paths: Sequence[str] = ("vision_model.pre_layrnorm", "vision_model.post_layernorm")
    text_is_causal = True
    #: False where the towers have no start and class token, relative to which learned tokens are placed.
    takes_learned_tokens = True

    def __init__(self, model: nn.Module) -> None:
        self.model: Any = model  # its attributes differ by family

    @property
    def text_layers(self) -> nn.ModuleList:
        """Transformer layers of the text tower."""
        return self.model.get_submodule(self.layers_paths["text"])

    @property
    def vision_layers(self) -> nn.ModuleList:
        """Transformer layers of the vision tower."""
        return self.model.get_submodule(self.layers_paths["vision"])

    @property
    def token_embedding(self) -> nn.Module:
        """The text tower's embedding table, or the layer that an adapter has put around it."""
        return self.model.get_submodule(self.entrance_paths["text"])

    @property
    def vision_embeddings(self) -> nn.Module:
        """The vision tower's embeddings, or the layer that an adapter has put around them."""
        return self.model.get_submodule(self.entrance_paths["vision"])

    @property
    def text_tower(self) -> nn.Module:
        """The whole text tower without the projection, or the layer that an adapter has put around it."""
        return self.model.get_submodule(self.text_tower_path)

    @property
    def text_head(self) -> nn.Module:
        """The module that gives the text features, or the layer that an adapter has put around it."""
        return self.model.get_submodule(self.text_head_paths[-1])

    @property
    def vision_head(self) -> nn.Module:
        """The module that gives the image features, or the layer that an adapter has put around it."""
        return self.model.get_submodule(self.vision_head_paths[-1])

    @property
    def text_positions(self) -> Float[Tensor, "tokens width"]:
        """Position embeddings of the text tower."""
        return self.model.text_model.embeddings.position_embedding.weight

    @property
    def start_token_id(self) -> int:
        """The start-of-text token, which no tokenizer puts anywhere but first: the placeholder of learned tokens."""
        text = self.model.config.text_config
        return int(text.vocab_size - 2 if text.eos_token_id == _OLD_EOS else text.bos_token_id)

    @property
    def end_token_id(self) -> int:
        """The end-of-text token."""
        text = self.model.config.text_config
        return int(text.vocab_size - 1 if text.eos_token_id == _OLD_EOS else text.eos_token_id)

    @property
    def pools_highest_id(self) -> bool:
        """Whether the text tower takes the highest id of a text for its end, as transformers does for old configs."""
        return self.text_is_causal and self.model.text_model.eos_token_id == _OLD_EOS

    @property
    def vocab_size(self) -> int:
        """Tokens that the text tower knows."""
        return int(self.model.config.text_config.vocab_size)

    @property
    def text_length(self) -> int:
        """Tokens that the text tower takes at most."""
        return text_length_of(self.model.config)

    @property
    def image_size(self) -> int:
        """Rows and columns of the images that the vision tower takes."""
        return int(self.model.config.vision_config.image_size)

    @property
    def logit_scale(self) -> float:
        """The factor of the cosines, after exp."""
        with filled(self.model):
            return float(self.model.logit_scale.detach().float().exp())

    @property
    def logit_bias(self) -> float:
        """Number that is added to the scaled cosines."""
        return 0.0

    def trained_sides(self) -> set[Side]:
        """Sides with a parameter that requires a gradient."""
        sides: set[Side | None] = {side_of(name) for name, p in self.model.named_parameters() if p.requires_grad}
        return {side for side in sides if side is not None}

    def embed_text(self, input_ids: Int[Tensor, "prompts tokens"]) -> Float[Tensor, "prompts tokens width"]:
        """Hidden states that enter text layer 0: token plus position embeddings."""
        return self.model.text_model.embeddings(input_ids=input_ids)

    def embed_image(
        self, pixel_values: Float[Tensor, "batch channels rows cols"]
    ) -> Float[Tensor, "batch tokens width"]:
        """Hidden states that enter vision layer 0: patches and class token with positions, after CLIP's first norm."""
        vision = self.model.vision_model
        # `pre_layrnorm` is spelled so in every checkpoint.
        return vision.pre_layrnorm(vision.embeddings(pixel_values))

    def run_text(
        self, hidden: Float[Tensor, "prompts tokens width"], start: int = 0, stop: int | None = None
    ) -> Float[Tensor, "prompts tokens width"]:
        """Text layers `start` to `stop - 1`; every text is treated as unpadded (exact under the causal mask)."""
        config = self.model.config.text_config
        no_cache: dict[str, Any] = {CACHE_NAME: None}
        mask = create_causal_mask(config=config, inputs_embeds=hidden, attention_mask=None, **no_cache)
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
        ids = input_ids.to(torch.int)  # `argmax` gives the first of several, for int only
        return ids.argmax(dim=-1) if eos == _OLD_EOS else (ids == eos).int().argmax(dim=-1)

    def pool_text(
        self, hidden: Float[Tensor, "prompts tokens width"], input_ids: Int[Tensor, "prompts tokens"]
    ) -> Float[Tensor, "prompts dim"]:
        """Text features before normalisation: the end-of-text state after the final norm, projected."""
        rows = torch.arange(hidden.shape[0], device=hidden.device)
        pooled = hidden[rows, self.pooled_positions(input_ids).to(hidden.device)]  # (prompts, width)
        return self.model.text_projection(self.model.text_model.final_layer_norm(pooled))

    def pool_image(self, hidden: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch dim"]:
        """Image features before normalisation: the class token after the final norm, projected."""
        return self.model.visual_projection(self.model.vision_model.post_layernorm(hidden[:, 0]))

    def finish_image(self, hidden: Float[Tensor, "batch tokens width"], start: int) -> Float[Tensor, "batch dim"]:
        """Image features from what enters vision layer `start`; the last layer computes the class token only."""
        layers = self.vision_layers
        if start >= len(layers) or not _is_plain(layers[-1]):
            return self.pool_image(self.run_vision(hidden, start))
        hidden = self.run_vision(hidden, start, len(layers) - 1)
        # Nothing reads the patches after the last layer: there they give keys and values, and ask nothing.
        return self.pool_image(_one_query_layer(layers[-1], hidden, hidden[:, :1]))

    def finish_text(
        self, hidden: Float[Tensor, "prompts tokens width"], input_ids: Int[Tensor, "prompts tokens"], start: int
    ) -> Float[Tensor, "prompts dim"]:
        """Text features from what enters text layer `start`, computed once where prompts begin alike.

        Each prompt runs by its own length, and the last layer computes the pooled token only (`packed_texts`). Layers
        that must run as they are get whole, padded prompts.
        """
        layers, positions = list(self.text_layers[start:]), self.pooled_positions(input_ids)
        embedding = self.token_embedding if start == 0 else None  # later layers get states, whatever they come from
        pooled = run_packed(layers, hidden, input_ids, positions, embedding=embedding)  # (prompts, width)
        if pooled is None:
            return self.pool_text(self.run_text(hidden, start), input_ids)
        return self.model.text_projection(self.model.text_model.final_layer_norm(pooled))

    def text_activation_bytes(self, num_tokens: int) -> int:
        """Return what the text layers keep in float32 for the backward pass of a trained context.

        Measured on packed prompts: 18 numbers per token, layer and unit of width.

        Args:
            num_tokens: Tokens of all prompts together.
        """
        width = self.model.config.text_config.hidden_size
        return 4 * 18 * num_tokens * len(self.text_layers) * width

    def similarity_logits(
        self, image_features: Float[Tensor, "*batch images dim"], text_features: Float[Tensor, "*batch classes dim"]
    ) -> Float[Tensor, "*batch images classes"]:
        """Cosine similarities multiplied by the logit scale, in float32. Inputs need not be normalised."""
        with torch.autocast(image_features.device.type, enabled=False), filled(self.model):
            # Float32: half precision rounds cosines times 100 to steps that change the order of classes.
            image = nn.functional.normalize(image_features.float(), dim=-1)
            text = nn.functional.normalize(text_features.float(), dim=-1)
            return self.model.logit_scale.float().exp() * (image @ text.mT)  # the parameter is a logarithm


class _SiglipTowers(Towers):
    """SigLIP and SigLIP 2 (fixed resolution): bidirectional text, last token pooled, attention-pooled image."""

    takes_learned_tokens = False
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

    def finish_image(self, hidden: Float[Tensor, "batch tokens width"], start: int) -> Float[Tensor, "batch dim"]:
        """Image features from what enters vision layer `start`; attention pooling needs every token."""
        return self.pool_image(self.run_vision(hidden, start))

    def finish_text(
        self, hidden: Float[Tensor, "prompts tokens width"], input_ids: Int[Tensor, "prompts tokens"], start: int
    ) -> Float[Tensor, "prompts dim"]:
        """Text features from what enters text layer `start`."""
        return self.pool_text(self.run_text(hidden, start), input_ids)

    def pool_image(self, hidden: Float[Tensor, "batch tokens width"]) -> Float[Tensor, "batch dim"]:
        """Image features before normalisation: attention pooling over the normalised patches."""
        vision = self.model.vision_model
        return vision.head(vision.post_layernorm(hidden))

    @property
    def logit_bias(self) -> float:
        """SigLIP's learned bias."""
        with filled(self.model):
            return float(self.model.logit_bias.detach().float())

    def similarity_logits(
        self, image_features: Float[Tensor, "*batch images dim"], text_features: Float[Tensor, "*batch classes dim"]
    ) -> Float[Tensor, "*batch images classes"]:
        """Scaled cosine similarities plus SigLIP's logit bias, in float32. Inputs need not be normalised."""
        scaled = super().similarity_logits(image_features, text_features)
        with filled(self.model):
            return scaled + self.model.logit_bias.float()


def _is_plain(layer: nn.Module) -> bool:
    """Return whether `_one_query_layer` may replace the layer: nothing wraps it, and nothing watches what it skips.

    The short form calls every module of the layer but two: the layer and its attention. Hooks of those two would not
    run. Hooks further inside run, and see the one token that is computed.

    Gradient checkpointing does not reach a layer that runs this way; for one token there is little left to recompute.
    """
    if not isinstance(layer, CLIPEncoderLayer):
        return False
    return not any(module._forward_hooks or module._forward_pre_hooks for module in (layer, layer.self_attn))


def _one_query_layer(
    layer: Any,
    hidden: Float[Tensor, "batch tokens width"],
    query: Float[Tensor, "batch 1 width"],
) -> Float[Tensor, "batch 1 width"]:
    """A transformer layer for one token per row: what the layer would give there, at a fraction of its cost.

    Args:
        layer: `CLIPEncoderLayer`; its projections may be wrapped by adapters.
        hidden: What enters the layer.
        query: The token of each row whose output is wanted, out of `hidden`.
    """
    attention = layer.self_attn
    shape = (hidden.shape[0], -1, attention.num_heads, attention.head_dim)
    # Every token gives a key and a value, so the first norm and two projections still run over all of them.
    normed = layer.layer_norm1(hidden)
    queries, keys, values = (
        projection(tokens).view(shape).transpose(1, 2)
        for projection, tokens in (
            (attention.q_proj, layer.layer_norm1(query)),
            (attention.k_proj, normed),
            (attention.v_proj, normed),
        )
    )
    dropout = attention.dropout if attention.training else 0.0
    attended = nn.functional.scaled_dot_product_attention(
        queries, keys, values, dropout_p=dropout, scale=attention.scale
    )
    query = query + attention.out_proj(attended.transpose(1, 2).flatten(2))  # (batch, 1, width)
    return query + layer.mlp(layer.layer_norm2(query))


def split_at_prompts(
    hidden: Float[Tensor, "rows tokens width"], count: int, *, side: Side, skipped: int = 0
) -> tuple[Float[Tensor, "rows before width"], Float[Tensor, "rows after width"]]:
    """Split hidden states into the tokens before and after the learned tokens.

    In the text tower these are positions 1 to `count`, after the start token; in the vision tower they are the last
    `count`, after class token and patches.

    Args:
        hidden: All tokens.
        count: Number of learned tokens.
        side: The tower.
        skipped: Tokens of the text tower between the start token and the learned tokens.
    """
    start = 1 + skipped if side == "text" else hidden.shape[1] - count
    return hidden[:, :start], hidden[:, start + count :]


def attention_of(layer: nn.Module) -> Any:
    """Return the attention block of a transformer layer, whose input projections are `PROJECTIONS`."""
    return layer.self_attn


def attention_norm_of(layer: nn.Module) -> Any:
    """Return the norm between a transformer layer's input and its projections."""
    return layer.layer_norm1


def token_like(module: nn.Module) -> Float[Tensor, "*rows width"]:
    """Return a weight of an embedding or layer that has the width, dtype and device of its tokens.

    Args:
        module: Entrance or layer of a tower, without the layer of an adapter around it.
    """
    if isinstance(module, nn.Embedding):
        return module.weight
    if isinstance(module, CLIPVisionEmbeddings):
        return module.position_embedding.weight
    return attention_norm_of(module).weight


FAMILIES: dict[type[PreTrainedModel], type[Towers]] = {CLIPModel: Towers, SiglipModel: _SiglipTowers}


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
    raise _unsupported(type(base))


def check_base_config(config: PreTrainedConfig) -> None:
    """Refuse a base model by its configuration alone, before a network of whatever size it names is built.

    Args:
        config: Configuration, which may come from anybody.

    Raises:
        UnsupportedModelError: If it is of another architecture, or names sizes that no such model has.
    """
    from transformers import MODEL_MAPPING

    if not isinstance(config, tuple(family.config_class for family in FAMILIES)):
        kind = MODEL_MAPPING.get(type(config), None)  # type: ignore[attr-defined] - a lazy mapping
        raise _unsupported(kind if isinstance(kind, type) else type(config))
    for tower in (config.text_config, config.vision_config):
        for name, value in tower.to_dict().items():
            limit = LIMITS.get(name, MOST)
            if isinstance(value, int) and value > limit:
                raise UnsupportedModelError(
                    f"Expected `{name}` of at most {limit:,} in the configuration of the base model, got {value}. Get "
                    "the base model again."
                )


#: Largest numbers in the configuration of a tower; the largest models here stay far below.
LIMITS = {"num_hidden_layers": 1000, "num_attention_heads": 10_000, "image_size": 8192, "patch_size": 8192}
MOST = 10_000_000


def _unsupported(kind: type) -> UnsupportedModelError:
    hint = " Open an issue if you need this architecture."
    if issubclass(kind, Siglip2Model):
        hint = " Its NaFlex inputs carry a size per image; load the fixed-resolution checkpoint as `SiglipModel`."
    elif issubclass(kind, PreTrainedModel) and kind.can_generate():
        hint = " Of the methods here, TVP and Skip Tuning work on models that write text."
    return UnsupportedModelError(
        f"Expected one of {sorted(f.__name__ for f in FAMILIES)}, got `{kind.__name__}`.{hint}"
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


CACHE_NAME = "cache" if "cache" in inspect.signature(create_causal_mask).parameters else "past_key_values"
"""Name of the argument that passes the cache to a model or a mask, and of the output that holds it: `cache` from
transformers 5.24 on, `past_key_values` before, for all architectures at once."""
