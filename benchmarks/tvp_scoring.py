"""Scoring 20 candidate answers with a LLaVA of random weights: one pass over each question, or one per candidate.

Functions of `benchmarks/tvp.py`.
"""

from typing import Any

import torch
from torch import Tensor

from measuring import timed_steps

SCORING_VARIANTS = ("scoring_plain_loop", "scoring_shared_prefix")
NUM_CANDIDATES, BATCH, QUESTION_TOKENS = 20, 2, 12
VOCABULARY, IMAGE_TOKEN = 32000, 31999


def random_llava() -> Any:
    """49 image tokens of a 224 px vision tower (width 384, 8 layers) before a Llama (width 512, 8 layers)."""
    from transformers import CLIPVisionConfig, LlamaConfig, LlavaConfig, LlavaForConditionalGeneration

    torch.manual_seed(0)
    layers = {"num_hidden_layers": 8}
    vision = CLIPVisionConfig(
        hidden_size=384, intermediate_size=1536, num_attention_heads=6, image_size=224, patch_size=32, **layers
    )
    text = LlamaConfig(vocab_size=VOCABULARY, hidden_size=512, intermediate_size=1376, num_attention_heads=8, **layers)
    return LlavaForConditionalGeneration(
        LlavaConfig(vision_config=vision, text_config=text, image_token_index=IMAGE_TOKEN)
    ).eval()


def random_questions() -> dict[str, Tensor]:
    """Model inputs: an image and twelve tokens of a question each."""
    generator = torch.Generator().manual_seed(0)
    question = torch.randint(3, 31000, (BATCH, QUESTION_TOKENS), generator=generator)
    ids = torch.cat([torch.full((BATCH, 49), IMAGE_TOKEN), question], dim=1)
    pixels = torch.randn(BATCH, 3, 224, 224, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


def random_candidates() -> Any:
    """Twenty answers of one to five tokens."""
    from peft_vlm.text import Candidates

    generator = torch.Generator().manual_seed(1)
    lengths = [1 + index % 5 for index in range(NUM_CANDIDATES)]
    rows = tuple(tuple(torch.randint(3, 31000, (n,), generator=generator).tolist()) for n in lengths)
    return Candidates(tuple(f"answer {index}" for index in range(NUM_CANDIDATES)), rows, include_end=False)


@torch.no_grad()
def plain_loop_scores(model: Any, inputs: dict[str, Tensor], candidates: Any) -> Tensor:
    """Mean log-probability of each candidate's tokens by one forward pass per candidate over image, question, answer.

    Args:
        model: LLaVA.
        inputs: Questions of one length.
        candidates: Answers.
    """
    columns = []
    for tokens in candidates.token_ids:
        answer = torch.tensor(tokens).expand(len(inputs["input_ids"]), -1)
        ids = torch.cat([inputs["input_ids"], answer], dim=1)
        mask = torch.ones_like(ids)
        logits = model(**inputs | {"input_ids": ids, "attention_mask": mask}, logits_to_keep=len(tokens) + 1).logits
        logprobs = logits[:, :-1].log_softmax(dim=-1)
        columns.append(logprobs.gather(-1, answer.unsqueeze(-1)).mean(dim=(1, 2)))
    return torch.stack(columns, dim=1)


def scoring_child(variant: str, steps: int) -> dict[str, float]:
    """CPU seconds to score one batch of questions; both variants must agree, or the figures mean nothing.

    Args:
        variant: One of `SCORING_VARIANTS`.
        steps: Batches.
    """
    from peft_vlm.text import candidate_scores

    model, inputs, candidates = random_llava(), random_questions(), random_candidates()
    functions = {
        "scoring_plain_loop": lambda: plain_loop_scores(model, inputs, candidates),
        "scoring_shared_prefix": lambda: candidate_scores(model, inputs, candidates),
    }
    difference = (functions["scoring_plain_loop"]() - functions["scoring_shared_prefix"]()).abs().max().item()
    if difference > 1e-4:
        raise RuntimeError(f"The two ways to score differ by {difference}.")
    return {"seconds": timed_steps(functions[variant], steps)}
