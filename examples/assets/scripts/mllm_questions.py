"""Question-answer pairs about the pretraining images, and the images that fit them: recoloured, warped, shrunk."""

from dataclasses import dataclass

import numpy as np
import pandas as pd
import torch
from PIL import Image
from torch import Tensor
from torch.nn import functional as F
from transformers import ProcessorMixin

from augment import _random_colours, random_affine
from mllm_models import prompt_text

WHAT = ("what is this?", "what is shown?", "what does the picture show?", "name this.", "this is a picture of a")
IS_IT = ("is this a {}?", "does the picture show a {}?")
COLOUR = ("what colour is it?", "which colour does it have?")
COLOURS = {
    "black": (0.05, 0.05, 0.05),
    "grey": (0.5, 0.5, 0.5),
    "white": (0.97, 0.97, 0.97),
    "red": (0.8, 0.1, 0.1),
    "orange": (0.95, 0.55, 0.1),
    "yellow": (0.95, 0.9, 0.2),
    "green": (0.15, 0.6, 0.2),
    "blue": (0.15, 0.3, 0.85),
    "purple": (0.5, 0.15, 0.6),
    "pink": (0.95, 0.55, 0.75),
    "brown": (0.45, 0.27, 0.12),
}
NAME_SHARE, COLOUR_SHARE = 0.76, 0.1


@dataclass
class Questions:
    """Draws a question and its answer for each image.

    Args:
        table: Rows with `name`, `monochrome` and `kind`.
        seed: Seed of the draws.
    """

    table: pd.DataFrame
    seed: int

    def __post_init__(self) -> None:
        self.names = self.table["name"].to_numpy()
        self.monochrome = self.table["monochrome"].to_numpy(dtype=bool)
        self.random = np.random.default_rng(self.seed)

    def draw(self, indices: np.ndarray) -> tuple[list[str], list[str], list[bool]]:
        """Questions, answers, and which of them ask for the colour (their answer is filled in with the drawing)."""
        questions, answers, colours = [], [], []
        for index in indices:
            draw, name = self.random.random(), str(self.names[index])
            colour = draw < COLOUR_SHARE and bool(self.monochrome[index])
            if colour:
                question, answer = str(self.random.choice(COLOUR)), ""
            elif draw < COLOUR_SHARE + NAME_SHARE:
                question, answer = str(self.random.choice(WHAT)), name
            else:
                other = str(self.names[self.random.integers(len(self.names))])
                asked = name if self.random.random() < 0.5 else other
                question = str(self.random.choice(IS_IT)).format(asked)
                answer = "yes" if asked == name else "no"
            questions.append(question)
            answers.append(answer)
            colours.append(colour)
        return questions, answers, colours


def draw_images(
    rgba: Tensor, monochrome: Tensor, coloured: Tensor, *, size: int, generator: torch.Generator
) -> tuple[Tensor, list[str]]:
    """Pixels in [0, 1] (batch, 3, size, size) and the colour name of each drawing's ink.

    A third of the images stand small in the middle of a border that is black, coloured or noisy.

    Args:
        rgba: uint8 (batch, 48, 48, 4), straight alpha.
        monochrome: bool (batch,): drawings of one colour, which are recoloured.
        coloured: bool (batch,): drawings whose colour is asked for; they get one of `COLOURS`.
        size: Rows and columns of the result.
        generator: CPU generator of all draws.
    """
    count = len(rgba)
    foreground, background = _random_colours(count, generator)
    palette = torch.tensor(list(COLOURS.values()))
    chosen = torch.randint(len(palette), (count,), generator=generator)
    ink = (palette[chosen] + 0.04 * torch.randn(count, 3, generator=generator)).clamp(0, 1)
    far = (ink.mean(dim=1, keepdim=True) < 0.55).float()
    foreground = torch.where(coloured[:, None], ink, foreground)
    background = torch.where(
        coloured[:, None], far + (1 - 2 * far) * 0.1 * torch.rand(count, 3, generator=generator), background
    )
    grid = F.affine_grid(random_affine(count, generator), [count, 4, size, size], align_corners=False)
    image = rgba.permute(0, 3, 1, 2).float().div_(255)
    colour, alpha = image[:, :3], image[:, 3:]
    mono = monochrome[:, None, None, None]
    colour = torch.where(mono, colour + (1 - colour) * foreground[:, :, None, None], colour)
    warped = F.grid_sample(torch.cat([colour * alpha, alpha], dim=1), grid, mode="bilinear", align_corners=False)
    pixels = warped[:, :3] + (1 - warped[:, 3:]) * background[:, :, None, None]
    names = list(COLOURS)
    return _random_borders(pixels, generator), [names[index] for index in chosen]


def _random_borders(pixels: Tensor, generator: torch.Generator) -> Tensor:
    """Shrink a third of the images into a window of 60 to 95 % and fill the border."""
    count, size = len(pixels), pixels.shape[-1]
    scale = torch.empty(count).uniform_(0.6, 0.95, generator=generator)
    shrunk = torch.rand(count, generator=generator) < 0.35
    scale = torch.where(shrunk, scale, torch.ones(()))
    theta = torch.zeros(count, 2, 3)
    theta[:, 0, 0] = theta[:, 1, 1] = 1 / scale
    grid = F.affine_grid(theta, list(pixels.shape), align_corners=False)
    inside = (grid.abs() <= 1).all(dim=-1)[:, None]
    small = F.grid_sample(pixels, grid, mode="bilinear", padding_mode="border", align_corners=False)
    kind = torch.rand(count, generator=generator)[:, None, None, None]
    flat = torch.rand(count, 3, 1, 1, generator=generator)
    noise = torch.rand(count, 3, size, size, generator=generator)
    border = torch.where(kind < 0.6, torch.zeros(()), torch.where(kind < 0.8, flat, noise))
    return torch.where(inside, small, border)


class QuestionTokens:
    """Token ids of questions and answers, made by the model's own processor and remembered.

    Args:
        processor: Processor of the model.
    """

    def __init__(self, processor: ProcessorMixin) -> None:
        self.processor, self.ask = processor, prompt_text(processor)
        self.image = Image.new("RGB", (48, 48))
        self._prefixes: dict[str, list[int]] = {}

    def prefix(self, question: str) -> list[int]:
        """Ids from the first token to where the answer begins, image tokens included."""
        ids = self._prefixes.get(question)
        if ids is None:
            ids = self.processor(images=[self.image], text=[self.ask(question)])["input_ids"][0]
            self._prefixes[question] = ids = list(ids)
        return ids

    def answer(self, text: str) -> list[int]:
        """Ids of an answer and the end token."""
        tokenizer = self.processor.tokenizer
        return [*tokenizer(text, add_special_tokens=False)["input_ids"], tokenizer.eos_token_id]

    def batch(self, questions: list[str], answers: list[str]) -> dict[str, Tensor]:
        """Right-padded `input_ids`, `attention_mask`, `labels` (-100 outside the answers) and `token_type_ids`."""
        pairs = [(self.prefix(q), self.answer(a)) for q, a in zip(questions, answers, strict=True)]
        length = max(len(p) + len(a) for p, a in pairs)
        ids = torch.full((len(pairs), length), self.processor.tokenizer.pad_token_id)
        mask, labels, suffix = torch.zeros_like(ids), torch.full_like(ids, -100), torch.zeros_like(ids)
        for row, (prefix, answer) in enumerate(pairs):
            both = len(prefix) + len(answer)
            ids[row, :both] = torch.tensor(prefix + answer)
            mask[row, :both] = 1
            labels[row, len(prefix) : both] = torch.tensor(answer)
            suffix[row, len(prefix) : both] = 1
        return {"input_ids": ids, "attention_mask": mask, "labels": labels, "token_type_ids": suffix}


def pixel_inputs(processor: ProcessorMixin, pixels: Tensor) -> Tensor:
    """Model input from pixels in [0, 1], with the processor's mean and standard deviation and its axes."""
    images = processor.image_processor
    mean, std = (torch.tensor(values)[:, None, None] for values in (images.image_mean, images.image_std))
    normal = (pixels - mean) / std
    return normal[:, None] if type(processor).__name__ == "Idefics3Processor" else normal


def training_texts(table: pd.DataFrame) -> list[str]:
    """What a tokenizer is trained on: every name as often as it occurs, questions, colours, the frame around them."""
    fixed = [*WHAT, *IS_IT, *COLOUR, *COLOURS, "yes", "no", "USER: ASSISTANT: User: Assistant:", "a photo of a"]
    return [*table["name"], *fixed * 200]
