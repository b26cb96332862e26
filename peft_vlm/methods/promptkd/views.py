"""Features of the student, and the alignment of its projector on stored views before training."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float
from torch import Tensor, nn

from peft_vlm.data.feature_store import ViewCache
from peft_vlm.distributed import apart, progress_bar
from peft_vlm.methods.promptkd.model import Projector
from peft_vlm.models.towers import towers_of
from peft_vlm.text.class_features import evaluation_mode


@torch.no_grad()
def student_features(
    model: nn.Module, pixel_values: Float[Tensor, "batch channels rows cols"]
) -> Float[Tensor, "batch width"]:
    """What enters the projector: the student's own image features, not normalised, in float32, in evaluation mode.

    Args:
        model: Student with an active PromptKD adapter.
        pixel_values: Pixels of a batch.
    """
    towers = towers_of(model)
    outputs: list[Tensor] = []
    hook = projector_of(model).base_layer.register_forward_hook(lambda *call: outputs.append(call[2]))
    try:
        with evaluation_mode(towers.model):
            towers.finish_image(towers.embed_image(pixel_values), 0)
    finally:
        hook.remove()
    return outputs[0].float()


def projector_of(model: nn.Module) -> Projector:
    """The projector layer of a student."""
    layer = towers_of(model).vision_head
    assert isinstance(layer, Projector), "the objective checks for a PromptKD adapter first"
    return layer


def align_projector(
    projector: Projector,
    loss_of: Callable[[Float[Tensor, "batch width"], Float[Tensor, "batch teacher_dim"]], Tensor],
    cache: ViewCache,
    *,
    steps: int,
    learning_rate: float | int,
    batch_size: int = 32,
) -> float:
    """Train the projector alone on stored features: seconds, where the student's tower would take minutes.

    A random projector sends large, wrong gradients into the prompts; this is over before they start to learn. SGD
    with momentum 0.9 and a cosine; the order of the images is that of seed 0, so every process gets the same result.

    Args:
        projector: The student's projector; its active adapter is trained.
        loss_of: Loss from the student's and the teachers' stored features.
        cache: All views, each row with the teachers' columns and then the student's.
        steps: Optimizer steps at least; the last pass over the images is finished. Pass p uses view p modulo their
            number.
        learning_rate: Initial rate.
        batch_size: Images per step.

    Returns:
        Mean loss of the last pass.
    """
    rows, width = cache.store.rows, int(projector.base_layer.out_features)
    assert rows is not None, "`ViewCache.fill` comes first"
    parameters = [p for p in projector.parameters() if p.requires_grad]
    optimizer = torch.optim.SGD(parameters, lr=learning_rate, momentum=0.9, weight_decay=5e-4)
    views = cache.num_views or 1
    generator, images = torch.Generator().manual_seed(0), len(rows) // views
    passes = math.ceil(steps / math.ceil(images / batch_size))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=passes)
    training, device, losses = projector.training, parameters[0].device, [0.0]
    projector.train()
    with torch.enable_grad(), apart():
        for number in progress_bar(range(passes), desc="Aligning the projector", leave=False):
            losses = []
            order = torch.randperm(images, generator=generator) + number % views * images
            for index in order.split(batch_size):
                batch = rows[index].to(device)
                loss = loss_of(projector.project(batch[:, -width:]), batch[:, :-width])
                optimizer.zero_grad()
                loss.backward()
                optimizer.step()
                losses.append(float(loss.detach()))
            schedule.step()
    optimizer.zero_grad()
    projector.train(training)
    return sum(losses) / len(losses)
