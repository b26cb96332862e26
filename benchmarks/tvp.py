"""CPU time of a TVP step and of scoring candidate answers; random weights.

    python benchmarks/tvp.py            # a table
    python benchmarks/tvp.py --json     # and one JSON object as the last line

Variants, each in a child process of its own, in turn over several rounds; ratios are taken within a round:

    step_task      the task alone on a small LLaVA
    step_fca       task and FCA: one more pass of the vision tower, without autograd
    step_tse       task and TSE by a CLIP ViT-B/16, whose class features are computed once
    scoring_*      20 candidate answers: one forward pass over image, question and answer per candidate, or one pass
                   over image and question shared by all

The LLaVA has 49 image tokens, a vision tower of width 384 and a language model of width 512, 8 layers each; batch 4,
224 px, float32. CPU seconds are user plus system time of the process. What FCA costs depends on the vision tower's
share of a step, so it is also given by operation count for LLaVA-1.5-7B (multiplications of the matrix products, a
backward pass through frozen weights as one forward pass), where the language model dominates.
"""

import argparse
import json
import time
from typing import Any

import torch
from torch import Tensor

from measuring import measure, print_summary, process_mb, random_clip, random_prompts, summary, timed_steps

NUM_CLASSES, BATCH, STORED = 100, 4, 8
NUM_CANDIDATES, QUESTION_BATCH, QUESTION_TOKENS = 20, 2, 12
VOCABULARY, IMAGE_TOKEN = 32000, 31999
SCORING_VARIANTS = ("scoring_plain_loop", "scoring_shared_prefix")
STEP_VARIANTS = ("step_task", "step_fca", "step_tse")
VARIANTS = (*STEP_VARIANTS, *SCORING_VARIANTS)


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
    question = torch.randint(3, 31000, (QUESTION_BATCH, QUESTION_TOKENS), generator=generator)
    ids = torch.cat([torch.full((QUESTION_BATCH, 49), IMAGE_TOKEN), question], dim=1)
    pixels = torch.randn(QUESTION_BATCH, 3, 224, 224, generator=generator)
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids), "pixel_values": pixels}


class RandomQuestions:
    """A few noise images with questions and answers of three tokens, and the same images for a CLIP."""

    has_fixed_pixels = True
    class_names = tuple(f"class {index}" for index in range(NUM_CLASSES))
    labels = tuple(range(STORED))

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(2)
        parts = [random_questions() for _ in range(0, STORED, 2)]
        columns = {name: torch.cat([part[name] for part in parts]) for name in parts[0]}
        answers = torch.randint(3, 31000, (STORED, 3), generator=generator)
        silent = torch.full_like(columns["input_ids"], -100)
        self.columns = {
            "input_ids": torch.cat([columns["input_ids"], answers], dim=1),
            "attention_mask": torch.ones(STORED, silent.shape[1] + 3, dtype=torch.long),
            "token_labels": torch.cat([silent, answers], dim=1),
            "pixel_values": torch.randn(STORED, 3, 224, 224, generator=generator),
            "clip_pixel_values": torch.randn(STORED, 3, 224, 224, generator=generator),
            "labels": torch.tensor(self.labels),
            "index": torch.arange(STORED),
        }

    def __len__(self) -> int:
        return STORED

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {name: column[index] for name, column in self.columns.items()}

    def collate(self, items: list[dict[str, Tensor]]) -> dict[str, Tensor]:
        """Stack columns.

        Args:
            items: Rows.
        """
        return {name: torch.stack([item[name] for item in items]) for name in items[0]}


def step_child(variant: str, steps: int) -> dict[str, float]:
    """Run one variant of a training step and measure it.

    Args:
        variant: One of `STEP_VARIANTS`.
        steps: Measured steps.
    """
    from peft import get_peft_model
    from transformers import CLIPImageProcessor

    from peft_vlm import TVPConfig, TVPObjective
    from peft_vlm.methods.tvp import ClipGuide

    processor = CLIPImageProcessor()
    model: Any = get_peft_model(random_llava(), TVPConfig.for_processor(processor)).train()
    settings: dict[str, Any] = {"fca_weight": 0.005 if variant == "step_fca" else 0.0, "tse_weight": 0.0}
    if variant == "step_tse":
        guide = ClipGuide(random_clip().eval(), random_prompts(NUM_CLASSES, full_length=False), processor=processor)
        settings |= {"tse_weight": 0.001, "tse_clip": guide}
    objective = TVPObjective(None, **settings)
    dataset: Any = RandomQuestions()
    objective.prepare(model, dataset)
    objective.epoch_start(model, dataset, 0)
    optimizer: Any = objective.optimizer(model, learning_rate=10.0)
    batch: Any = dataset.collate([dataset[index] for index in range(BATCH)])

    def step() -> None:
        optimizer.zero_grad()
        objective(model, batch).loss.backward()
        optimizer.step()

    return {"seconds": timed_steps(step, steps), "process_mb": process_mb()}


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
    """CPU seconds to score one batch of questions; both variants must agree.

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


def ratios(results: dict[str, dict[str, float]]) -> dict[str, float]:
    """Costs and speed-ups, within one round.

    Args:
        results: What the children measured, by variant.
    """
    seconds = {variant: result["seconds"] for variant, result in results.items()}
    return {
        "fca_cost": seconds["step_fca"] / seconds["step_task"],
        "tse_cost": seconds["step_tse"] / seconds["step_task"],
        "scoring_speedup": seconds[SCORING_VARIANTS[0]] / seconds[SCORING_VARIANTS[1]],
    }


def fca_cost_of_llava_7b(text_tokens: int = 30) -> float:
    """By the multiplications of the matrix products of LLaVA-1.5-7B.

    Args:
        text_tokens: Tokens of question and answer.
    """
    vision_tokens, width, layers = 577, 1024, 23  # features of the last layer but one
    vision = layers * (12 * vision_tokens * width**2 + 2 * vision_tokens**2 * width)
    tokens, width, inner, layers = 576 + text_tokens, 4096, 11008, 32
    language = layers * (tokens * (4 * width**2 + 3 * width * inner) + 2 * tokens**2 * width)
    step = 2 * (vision + language)
    return (step + vision) / step


def main() -> None:
    """Parse the command line, measure, print."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--json", action="store_true", help="print one JSON object as the last line")
    parser.add_argument("--rounds", type=int, default=3, help="rounds over the variants")
    parser.add_argument("--steps", type=int, default=2, help="measured steps per child process")
    parser.add_argument("--child", choices=VARIANTS, help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        child = step_child if args.child in STEP_VARIANTS else scoring_child
        print(json.dumps(child(args.child, args.steps)))
        return
    started = time.perf_counter()
    result = summary(measure(__file__, VARIANTS, rounds=args.rounds, options=["--steps", str(args.steps)]), ratios)
    result["by_count"] = {"llava_1_5_7b_fca_cost": fca_cost_of_llava_7b()}
    print_summary(result, {"seconds": "CPU s"})
    print(f"by operation count, LLaVA-1.5-7B: FCA {fca_cost_of_llava_7b():.3f}")
    print(f"{args.rounds} rounds in {time.perf_counter() - started:.0f} s")
    if args.json:
        print(json.dumps(result))


if __name__ == "__main__":
    main()
