r"""Train one of the bundled multimodal language models. Resumes by itself when started again with the same folder;
with more `--minutes` than before a finished run goes on, its learning rate risen again.

    python train_mllm.py --corpus CORPUS --family llava --output RUN
    python train_mllm.py --corpus CORPUS --family idefics3 --seed 1 --output RUN2
    python train_mllm.py --corpus CORPUS --family paligemma --seed 2 --output RUN3
    python train_mllm.py --smoke --output RUN4          # 30 seconds on the committed evaluation images

Recipe: cross-entropy of the answers to questions about the pretraining images (what is it, is it a ..., what colour is
it), vision tower from the bundled student CLIP at a lower rate, the rest from scratch; Muon for the matrices,
bfloat16 weights with float32 masters; a third of the images stand small inside a border.
"""

import argparse
import time
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch.nn import functional as F
from transformers import PreTrainedModel, ProcessorMixin

import mllm_models
from mllm_questions import Questions, QuestionTokens, draw_images, pixel_inputs, training_texts
from optimiser import MasterWeightOptimiser, working_dtype
from pretraining_data import PretrainingImages, load_corpus, load_smoke
from run_log import RunLog


@dataclass
class Recipe:
    """What determines a run; stored in its checkpoints.

    Attributes:
        family: Key of `mllm_models.NORMALISATION`.
        images: Image-question pairs until the end.
        minutes: CPU minutes after which the run ends even when images are left; None: images alone.
        batch_size: Pairs per step.
        muon_lr: Peak learning rate of the matrices.
        adam_lr: Peak learning rate of embeddings, norms and biases.
        vision_factor: Share of these rates for the vision tower.
        warmup_steps: Steps of linear warm-up.
        constant_share: Share of the run before the learning rate starts to fall to zero.
        emoji_repeats: How often each emoji occurs per epoch (each icon once).
        seed: Seed of initialisation, order, questions and augmentation.
    """

    family: str
    images: int
    minutes: float | None = None
    batch_size: int = 64
    muon_lr: float = 4e-3
    adam_lr: float = 1.5e-3
    vision_factor: float = 0.25
    warmup_steps: int = 60
    constant_share: float = 0.3
    emoji_repeats: int = 2
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.images // self.batch_size

    def lr_factor(self, step: int, progress: float) -> float:
        """Share of the peak learning rate: warm-up, constant, then a straight line to zero."""
        return min(min(1.0, (step + 1) / self.warmup_steps), max(0.0, 1 - progress) / (1 - self.constant_share))


class Training:
    """One run: model, data order, optimiser, log, checkpoints."""

    def __init__(
        self, recipe: Recipe, model: PreTrainedModel, processor: ProcessorMixin, data: PretrainingImages
    ) -> None:
        self.recipe, self.processor, self.data = recipe, processor, data
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device, working_dtype(self.device)).train()
        self.questions, self.tokens = Questions(data.table, recipe.seed), QuestionTokens(processor)
        self.size = mllm_models.vision_tower(model).config.image_size
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.order = np.random.default_rng(recipe.seed)
        emoji = np.flatnonzero(data.table["kind"] == "emoji")
        self.epoch_rows = np.concatenate([np.arange(len(data)), np.repeat(emoji, recipe.emoji_repeats - 1)])
        self.step = 0
        self._queue = np.empty(0, dtype=np.int64)
        self._freeze_unused()
        self.optimiser = MasterWeightOptimiser(
            self.model,
            muon_lr=recipe.muon_lr,
            adam_lr=recipe.adam_lr,
            pool=ThreadPoolExecutor(1),
            workers=1,
            slow=("model.vision_tower", "model.vision_model"),
            slow_factor=recipe.vision_factor,
        )

    def _freeze_unused(self) -> None:
        """Parameters that no answer depends on, such as a final norm of the class token, do not train."""
        state = self.generator.get_state()
        self._loss(np.arange(min(4, len(self.data))))[0].backward()
        self.generator.set_state(state)
        self.questions = Questions(self.data.table, self.recipe.seed)
        for parameter in self.model.parameters():
            if parameter.grad is None:
                parameter.requires_grad_(False)
            parameter.grad = None

    def _next_indices(self) -> np.ndarray:
        """The next batch of a fresh permutation of all images per epoch."""
        while len(self._queue) < self.recipe.batch_size:
            self._queue = np.concatenate([self._queue, self.order.permutation(self.epoch_rows)])
        batch, self._queue = np.split(self._queue, [self.recipe.batch_size])
        return batch

    def _loss(self, indices: np.ndarray) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean cross-entropy of the answers' tokens, and the share of answers that are right token by token."""
        questions, answers, coloured = self.questions.draw(indices)
        rgba, monochrome = self.data.pixels(indices)
        pixels, colours = draw_images(
            rgba, monochrome, torch.tensor(coloured), size=self.size, generator=self.generator
        )
        answers = [c if asked else a for a, c, asked in zip(answers, colours, coloured, strict=True)]
        batch = {key: value.to(self.device) for key, value in self.tokens.batch(questions, answers).items()}
        labels, suffix = batch.pop("labels"), batch.pop("token_type_ids")
        if self.recipe.family == "paligemma":
            batch["token_type_ids"] = suffix
        images = pixel_inputs(self.processor, pixels).to(self.device, self.model.dtype)
        hidden = self.model.model(**batch, pixel_values=images, use_cache=False).last_hidden_state
        targets = labels[:, 1:]
        asked = targets != -100
        logits = self.model.lm_head(hidden[:, :-1][asked]).float()  # the vocabulary is large: only where needed
        wrong = torch.zeros_like(targets, dtype=torch.bool)
        wrong[asked] = logits.argmax(dim=-1) != targets[asked]
        return F.cross_entropy(logits, targets[asked]), 100 * (1 - wrong.any(dim=1).float().mean())

    def train_step(self, progress: float) -> dict[str, float]:
        """One step at `progress` (0 to 1) of the run; returns loss, share of right answers, learning-rate factor."""
        loss, right = self._loss(self._next_indices())
        loss.backward()
        factor = self.recipe.lr_factor(self.step, progress)
        self.optimiser.step(factor)
        self.step += 1
        return {"loss": loss.item(), "accuracy": right.item(), "lr_factor": factor}

    def save_checkpoint(self, path: Path, log: RunLog) -> None:
        """Write everything needed to go on, replacing the previous checkpoint in one move."""
        state = {
            "recipe": vars(self.recipe),
            "step": self.step,
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "questions": self.questions.random.bit_generator.state,
            "order": self.order.bit_generator.state,
            "queue": torch.from_numpy(self._queue),
            "log": log.entries,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load_checkpoint(self, path: Path, log: RunLog) -> None:
        """Go on from a checkpoint of the same recipe; only the minutes may be others, usually more."""
        state = torch.load(path, weights_only=True)
        if state["recipe"] | {"minutes": None} != vars(self.recipe) | {"minutes": None}:
            raise ValueError(f"{path} is of another run: {state['recipe']} instead of {vars(self.recipe)}.")
        self.step, self._queue = state["step"], state["queue"].numpy()
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.questions.random.bit_generator.state = state["questions"]
        self.order.bit_generator.state = state["order"]
        log.entries[:] = state["log"]

    def export(self, folder: Path) -> None:
        """Save float16 weights and the processor as a model folder."""
        weights = dict(self.model.state_dict()) | self.optimiser.masters
        (table,) = (tensor for name, tensor in self.optimiser.masters.items() if "embed_tokens" in name)
        weights["lm_head.weight"] = table  # one tensor, two names
        model = type(self.model)(self.model.config)
        model.load_state_dict({name: tensor.detach().float().cpu() for name, tensor in weights.items()})
        partial = folder.with_name(folder.name + ".partial")
        # stored in half precision, loaded in single: half precision is many times slower on a CPU
        model.float().save_pretrained(partial, state_dict={k: v.half() for k, v in model.state_dict().items()})
        self.processor.save_pretrained(partial)
        folder.mkdir(parents=True, exist_ok=True)
        for file in partial.iterdir():
            file.replace(folder / file.name)
        partial.rmdir()


def run(training: Training, output: Path, *, checkpoint_minutes: float) -> RunLog:
    """Train to the end of the recipe, with checkpoints, a progress line and a log."""
    output.mkdir(parents=True, exist_ok=True)
    recipe, checkpoint = training.recipe, output / "checkpoint.pt"
    names = {"loss_name": "cross-entropy of the answer", "accuracy_name": "right answers"}
    log = RunLog(recipe.steps, recipe.batch_size, **names)
    if checkpoint.exists():
        training.load_checkpoint(checkpoint, log)
    earlier = log.entries[-1]["cpu_seconds"] if log.entries else 0.0
    started, last_saved = time.process_time(), time.monotonic()

    def progress() -> float:
        spent = earlier + time.process_time() - started
        return max(training.step / recipe.steps, 0.0 if recipe.minutes is None else spent / (60 * recipe.minutes))

    while (now := progress()) < 1:
        figures = training.train_step(now)
        log.add(training.step - 1, figures, progress=progress())
        if time.monotonic() - last_saved > 60 * checkpoint_minutes:
            training.save_checkpoint(checkpoint, log)
            log.save(output)
            last_saved = time.monotonic()
    training.save_checkpoint(checkpoint, log)
    training.export(output / "model")
    log.save(output)
    return log


def prepare(args: argparse.Namespace) -> Training:
    """Data, tokenizer and model of a run from the command line."""
    torch.set_flush_denormal(True)
    torch.set_num_threads(args.threads)
    torch.manual_seed(args.seed)
    data = load_smoke() if args.smoke else load_corpus(args.corpus)
    tokenizer = mllm_models.train_tokenizer(training_texts(data.table), args.family)
    shape = "tiny" if args.smoke else None
    size, _ = mllm_models.SIZES[shape or args.family]
    processor = mllm_models.build_processor(args.family, tokenizer, size)
    model = mllm_models.build_model(args.family, processor.tokenizer, shape=shape)
    recipe = Recipe(args.family, args.images, args.minutes, seed=args.seed)
    return Training(recipe, model, processor, data)


def parse_arguments() -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="output folder of build_corpus.py")
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoint, log and exported model")
    parser.add_argument("--family", choices=sorted(mllm_models.NORMALISATION), default="llava")
    parser.add_argument("--images", type=int, default=200_000, help="image-question pairs of the whole run")
    parser.add_argument("--minutes", type=float, help="CPU minutes after which the run ends in any case")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--threads", type=int, default=1, help="threads inside an operation, on a CPU")
    parser.add_argument("--checkpoint-minutes", type=float, default=5)
    parser.add_argument("--smoke", action="store_true", help="30 seconds with a tiny model on the committed images")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.smoke:
        args.images, args.minutes = 32_000, 0.5
    log = run(prepare(args), args.output, checkpoint_minutes=args.checkpoint_minutes)
    print(f"loss {log.entries[0]['loss']:.3f} -> {log.entries[-1]['loss']:.3f}, log and model in {args.output}")


if __name__ == "__main__":
    main()
