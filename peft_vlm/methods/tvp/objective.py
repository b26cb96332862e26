"""TVP's objective: the task of the model in training, FCA on its visual tokens, and TSE by a CLIP.

Exploring the Transferability of Visual Prompting for Multimodal Large Language Models, 2024, arXiv 2404.11207.
"""

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.adapters.pixel_prompt import active_name, prompt_layer_of, without_prompt
from peft_vlm.data.question_collator import check_shrinking
from peft_vlm.distributed import shared_mean
from peft_vlm.errors import check_choice, check_number
from peft_vlm.losses import feature_consistency, semantic_enhancement
from peft_vlm.methods.tvp.tasks import (
    AnswerTask,
    ClassTask,
    ClipGuide,
    Source,
    Task,
    TaskOutput,
    batch_at,
    check_same_images,
    set_eval_mode,
    share_once,
)
from peft_vlm.objective import Batch, ClassNames, Objective, ObjectiveOutput, Paper
from peft_vlm.registry import Preset, RunSize
from peft_vlm.text.answers import Candidates
from peft_vlm.text.prompts import ClassPrompts

PAPER = Paper(
    title="Exploring the Transferability of Visual Prompting for Multimodal Large Language Models",
    year=2024,
    arxiv_id="2404.11207",
    venue="CVPR 2024",
    bibtex="""@inproceedings{zhang2024exploring,
  title     = {Exploring the Transferability of Visual Prompting for Multimodal Large Language Models},
  author    = {Zhang, Yichi and Dong, Yinpeng and Zhang, Siyuan and Min, Tianzan and Su, Hang and Zhu, Jun},
  booktitle = {Proceedings of the IEEE/CVF Conference on Computer Vision and Pattern Recognition},
  year      = {2024}
}""",
)

SOURCE_MODES = ("average", "alternate")


class TVPObjective(Objective):
    """Task loss + `fca_weight` * FCA - `tse_weight` * TSE, all of them functions of the pixel prompt alone.

    Formula: L = L_task(x') + a * mean_j ||g_j(x') - g_j(x)||_2 - b * mean_i exp(s) cos(I(x'_i), T(y_i)), with x the
        shrunken images, x' the same with the prompt, g_j the visual tokens as they enter the language model, I and T
        the encoders of a CLIP with logit scale s.

    Args:
        prompts: For a multimodal model the candidate answers of its classes (`tokenize_candidates`), or None for free
            answers, which cannot be scored in evaluation. For a CLIP-like model its class prompts: the task is then
            cross-entropy over them.
        fca_weight: a. Paper's recipe for CIFAR-10: 0.005.
        tse_weight: b. Paper's recipe for CIFAR-10: 0.001, which is about 0.1 on the cosine.
        tse_clip: The CLIP of TSE; needed unless `tse_weight` is 0.
        sources: Further multimodal models that the prompt is trained on.
        source_mode: `"average"`: every step takes the mean loss of all models; `"alternate"`: one model after the
            other, which needs the memory of one.
        normalized_gradient: Train by `NormalizedGradient`, as the paper does; False: by the optimizer of the training
            arguments.

    Requirements:
        Batches of `QuestionCollator` with answers, or for a CLIP `pixel_values`, `labels`; `index` for
        sources; `labels` for TSE, which leaves out images without. A `PeftModel` with an active TVP adapter and
        nothing else that trains.

    Relations:
        With both weights 0, visual prompting (arXiv 2203.17274) by the language model's loss.

    Raises:
        ValueError: If a weight is negative, TSE has a weight but no CLIP, or a mode is unknown.

    References:
        arXiv 2404.11207, Sec. 4.
    """

    paper = PAPER

    def __init__(
        self,
        prompts: Candidates | ClassPrompts | None,
        *,
        fca_weight: float | int = 0.005,
        tse_weight: float | int = 0.001,
        tse_clip: ClipGuide | None = None,
        sources: Sequence[Source] = (),
        source_mode: str = "average",
        normalized_gradient: bool = True,
    ) -> None:
        _check_settings(fca_weight, tse_weight, tse_clip, source_mode)
        self.prompts = ClassNames(prompts.names) if isinstance(prompts, Candidates) else prompts
        self.labels_are_positions = isinstance(prompts, ClassPrompts)  # else it learns the words of an answer
        self.can_predict = prompts is not None
        self.task: Task = ClassTask(prompts) if isinstance(prompts, ClassPrompts) else AnswerTask(prompts)
        self.fca_weight, self.tse_weight, self.tse_clip = fca_weight, tse_weight, tse_clip
        self.sources, self.source_mode = tuple(sources), source_mode
        self.normalized_gradient = normalized_gradient
        self._tasks = [self.task, *(AnswerTask(None) for _ in self.sources)]  # nobody scores what sources answer
        self._shared: list[Any] = [None] * len(self.sources)
        self._source_images: list[Any] = []
        self._step = torch.zeros((), dtype=torch.long)

    def config_dict(self) -> dict[str, Any]:
        """The settings as JSON values."""
        return {
            "fca_weight": self.fca_weight,
            "tse_weight": self.tse_weight,
            "tse_template": list(self.tse_clip.prompts.templates) if self.tse_weight and self.tse_clip else None,
            "num_models": 1 + len(self.sources),
            "source_mode": self.source_mode,
            "normalized_gradient": self.normalized_gradient,
        }

    def prepare(self, model: nn.Module, dataset: Any) -> None:
        """Check models and data, and put the prompt on the CLIP and the sources.

        Args:
            model: `PeftModel` with the active adapter.
            dataset: Training images, or questions about images.

        Raises:
            ValueError: If anything but the prompt is to be trained, or TSE has no labels to go by.
            DataError: If the data do not fit the models or the prompt.
        """
        super().prepare(model, dataset)
        layer = prompt_layer_of(model)
        prompt, settings = layer.prompts[active_name(layer)], layer.settings[active_name(layer)]
        others = [name for name, p in model.named_parameters() if p.requires_grad and p is not prompt]
        if others:
            raise ValueError(
                f"Expected nothing to train but the prompt, got {len(others)} further tensors, first {others[0]!r}. A "
                "prompt that only works with changed weights is of no use to other models: leave out "
                "`modules_to_save` and freeze the model."
            )
        check_same_images(self.sources, dataset)
        self._source_images = [
            source.dataset.for_run(skip_unreadable=dataset.unreadable.are_skipped) for source in self.sources
        ]
        for images in self._datasets(dataset):
            check_shrinking(getattr(images, "collator", None), settings)
        if self.tse_weight and self.tse_clip is not None:
            if max(dataset.labels) < 0:
                raise ValueError("Expected labels for TSE, got images without classes. Set `tse_weight=0`.")
            self.tse_clip.prepare(model, dataset.class_names)
        device = prompt.device
        for number, source in enumerate(self.sources):
            shared = share_once(self._shared[number], model, source.model, processor=source.processor)
            self._shared[number] = shared.to(device)
        members = zip(self._tasks, [model, *self._shared], self._datasets(dataset), strict=True)
        for task, member, images in members:
            task.prepare(member, batch_at(images, [0], device))

    def _datasets(self, dataset: Any) -> list[Any]:
        return [dataset, *self._source_images]

    def epoch_start(self, model: nn.Module, dataset: Any, epoch: int) -> None:
        """Move the images of the sources to the epoch.

        Args:
            model: `PeftModel` with the active adapter.
            dataset: Training images or questions; its epoch is already set.
            epoch: Number of the epoch, from 0.
        """
        for images in self._source_images:
            images.set_epoch(epoch)

    def __call__(self, model: nn.Module, batch: Batch) -> ObjectiveOutput:
        """The loss of a batch on the model, on its sources, or on the one whose turn it is.

        Args:
            model: `PeftModel` with the active adapter.
            batch: See Requirements.

        Returns:
            The terms `language` (or `cross_entropy`), `fca` and `tse` where they have a weight, the last negative; the
            logits of the first model that ran.
        """
        runs = [self._run(number, model, batch) for number in self._turn()]
        terms = {self.task.term: shared_mean([(output.loss, len(output.labels)) for output, _ in runs])}
        if self.fca_weight:
            terms["fca"] = self.fca_weight * shared_mean([(apart, len(output.tokens)) for output, apart in runs])
        if self.tse_weight and self.tse_clip is not None:
            terms["tse"] = -self.tse_weight * shared_mean([self._semantics(batch)])
        first = runs[0][0]
        return ObjectiveOutput(terms, first.logits, first.labels, terms_are_shared=True)

    def _turn(self) -> list[int]:
        """Numbers of the models that this batch runs through; 0 is the trained one."""
        count = 1 + len(self.sources)
        if self.source_mode == "average":
            return list(range(count))
        number = int(self._step) % count
        self._step += 1
        return [number]

    def _run(self, number: int, model: nn.Module, batch: Mapping[str, Tensor]) -> tuple[TaskOutput, Tensor]:
        """One model's task, and the distance of its visual tokens from those of clean images."""
        task = self._tasks[number]
        if number:  # a further source sees the same images through a processor of its own
            model = self._shared[number - 1]
            batch = batch_at(self._source_images[number - 1], batch["index"].tolist(), batch["index"].device)
        set_eval_mode(model)
        output = task.run(model, batch)
        if not self.fca_weight:
            return output, output.loss.new_zeros(())
        # Visual tokens of the clean image: (rows, tokens, width), the anchor that FCA pulls to.
        with torch.no_grad(), without_prompt(model):
            clean = task.encode(model, batch)
        return output, feature_consistency(output.tokens, clean)

    def _semantics(self, batch: Mapping[str, Tensor]) -> tuple[Float[Tensor, ""], int]:
        """TSE over the images with a class, and their number."""
        labels, logits = batch["labels"], self.tse_clip.logits(batch)
        known = labels >= 0  # (batch,): images without a class take no part
        count = int(known.sum())
        # Where no image counts, the sum keeps the prompt in the graph, as the other processes have it.
        return semantic_enhancement(logits[known], labels[known]) if count else 0.0 * logits.sum(), count

    def predict(self, model: nn.Module, batch: Batch) -> Float[Tensor, "batch classes"]:
        """A score per class by the model in training.

        Args:
            model: The model under evaluation.
            batch: Columns of the task.
        """
        return self.task.predict(model, batch)

    def optimizer(self, model: nn.Module, *, learning_rate: float) -> torch.optim.Optimizer | None:
        """The paper's update of the prompt, masked to its shape; None for the optimizer of the arguments.

        Args:
            model: `PeftModel` with the active adapter.
            learning_rate: Step length in [0, 1] pixel units. Official: 10.
        """
        if not self.normalized_gradient:
            return None
        layer = prompt_layer_of(model)
        name = active_name(layer)
        prompt = layer.prompts[name]
        mask = layer.settings[name].mask(prompt.device).expand_as(prompt)  # (3, canvas, canvas)
        return NormalizedGradient([prompt], lr=learning_rate, masks={prompt: mask})

    def state_dict(self) -> dict[str, Tensor]:
        """Whose turn it is."""
        return {"step": self._step} if self.source_mode == "alternate" else {}

    def load_state_dict(self, state: dict[str, Tensor]) -> None:
        """Go on with the model whose turn it was.

        Args:
            state: What `state_dict` gave.

        Raises:
            ValueError: If the state is of an objective with another mode.
        """
        if set(state) != set(self.state_dict()):
            raise ValueError(
                f"Expected the state {sorted(self.state_dict())!r} of `source_mode`={self.source_mode!r}, got "
                f"{sorted(state)!r}: the checkpoint is of a run with another mode."
            )
        if state:
            self._step = state["step"].clone()


def _check_settings(
    fca_weight: float | int, tse_weight: float | int, tse_clip: ClipGuide | None, source_mode: str
) -> None:
    check_number("fca_weight", fca_weight, least=0)
    check_number("tse_weight", tse_weight, least=0)
    if tse_weight and tse_clip is None:
        raise ValueError(
            f"Expected a CLIP for TSE with `tse_weight`={tse_weight!r}, got none. Pass "
            "`tse_clip=ClipGuide(clip, class_prompts)`, or `tse_weight=0`."
        )
    check_choice("source_mode", source_mode, SOURCE_MODES)


EPSILON = 1e-10
"""Added to the norm, as in the official code."""


class NormalizedGradient(torch.optim.Optimizer):
    """p <- p - lr * mask * g / (||g||_2 + 1e-10), with the norm over all entries of the gradient.

    The mask comes after the norm, so a prompt with a frozen centre takes steps shorter than the learning rate by the
    share of the gradient that lies in the centre. There is no momentum and no weight decay, hence no state.

    A step sees the gradient that backward passes left: summed over accumulated batches, averaged over processes, and
    unscaled by a gradient scaler. A factor on the loss changes nothing, as long as the gradient is above 1e-10.

    Args:
        params: Tensors to train, or parameter groups.
        lr: Step length in [0, 1] pixel units. Official: 10.
        masks: Entries that may move, 1 or 0, by parameter and of its shape; a parameter without a mask moves as a
            whole.

    Raises:
        ValueError: If the rate is negative, or a mask belongs to no trained parameter or has another shape.

    References:
        arXiv 2404.11207; official `transfer_cls.py`.
    """

    def __init__(
        self,
        params: Iterable[Tensor] | Iterable[dict[str, Any]],
        lr: float | int = 10.0,
        *,
        masks: Mapping[nn.Parameter, Tensor] | None = None,
    ) -> None:
        check_number("lr", lr, least=0)
        super().__init__(params, {"lr": lr})
        self.masks = dict(masks or {})
        trained = {parameter for group in self.param_groups for parameter in group["params"]}
        for parameter, mask in self.masks.items():
            if parameter not in trained or mask.shape != parameter.shape:
                raise ValueError(
                    "Expected each mask to belong to a trained parameter and to have its shape, got a mask of shape "
                    f"{tuple(mask.shape)} for a parameter of shape {tuple(parameter.shape)}, which is "
                    f"{'' if parameter in trained else 'not '}among `params`."
                )

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:
        """Move every parameter that has a gradient.

        Args:
            closure: Computes the loss and its gradients anew.

        Returns:
            What the closure gave, None without one.

        Raises:
            FloatingPointError: If a gradient is not finite: one such step would make every pixel NaN.
        """
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._move(parameter, group["lr"])
        return loss

    def _move(self, parameter: nn.Parameter, rate: float) -> None:
        gradient = parameter.grad.float()
        norm = torch.linalg.vector_norm(gradient)
        if not torch.isfinite(norm):
            raise FloatingPointError(
                f"Expected a finite gradient, got one of norm {float(norm)!r}. Use bf16 or float32 instead of fp16, "
                "or a loss scaler, which skips such steps."
            )
        direction = gradient / (norm + EPSILON)
        mask = self.masks.get(parameter)
        if mask is not None:
            direction = direction * mask.to(direction)
        parameter.sub_((rate * direction).to(parameter.dtype))


# Hyper-parameters of the official TVP code.
def preset_for(recipe: str = "cifar10") -> Preset:
    """An official preset: steps of length 10 on batches of 16, a cosine per epoch without warm-up.

    `"cifar10"` is the command of the official README, one epoch over all images with both weights; `"script"` what its
    training script does when nothing is given: ten epochs and no FCA or TSE, which is visual prompting.

    Args:
        recipe: `"cifar10"` or `"script"`.
    """
    recipes: dict[str, tuple[int, float, float]] = {"cifar10": (1, 0.005, 0.001), "script": (10, 0.0, 0.0)}
    check_choice("recipe", recipe, sorted(recipes))
    epochs, fca, tse = recipes[recipe]
    training: dict[str, Any] = {"learning_rate": 10.0, "per_device_train_batch_size": 16, "num_train_epochs": epochs}
    training |= {"warmup_epochs": 0, "weight_decay": 0.0}
    config: dict[str, Any] = {"canvas_size": 224, "border": 30, "shape": "border", "clamp": False}
    return Preset(config=config, objective={"fca_weight": fca, "tse_weight": tse}, training=training)


def recommended(run: RunSize) -> Preset:
    """Settings for a run without a preset: the README's, without TSE, whose CLIP no setting names.

    Args:
        run: Size of the run.
    """
    small: dict[str, Any] = {"shape": "full", "canvas_size": 2, "border": 0, "shrink": "none"}
    preset = run.recommend(preset_for("cifar10"), rate=0.3, batch=8, config=small)
    return Preset(config=preset.config, objective={**preset.objective, "tse_weight": 0.0}, training=preset.training)
