"""Forward passes for pretraining: vision tower on a random subset of patches, text tower, contrastive loss."""

from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor
from torch.nn import functional as F
from transformers import CLIPModel


def encode_images(model: CLIPModel, pixel_values: Tensor, kept: Tensor | None = None) -> Tensor:
    """Unit-norm image features; with `kept` (batch, patches kept) only those patches enter the encoder.

    Dropping patches is FLIP's trick (Li et al. 2023, arXiv 2212.00794): a cheaper step at nearly the same gradient.
    """
    tower = model.vision_model
    hidden = tower.embeddings(pixel_values)
    if kept is not None:
        index = torch.cat([torch.zeros_like(kept[:, :1]), kept + 1], dim=1)
        hidden = hidden.gather(1, index[:, :, None].expand(-1, -1, hidden.shape[-1]))
    hidden = tower.encoder(inputs_embeds=tower.pre_layrnorm(hidden)).last_hidden_state
    features = model.visual_projection(tower.post_layernorm(hidden[:, 0]))
    return F.normalize(features.float(), dim=-1)


def encode_texts(model: CLIPModel, token_ids: Tensor) -> Tensor:
    """Unit-norm text features of token ids (captions, tokens)."""
    pooled = model.text_model(input_ids=token_ids).pooler_output
    return F.normalize(model.text_projection(pooled).float(), dim=-1)


def random_patches(count: int, patches: int, kept: int, generator: torch.Generator) -> Tensor:
    """For each of `count` images the sorted indices of `kept` of its patches."""
    return torch.rand(count, patches, generator=generator).topk(kept, dim=1).indices.sort(dim=1).values


def contrastive_loss(
    image_features: Tensor, text_features: Tensor, targets: Tensor, scale: Tensor
) -> tuple[Tensor, Tensor]:
    """Symmetric contrastive loss with one row per distinct caption, and the logits (images, captions).

    Images of the same caption are all positives of it: image to text is an ordinary cross-entropy, text to image has
    equal targets on all its images. Mean over images and captions, respectively; computed in float32.
    """
    logits = scale * image_features @ text_features.T
    image_to_text = F.cross_entropy(logits, targets)
    positives = F.one_hot(targets, len(text_features)).float()
    positives = positives / positives.sum(dim=0, keepdim=True)
    text_to_image = -(positives * logits.log_softmax(dim=0)).sum(dim=0).mean()
    return (image_to_text + text_to_image) / 2, logits


class ParallelTowers:
    """Both towers over a batch cut into one part per worker thread; loss and gradients are those of the whole batch.

    On a shared CPU this is much faster than giving each operation several threads: there every operation waits for
    the slowest thread, here the workers meet twice per step. The features of all parts are gathered, the loss is
    computed once, and each worker sends the gradient of its own features back through its own graph. Gradients of
    several workers are added as they arrive: runs are equal to rounding, and bit for bit only with one worker.

    Args:
        model: Model in training mode, without dropout.
        workers: Number of threads (1: no cutting, all threads inside the operations).
    """

    def __init__(self, model: CLIPModel, *, workers: int) -> None:
        self.model, self.workers = model, workers
        if workers > 1:
            torch.set_num_threads(1)
        self.pool = ThreadPoolExecutor(workers, initializer=torch.set_flush_denormal, initargs=(True,))

    def _encode(self, part: tuple[Tensor, Tensor | None, Tensor]) -> tuple[Tensor, Tensor]:
        pixels, kept, token_ids = part
        return encode_images(self.model, pixels, kept), encode_texts(self.model, token_ids)

    def backward(
        self, pixels: Tensor, kept: Tensor | None, token_ids: Tensor, targets: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Loss and logits of a batch; adds the gradients of the loss to the model's `.grad` fields."""
        kept_parts = [None] * self.workers if kept is None else kept.tensor_split(self.workers)
        cut = zip(pixels.tensor_split(self.workers), kept_parts, token_ids.tensor_split(self.workers), strict=True)
        parts = list(self.pool.map(self._encode, cut))
        leaves = [tuple(features.detach().requires_grad_(True) for features in part) for part in parts]
        images, texts = (torch.cat(features) for features in zip(*leaves, strict=True))
        loss, logits = contrastive_loss(images, texts, targets, self.model.logit_scale.float().exp())
        loss.backward()

        def send_back(index: int) -> None:
            torch.autograd.backward(parts[index], [leaf.grad for leaf in leaves[index]])

        list(self.pool.map(send_back, range(self.workers)))
        return loss.detach(), logits.detach()
