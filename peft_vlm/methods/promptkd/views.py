"""Features of fixed augmented views, computed once; and the projector's alignment on them before training."""

import math
from collections.abc import Callable

import torch
from jaxtyping import Float, Int
from torch import Tensor, nn
from tqdm.auto import tqdm

from peft_vlm.data.dataset import ImageClassificationDataset
from peft_vlm.data.feature_store import RowStore, divided_pass
from peft_vlm.distributed import apart
from peft_vlm.methods.promptkd.model import Projector
from peft_vlm.models.towers import towers_of
from peft_vlm.text.class_features import evaluation_mode

#: Pixels of a batch -> a row of features per image.
Encoder = Callable[[Float[Tensor, "batch channels rows cols"]], Float[Tensor, "batch dim"]]


class ViewCache:
    """Features of a fixed number of augmented views per image; view v is the augmentation of epoch v.

    Each view is computed in one pass over the dataset, in its order, so that a resumed run computes the same numbers.

    Args:
        num_views: Views per image.
        store: Where the features are kept.
        batch_size: Images per forward pass.
        num_workers: Processes that read images.
    """

    def __init__(self, num_views: int, store: RowStore, *, batch_size: int, num_workers: int) -> None:
        self.num_views, self.store = num_views, store
        self.batch_size, self.num_workers = batch_size, num_workers
        self._filled: set[int] = set()
        self._offset = 0
        self._owners: tuple[object, ...] = ()

    def bind(self, *owners: object) -> None:
        """Forget what was stored for other images or models.

        Args:
            *owners: Dataset and models that the features come from.
        """
        if len(owners) != len(self._owners) or any(a is not b for a, b in zip(owners, self._owners, strict=True)):
            self._filled.clear()
            self._owners = owners

    def start_epoch(
        self, encode: Encoder, dataset: ImageClassificationDataset, epoch: int, *, device: torch.device
    ) -> None:
        """Choose the epoch's view, and compute its features the first time it comes.

        Args:
            encode: Features of a batch.
            dataset: Training images that repeat their views; its epoch is set.
            epoch: Number of the epoch, from 0.
            device: Where `encode` runs.
        """
        view = epoch % self.num_views
        self._offset = view * len(dataset)
        if view in self._filled:
            return
        loader = divided_pass(dataset, batch_size=self.batch_size, num_workers=self.num_workers)
        progress = tqdm(loader, desc=f"Features of view {view + 1} of {self.num_views}", leave=False)
        for batch in progress:
            with torch.no_grad():
                features = encode(batch["pixel_values"].to(device))
            self.store.allocate((self.num_views * len(dataset), features.shape[-1]), features.dtype)
            self.store.write(batch["index"] + self._offset, features)
            size = self.num_views * len(dataset) * features.shape[-1] * features.element_size() / 2**20
            progress.set_postfix_str(f"{size:.1f} MB in {self.store.storage}")
        self.store.complete()
        self._filled.add(view)

    def fill(self, encode: Encoder, dataset: ImageClassificationDataset, *, device: torch.device) -> None:
        """Compute the features of every view now; the dataset keeps its epoch.

        Args:
            encode: Features of a batch.
            dataset: Training images that repeat their views.
            device: Where `encode` runs.
        """
        epoch = dataset.epoch
        for view in range(self.num_views):
            dataset.set_epoch(view)
            self.start_epoch(encode, dataset, view, device=device)
        dataset.set_epoch(epoch)
        self._offset = epoch % self.num_views * len(dataset)

    def read(self, index: Int[Tensor, " batch"]) -> Float[Tensor, "batch dim"]:
        """Features of some images in this epoch's view.

        Args:
            index: Positions in the dataset.
        """
        return self.store.read(index + self._offset, index.device)


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
    generator, images = torch.Generator().manual_seed(0), len(rows) // cache.num_views
    passes = math.ceil(steps / math.ceil(images / batch_size))
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, T_max=passes)
    training, device, losses = projector.training, parameters[0].device, [0.0]
    projector.train()
    with torch.enable_grad(), apart():
        for number in tqdm(range(passes), desc="Aligning the projector", leave=False):
            losses = []
            order = torch.randperm(images, generator=generator) + number % cache.num_views * images
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
