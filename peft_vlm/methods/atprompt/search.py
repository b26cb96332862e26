"""ATPrompt's attribute search: which of some words, alone or together, serve a data set.

Advancing Textual Prompt Learning with Anchored Attributes, 2025, arXiv 2412.09442, Eq. (7) to (10).
"""

import math
from collections.abc import Sequence
from itertools import combinations

import torch
from jaxtyping import Float, Int
from peft import get_peft_model
from torch import Tensor, nn

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.feature_store import all_image_features
from peft_vlm.models.towers import device_of, towers_of
from peft_vlm.registry import ADAPTERS
from peft_vlm.text.prompts import ClassPrompts, reserve_slots


class AttributeSearch:
    """A CoOp adapter for each combination of words, whose logits are mixed by trained weights.

    Formula: logits = sum_k softmax(weights)_k * exp(scale) * cos(f(x), g_k(name_c)), k: combination of words

    Args:
        clip: Base model; it gets the adapters.
        prompts: Plain class prompts with one template.
        words: Combinations of attribute words.
        attribute_ids: Their token ids; None: by the base model's tokenizer.
        num_tokens: Vectors of the context, and before each word.
        learning_rate: Rate of the vectors: SGD, momentum 0.9.
        weight_decay: Decay of the vectors.
        weight_rate: Rate of the weights: Adam, betas 0.5 and 0.999.
    """

    def __init__(
        self,
        clip: nn.Module,
        prompts: ClassPrompts,
        words: Sequence[Sequence[str]],
        *,
        attribute_ids: Sequence[list[list[int]]] | None = None,
        num_tokens: int = 2,
        learning_rate: float = 0.002,
        weight_decay: float = 5e-4,
        weight_rate: float = 0.02,
    ) -> None:
        self.input_ids: list[Int[Tensor, "classes tokens"]] = []
        for number, combination in enumerate(words):
            ids = None if attribute_ids is None else attribute_ids[number]
            settings = {"attributes": list(combination), "attribute_ids": ids, "num_text_tokens": num_tokens}
            config, name = ADAPTERS["coop"].config(context_init=None, **settings), f"words{number}"
            if number:
                self.model.add_adapter(name, config)
            else:
                self.model = get_peft_model(clip, config, adapter_name=name)
            self.model.set_adapter(name)
            self.input_ids.append(reserve_slots(self.model, prompts).input_ids.to(device_of(clip)))
        self.contexts: list[nn.Parameter] = list(towers_of(self.model).token_embedding.prompts.values())
        self.weights = nn.Parameter(torch.zeros(len(words), device=device_of(clip)))
        self.optimizer = torch.optim.SGD(self.contexts, lr=learning_rate, momentum=0.9, weight_decay=weight_decay)
        self.weight_optimizer = torch.optim.Adam([self.weights], lr=weight_rate, betas=(0.5, 0.999))

    def logits(self, image_features: Float[Tensor, "batch dim"]) -> Float[Tensor, "batch classes"]:
        """Return the mixed logits.

        Args:
            image_features: Features of the images, not normalised.
        """
        towers, rows = towers_of(self.model), []
        for number, ids in enumerate(self.input_ids):
            self.model.set_adapter(f"words{number}")
            rows.append(towers.similarity_logits(image_features, towers.finish_text(towers.embed_text(ids), ids, 0)))
        for context in self.contexts:  # those of the other adapters were frozen for their passes
            context.requires_grad_(True)
        # (combinations, 1, 1) and (combinations, batch, classes)
        return (self.weights.softmax(dim=0)[:, None, None] * torch.stack(rows)).sum(dim=0)

    def step(self, train: tuple[Tensor, Tensor], validation: tuple[Tensor, Tensor]) -> tuple[float, float]:
        """One step of the vectors on training images, then one of the weights on validation images.

        Args:
            train: Image features and labels.
            validation: The same of other images.

        Returns:
            Both losses.
        """
        losses = []
        for (features, labels), optimizer in ((train, self.optimizer), (validation, self.weight_optimizer)):
            loss = nn.functional.cross_entropy(self.logits(features), labels)
            for parameter in (*self.contexts, self.weights):  # each loss moves the tensors of one optimizer only
                parameter.grad = None
            loss.backward()
            optimizer.step()
            losses.append(loss.item())
        return losses[0], losses[1]


def search_attributes(
    clip: nn.Module,
    prompts: ClassPrompts,
    attributes: Sequence[str],
    train: ImageClassificationDataset,
    validation: ImageClassificationDataset,
    *,
    epochs: int = 40,
    batch_size: int = 32,
    learning_rate: float = 0.002,
    seed: int = 1,
    **settings: Sequence[list[list[int]]] | float | None,
) -> dict[tuple[str, ...], float]:
    """Weights of all combinations of some words, the largest first; the first is what to train with.

    Deviation: Image features are computed once, without random crops, and combinations of one and two words are among
        the candidates, as in the paper; the code at commit 86980a1 has those of three and more.

    Args:
        clip: Base model; it keeps the adapters of the search, so pass one of its own.
        prompts: Plain class prompts with one template.
        attributes: Candidate words, five in the paper: 31 combinations, and as many text passes per step, twice.
        train: Images that train the vectors, with the transform of evaluation.
        validation: Other images of the same classes, which train the weights.
        epochs: Passes over the training images; the first at the rate 1e-5, then a cosine.
        batch_size: Images per step.
        learning_rate: Rate of the vectors.
        seed: Seed of the vectors and of the order.
        **settings: Further settings of `AttributeSearch`.
    """
    words = [some for size in range(1, len(attributes) + 1) for some in combinations(attributes, size)]
    torch.manual_seed(seed)
    search = AttributeSearch(clip, prompts, words, learning_rate=learning_rate, **settings)  # type: ignore[arg-type]
    parts = []
    for images in (train, validation):
        features = all_image_features(clip.eval(), images).to(device_of(clip))
        parts.append((features, torch.tensor(images.labels, device=features.device)))
    for epoch in range(epochs):
        rate = 0.5 * learning_rate * (1 + math.cos(math.pi * (epoch - 1) / epochs)) if epoch else 1e-5
        for group in search.optimizer.param_groups:
            group["lr"] = rate
        order = [torch.randperm(len(labels)).split(batch_size) for _, labels in parts]
        for step, rows in enumerate(order[0]):
            chosen = (rows, order[1][step % len(order[1])])
            batches = [(f[r], labels[r]) for (f, labels), r in zip(parts, chosen, strict=True)]
            search.step(batches[0], batches[1])
    found = search.weights.detach().softmax(dim=0).tolist()
    return dict(sorted(zip(words, found, strict=True), key=lambda pair: -pair[1]))
