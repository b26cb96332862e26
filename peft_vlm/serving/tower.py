"""The image tower of a CLIP or SigLIP, with the tensors of an adapter, in plain torch."""

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.functional import gelu, pad, scaled_dot_product_attention

ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "gelu": gelu,
    "gelu_pytorch_tanh": lambda x: gelu(x, approximate="tanh"),
}

#: Layers of a head (projection, or PromptKD's projector).
HEAD_LAYERS: dict[str, type[nn.Module]] = {
    layer.__name__: layer for layer in (nn.Linear, nn.LayerNorm, nn.BatchNorm1d, nn.ReLU)
}


class _Attention(nn.Module):
    """Multi-head attention.

    Args:
        width: Width of the tokens.
        heads: Number of heads.
        slots: Number of tokens at the end with fixed queries, keys or values, by the name of the projection.
    """

    def __init__(self, width: int, heads: int, slots: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.heads = heads
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = (nn.Linear(width, width) for _ in range(4))
        self.slots = nn.ParameterDict({k: nn.Parameter(torch.empty(n, width)) for k, n in (slots or {}).items()})

    def forward(self, queries: Tensor, tokens: Tensor) -> Tensor:
        """Outputs (batch, queries, width).

        Args:
            queries: (batch, queries, width).
            tokens: Keys and values, (batch, tokens, width).
        """
        parts = (("q_proj", queries), ("k_proj", tokens), ("v_proj", tokens))
        # each (batch, heads, tokens, width / heads)
        q, k, v = (self._project(*part).unflatten(-1, (self.heads, -1)).transpose(1, 2) for part in parts)
        return self.out_proj(scaled_dot_product_attention(q, k, v).transpose(1, 2).flatten(2))

    def _project(self, name: str, tokens: Tensor) -> Tensor:
        projected = self.get_submodule(name)(tokens)
        if name not in self.slots or tokens.shape[1] == 1:  # one query: the class token, which is no slot
            return projected
        fixed = self.slots[name]
        return torch.cat([projected[:, : -len(fixed)], fixed.expand(tokens.shape[0], -1, -1)], dim=1)


class _MLP(nn.Module):
    """Two linear layers.

    Args:
        width: Width of the tokens.
        hidden: Width between the layers.
        activation: Key of `ACTIVATIONS`.
    """

    def __init__(self, width: int, hidden: int, activation: str) -> None:
        super().__init__()
        self.fc1, self.fc2, self.activation = nn.Linear(width, hidden), nn.Linear(hidden, width), activation

    def forward(self, tokens: Tensor) -> Tensor:
        """Outputs of the shape of the input.

        Args:
            tokens: (batch, tokens, width).
        """
        return self.fc2(ACTIVATIONS[self.activation](self.fc1(tokens)))


class _Layer(nn.Module):
    """A transformer layer.

    Args:
        shape: `width`, `heads`, `mlp`, `activation` and `eps` of the tower.
        slots: See `_Attention`.
    """

    def __init__(self, shape: dict[str, Any], slots: Mapping[str, int] | None = None) -> None:
        super().__init__()
        self.attention = _Attention(shape["width"], shape["heads"], slots)
        self.norm1, self.norm2 = (nn.LayerNorm(shape["width"], eps=shape["eps"]) for _ in range(2))
        self.mlp = _MLP(shape["width"], shape["mlp"], shape["activation"])

    def forward(self, hidden: Tensor, *, first_only: bool = False) -> Tensor:
        """Hidden states after the layer.

        Args:
            hidden: (batch, tokens, width).
            first_only: Compute the first token only.
        """
        normed = self.norm1(hidden)
        kept, queries = (hidden[:, :1], normed[:, :1]) if first_only else (hidden, normed)
        kept = kept + self.attention(queries, normed)
        return kept + self.mlp(self.norm2(kept))


class _AttentionPool(nn.Module):
    """SigLIP's pooling: a learned query attends to all patches.

    Args:
        shape: As for `_Layer`.
    """

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        self.probe = nn.Parameter(torch.empty(1, 1, shape["width"]))
        self.attention = _Attention(shape["width"], shape["heads"])
        self.norm = nn.LayerNorm(shape["width"], eps=shape["eps"])
        self.mlp = _MLP(shape["width"], shape["mlp"], shape["activation"])

    def forward(self, hidden: Tensor) -> Tensor:
        """Features (batch, width).

        Args:
            hidden: (batch, tokens, width).
        """
        pooled = self.attention(self.probe.expand(hidden.shape[0], -1, -1), hidden)
        return (pooled + self.mlp(self.norm(pooled)))[:, 0]


class PixelPrompt(nn.Module):
    """A pixel prompt on every image. The shrinking into its window is a product with one matrix per side.

    Args:
        image_size: Rows and columns.
        window: Top, left, rows and columns of the window that the image is shrunk into; None: not shrunk.
        clamp: Cut the result to [0, 1] before it is normalised.
    """

    def __init__(self, image_size: Sequence[int], window: Sequence[int] | None, clamp: bool) -> None:
        super().__init__()
        self.size, self.window, self.clamp = tuple(image_size), window, clamp
        self.picture = nn.Buffer(torch.empty(3, *self.size))
        self.mean, self.std = nn.Buffer(torch.empty(3, 1, 1)), nn.Buffer(torch.empty(3, 1, 1))
        if window is not None:
            self.shrink_rows = nn.Buffer(torch.empty(window[2], self.size[0]))
            self.shrink_cols = nn.Buffer(torch.empty(self.size[1], window[3]))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Normalised images with the prompt.

        Args:
            pixel_values: (batch, 3, rows, cols), normalised.
        """
        images = pixel_values * self.std + self.mean  # in [0, 1]
        if self.window is not None:
            top, left, rows, cols = self.window
            images = (self.shrink_rows @ images @ self.shrink_cols).clamp(0, 1)
            images = pad(images, (left, self.size[1] - left - cols, top, self.size[0] - top - rows))
        images = images + self.picture
        images = images.clamp(0, 1) if self.clamp else images
        return ((images - self.mean) / self.std).to(pixel_values.dtype)


class ImageTower(nn.Module):
    """Pixels to image features, not normalised.

    Args:
        shape: Sizes, as `peft_vlm.export` writes them into the card.
    """

    def __init__(self, shape: dict[str, Any]) -> None:
        super().__init__()
        width, patch = shape["width"], tuple(shape["patch_size"])
        self.pixel_prompt = PixelPrompt(**shape["pixel_prompt"]) if shape["pixel_prompt"] else nn.Identity()
        self.patches = nn.Conv2d(3, width, patch, stride=patch, bias=shape["patch_bias"])
        self.class_token = nn.Parameter(torch.empty(width)) if shape["class_token"] else None
        self.positions = nn.Parameter(torch.empty(shape["positions"], width))
        # Always last: "input" comes after the patches, a number replaces them at the input of that layer.
        self.tokens = nn.ParameterDict({i: nn.Parameter(torch.empty(n, width)) for i, n in shape["tokens"].items()})
        self.pre_norm = nn.LayerNorm(width, eps=shape["eps"]) if shape["pre_norm"] else nn.Identity()
        self.layers = nn.ModuleList(_Layer(shape, shape["slots"].get(str(i))) for i in range(shape["layers"]))
        self.post_norm = nn.LayerNorm(width, eps=shape["eps"])
        self.pool = _AttentionPool(shape) if shape["attention_pool"] else None
        self.head = nn.Sequential(*(HEAD_LAYERS[name](*sizes) for name, *sizes in shape["head"]))

    def forward(self, pixel_values: Tensor) -> Tensor:
        """Features (batch, dim).

        Args:
            pixel_values: (batch, 3, rows, cols), normalised.
        """
        hidden = self.patches(self.pixel_prompt(pixel_values)).flatten(2).transpose(1, 2)  # (batch, patches, width)
        batch = hidden.shape[0]
        if self.class_token is not None:
            hidden = torch.cat([self.class_token.expand(batch, 1, -1), hidden], dim=1)
        hidden = hidden + self.positions
        if "input" in self.tokens:
            hidden = torch.cat([hidden, self.tokens["input"].expand(batch, -1, -1)], dim=1)
        hidden = self.pre_norm(hidden)
        for index, layer in enumerate(self.layers):
            if str(index) in self.tokens:
                prompt = self.tokens[str(index)]
                hidden = torch.cat([hidden[:, : -len(prompt)], prompt.expand(batch, -1, -1)], dim=1)
            # behind the last layer nobody reads anything but the class token
            hidden = layer(hidden, first_only=self.pool is None and index == len(self.layers) - 1)
        if self.pool is not None:
            return self.head(self.pool(self.post_norm(hidden)))
        return self.head(self.post_norm(hidden[:, 0]))
