r"""Pretrain one of the bundled CLIPs on the drawn corpus. Resumes by itself when started again with the same folder.

    python train_clip.py --corpus CORPUS --architecture student --pairs 760000 --output RUN
    python train_clip.py --corpus CORPUS --architecture teacher --grow-from RUN/model --output RUN2 \
        --pairs 640000 --minutes 50 --masked-share 0.7 --muon-lr 3.5e-3 --adam-lr 7e-4 \
        --constant-share 0.1 --emoji-repeats 2
    python train_clip.py --smoke --output RUN3          # 30 seconds on the committed evaluation images

Recipe: contrastive loss with all images of one caption as positives, 16 of 36 patches dropped for the first 85 % of
the steps (FLIP), Muon for the matrices, bfloat16 weights (float32 on CPUs without it) with float32 masters,
recolouring and affine warps, no flips.
"""

import argparse
import time
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from transformers import CLIPModel, CLIPTokenizer

import clip_model
from augment import augment
from captions import CaptionSampler, corpus_texts, train_tokenizer
from clip_forward import ParallelTowers, random_patches
from optimiser import MasterWeightOptimiser, working_dtype
from pretraining_data import PretrainingImages, load_corpus, load_smoke
from run_log import RunLog

RECIPE_OPTIONS = {
    "batch_size": int,
    "masked_share": float,
    "muon_lr": float,
    "adam_lr": float,
    "constant_share": float,
    "emoji_repeats": int,
    "minutes": float,
}
NUM_PATCHES = (clip_model.IMAGE_SIZE // clip_model.PATCH_SIZE) ** 2


@dataclass
class Recipe:
    """What determines a run; stored in its checkpoints.

    Attributes:
        architecture: Key of `clip_model.ARCHITECTURES`.
        pairs: Image-text pairs until the end.
        batch_size: Pairs per step.
        kept_patches: Patches that enter the vision encoder while others are dropped.
        masked_share: Share of the steps with dropped patches.
        muon_lr: Peak learning rate of the matrices.
        adam_lr: Peak learning rate of embeddings, norms and biases.
        warmup_steps: Steps of linear warm-up.
        constant_share: Share of the steps before the learning rate starts to fall to zero.
        emoji_repeats: How often each emoji occurs per epoch (each icon once).
        minutes: Time after which the run ends even when pairs are left; the schedule follows whichever of the two
            is used up faster, so that the learning rate is zero at the end in any case. None: pairs alone.
        seed: Seed of order, captions, augmentation and initialisation.
    """

    architecture: str
    pairs: int
    batch_size: int = 256
    kept_patches: int = 20
    masked_share: float = 0.85
    muon_lr: float = 5e-3
    adam_lr: float = 1e-3
    warmup_steps: int = 60
    constant_share: float = 0.3
    emoji_repeats: int = 1
    minutes: float | None = None
    seed: int = 0

    @property
    def steps(self) -> int:
        """Optimiser steps of the whole run."""
        return self.pairs // self.batch_size

    def progress(self, step: int, seconds: float) -> float:
        """Share of the run that is over after `step` steps and `seconds` of training."""
        used = 0.0 if self.minutes is None else seconds / (60 * self.minutes)
        return max(step / self.steps, used)

    def lr_factor(self, step: int, progress: float) -> float:
        """Share of the peak learning rate: warm-up, constant, then a straight line to zero."""
        warmup = min(1.0, (step + 1) / self.warmup_steps)
        return min(warmup, max(0.0, 1 - progress) / (1 - self.constant_share))


class Pretraining:
    """One run: model, data order, optimiser, log, checkpoints."""

    def __init__(
        self,
        recipe: Recipe,
        model: CLIPModel,
        *,
        tokenizer: CLIPTokenizer,
        data: PretrainingImages,
        workers: int = 2,
    ) -> None:
        self.recipe, self.tokenizer, self.data = recipe, tokenizer, data
        self.device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
        self.model = model.to(self.device, working_dtype(self.device)).train()
        self.towers = ParallelTowers(self.model, workers=workers if self.device.type == "cpu" else 1)
        self.optimiser = MasterWeightOptimiser(
            self.model,
            muon_lr=recipe.muon_lr,
            adam_lr=recipe.adam_lr,
            pool=self.towers.pool,
            workers=self.towers.workers,
        )
        self.captions = CaptionSampler(data.table, tokenizer, seed=recipe.seed)
        self.generator = torch.Generator().manual_seed(recipe.seed)
        self.order = np.random.default_rng(recipe.seed)
        emoji = np.flatnonzero(data.table["kind"] == "emoji")
        self.epoch_rows = np.concatenate([np.arange(len(data)), np.repeat(emoji, recipe.emoji_repeats - 1)])
        self.step = 0
        self._queue = np.empty(0, dtype=np.int64)

    def _next_indices(self) -> np.ndarray:
        """The next batch of a fresh permutation of all images per epoch."""
        while len(self._queue) < self.recipe.batch_size:
            self._queue = np.concatenate([self._queue, self.order.permutation(self.epoch_rows)])
        batch, self._queue = np.split(self._queue, [self.recipe.batch_size])
        return batch

    def train_step(self, progress: float) -> dict[str, float]:
        """One step at `progress` (0 to 1) of the run; returns loss, in-batch accuracy and learning-rate factor."""
        recipe = self.recipe
        indices = self._next_indices()
        rgba, monochrome = self.data.pixels(indices)
        pixels = augment(rgba.to(self.device), monochrome.to(self.device), self.generator)
        token_ids, targets = (tensor.to(self.device) for tensor in self.captions.draw(indices))
        kept = None
        if progress < recipe.masked_share:
            kept = random_patches(len(indices), NUM_PATCHES, recipe.kept_patches, self.generator).to(self.device)
        loss, logits = self.towers.backward(pixels.to(self.model.dtype), kept, token_ids, targets)
        factor = recipe.lr_factor(self.step, progress)
        self.optimiser.step(factor)
        self.step += 1
        accuracy = (logits.argmax(dim=1) == targets).float().mean().item() * 100
        return {"loss": loss.item(), "accuracy": accuracy, "lr_factor": factor}

    def save_checkpoint(self, path: Path, log: RunLog) -> None:
        """Write everything needed to go on, replacing the previous checkpoint in one move."""
        state = {
            "recipe": vars(self.recipe),
            "step": self.step,
            "optimiser": self.optimiser.state_dict(),
            "generator": self.generator.get_state(),
            "captions": self.captions.random.getstate(),
            "order": self.order.bit_generator.state,
            "queue": torch.from_numpy(self._queue),
            "log": log.entries,
        }
        partial = path.with_suffix(".partial")
        torch.save(state, partial)
        partial.replace(path)

    def load_checkpoint(self, path: Path, log: RunLog) -> None:
        """Go on from a checkpoint of the same recipe."""
        state = torch.load(path, weights_only=True)
        if state["recipe"] != vars(self.recipe):
            raise ValueError(f"{path} is of another run: {state['recipe']} instead of {vars(self.recipe)}.")
        self.step, self._queue = state["step"], state["queue"].numpy()
        self.optimiser.load_state_dict(state["optimiser"])
        self.generator.set_state(state["generator"])
        self.captions.random.setstate(state["captions"])
        self.order.bit_generator.state = state["order"]
        log.entries[:] = state["log"]

    def export(self, folder: Path) -> None:
        """Save float16 weights, tokenizer and image processor as a `CLIPModel` folder."""
        model = CLIPModel(self.model.config)
        model.load_state_dict({name: tensor.detach().cpu() for name, tensor in self.optimiser.masters.items()})
        partial = folder.with_name(folder.name + ".partial")
        # stored in half precision, loaded in single: half precision is many times slower on a CPU
        model.float().save_pretrained(partial, state_dict={k: v.half() for k, v in model.state_dict().items()})
        self.tokenizer.save_pretrained(partial)
        clip_model.image_processor().save_pretrained(partial)
        folder.mkdir(parents=True, exist_ok=True)
        for file in partial.iterdir():
            file.replace(folder / file.name)
        partial.rmdir()


def run(training: Pretraining, output: Path, *, checkpoint_minutes: float) -> RunLog:
    """Train to the end of the recipe, with checkpoints, a progress line and a log."""
    output.mkdir(parents=True, exist_ok=True)
    log, checkpoint = RunLog(training.recipe.steps, training.recipe.batch_size), output / "checkpoint.pt"
    if checkpoint.exists():
        training.load_checkpoint(checkpoint, log)
    last_saved = time.monotonic()
    while (progress := training.recipe.progress(training.step, log.seconds())) < 1:
        figures = training.train_step(progress)
        log.add(training.step - 1, figures, progress=training.recipe.progress(training.step, log.seconds()))
        now = time.monotonic()
        if now - last_saved > 60 * checkpoint_minutes:
            training.save_checkpoint(checkpoint, log)
            training.export(output / "model")
            log.save(output)
            last_saved = time.monotonic()
    training.save_checkpoint(checkpoint, log)
    training.export(output / "model")
    log.save(output)
    return log


def prepare(args: argparse.Namespace) -> Pretraining:
    """Data, tokenizer and model of a run from the command line."""
    torch.set_flush_denormal(True)
    torch.manual_seed(args.seed)
    data = load_smoke() if args.smoke else load_corpus(args.corpus, half=args.half)
    if args.grow_from is not None:
        tokenizer = CLIPTokenizer.from_pretrained(args.grow_from)
        source = CLIPModel.from_pretrained(args.grow_from, dtype=torch.float32)
        model = clip_model.grow(source, args.architecture, tokenizer)
    else:
        tokenizer = train_tokenizer(corpus_texts(data.table), args.output / "tokenizer")
        model = clip_model.build_model(args.architecture, tokenizer)
    recipe = Recipe(args.architecture, args.pairs, seed=args.seed)
    for name in RECIPE_OPTIONS:
        if getattr(args, name) is not None:
            setattr(recipe, name, getattr(args, name))
    return Pretraining(recipe, model, tokenizer=tokenizer, data=data, workers=args.workers)


def parse_arguments() -> argparse.Namespace:
    """Command line of the script."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--corpus", type=Path, help="output folder of build_corpus.py")
    parser.add_argument("--half", action="store_true", help="train on half of the names only")
    parser.add_argument("--output", type=Path, required=True, help="folder of checkpoint, log and exported model")
    parser.add_argument("--architecture", choices=sorted(clip_model.ARCHITECTURES), default="student")
    parser.add_argument("--grow-from", type=Path, help="model folder whose weights the deeper model starts from")
    parser.add_argument("--pairs", type=int, default=760_000, help="image-text pairs of the whole run")
    for name, kind in RECIPE_OPTIONS.items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=kind, help="see Recipe")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--workers", type=int, default=2, help="threads that share a batch on a CPU")
    parser.add_argument("--checkpoint-minutes", type=float, default=4)
    parser.add_argument("--smoke", action="store_true", help="30 seconds with a tiny model on the committed images")
    return parser.parse_args()


def main() -> None:
    args = parse_arguments()
    if args.smoke:
        args.architecture, args.pairs, args.batch_size, args.minutes = "tiny", 64_000, 64, 0.5
        args.masked_share = 0.0
    log = run(prepare(args), args.output, checkpoint_minutes=args.checkpoint_minutes)
    print(f"loss {log.entries[0]['loss']:.3f} -> {log.entries[-1]['loss']:.3f}, log and model in {args.output}")


if __name__ == "__main__":
    main()
