"""How often the student says what the teacher says, apart for the classes that were seen and those that were not."""

from collections.abc import Sequence

import torch
from jaxtyping import Bool, Float
from torch import Tensor

from peft_vlm.distributed import sum_over_processes
from peft_vlm.errors import ClassNameError
from peft_vlm.text.prompts import readable


class Agreement:
    """Counts of one epoch, over the batches of all processes. The teacher's class decides whether an image counts as
    seen.

    Args:
        class_names: Classes in label order.
        seen_classes: Names of the classes with training labels at some stage; None: all.

    Raises:
        ClassNameError: If a seen class is none of the classes.
    """

    def __init__(self, class_names: Sequence[str], seen_classes: Sequence[str] | None) -> None:
        names = [readable(name) for name in class_names]
        seen = set(names) if seen_classes is None else {readable(name) for name in seen_classes}
        if seen - set(names):
            raise ClassNameError(
                f"Expected `seen_classes` out of the {len(names)} classes of the prompts, got "
                f"{sorted(seen - set(names))[:3]!r} too."
            )
        self.seen: Bool[Tensor, " classes"] = torch.tensor([name in seen for name in names])
        self.epoch = -1
        self.counts = torch.zeros(2, 2, dtype=torch.long)

    def start(self, epoch: int) -> None:
        """Begin an epoch anew, unless it is the one whose counts were restored."""
        if epoch != self.epoch:
            self.epoch = epoch
            self.counts = torch.zeros(2, 2, dtype=torch.long)

    def add(self, student: Float[Tensor, "batch classes"], teacher: Float[Tensor, "batch classes"]) -> None:
        """Count a batch; with several processes the batch of each, so all of them must call it.

        The sum is formed here and not at the end of the epoch, so that a checkpoint of the first process, which is
        the only one that is written, holds the counts of all.

        Args:
            student: Logits of the student.
            teacher: Logits of the teacher.
        """
        chosen = teacher.argmax(dim=-1)
        same = student.detach().argmax(dim=-1) == chosen
        group = (~self.seen.to(chosen.device)[chosen]).long()  # 0 seen, 1 unseen
        rows = [torch.stack([(same & (group == g)).sum(), (group == g).sum()]) for g in (0, 1)]
        self.counts = self.counts.to(chosen.device) + sum_over_processes(torch.stack(rows))

    def metrics(self) -> dict[str, float]:
        """Agreement in percent of the groups that had images."""
        counts = self.counts.tolist()
        return {
            f"agreement_{name}": 100.0 * same / total
            for name, (same, total) in zip(("seen", "unseen"), counts, strict=True)
            if total
        }
