"""Nearest classes, and the greedy search for the dimensions that make an image feature one of them."""

from collections.abc import Mapping, Sequence

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn

from peft_vlm.errors import ClassNameError, shown


def greedy_target(
    features: Float[Tensor, "classes dim"],
    negatives: Float[Tensor, "classes dim"],
    own_texts: Float[Tensor, "classes dim"],
    negative_texts: Float[Tensor, "classes dim"],
) -> Float[Tensor, "classes dim"]:
    """Dimensions that turn an image into its negative: 1 where the search exchanges a number, -1 elsewhere.

    One dimension at a time takes the negative image's number: the one by which the normalised feature comes closest to
    the text of the negative class. It ends when that text scores higher than the class's own. Nothing is normalised
    beforehand. Where no exchange gives a positive score, the last dimension is taken, as in the official code.

    Args:
        features: An image of each class.
        negatives: An image of each one's negative class.
        own_texts: Text features of the classes.
        negative_texts: Those of their negative classes.
    """
    edited, dim = features.clone(), features.shape[-1]
    chosen = torch.zeros_like(features, dtype=torch.bool)
    searching = torch.ones(len(features), dtype=torch.bool, device=features.device)
    for _ in range(dim):
        dots = (edited * negative_texts).sum(dim=-1, keepdim=True) + (negatives - edited) * negative_texts
        squares = edited.square().sum(dim=-1, keepdim=True) + negatives.square() - edited.square()
        scores = (dots / squares.clamp(min=1e-12).sqrt()).masked_fill(chosen, -torch.inf)
        score, best = scores.max(dim=-1)
        best = torch.where(score > 0, best, dim - 1)
        rows = searching.nonzero()[:, 0]
        chosen[rows, best[rows]] = True
        edited = torch.where(chosen, negatives, edited)
        margin = (edited * (negative_texts - own_texts)).sum(dim=-1)
        searching &= margin <= 0
        if not bool(searching.any()):
            break
    return torch.where(chosen, 1.0, -1.0)


def nearest_classes(
    texts: Float[Tensor, "classes dim"],
    class_names: Sequence[str],
    seen: Sequence[bool],
    table: Mapping[str, str] | None,
) -> Int[Tensor, " classes"]:
    """The negative class of each class: that of a table, or the other one with the most similar text.

    Args:
        texts: Text features of the classes.
        class_names: Their names.
        seen: Whether there is an image of a class, which can be a negative then.
        table: Negative class of each class by name; None: by the texts.

    Raises:
        ClassNameError: If the table leaves out a class with images, or names an unknown class, or one without images.
        ValueError: If fewer than two classes have images.
    """
    if sum(seen) < 2:
        raise ValueError("Expected images of two classes or more, got those of one: a counterfactual needs another.")
    has_image = torch.tensor(list(seen), device=texts.device)
    unit = nn.functional.normalize(texts, dim=-1)
    similar = (unit @ unit.T).masked_fill(~has_image[None], -torch.inf).fill_diagonal_(-torch.inf)
    nearest = similar.argmax(dim=-1)
    if table is None:
        return nearest
    places = {name: place for place, name in enumerate(class_names)}
    unknown = sorted({*table, *table.values()} - set(places))
    if unknown:
        raise ClassNameError(f"Expected names of the classes in `nearest`, got {shown(unknown[0])}.")
    for name, place in places.items():
        other = table.get(name)
        if other is None and seen[place]:
            raise ClassNameError(f"Expected a negative class for {shown(name)} in `nearest`, got none.")
        if other is not None and (other == name or not seen[places[other]]):
            raise ClassNameError(
                f"Expected another class with training images for {shown(name)} in `nearest`, got {shown(other)}."
            )
        if other is not None:
            nearest[place] = places[other]
    return nearest
