"""Token ids of very many class prompts, without padding, and the rows of a few of them."""

import torch
from jaxtyping import Int
from torch import Tensor

from peft_vlm.text.prompts import ClassPrompts


class CompactPrompts:
    """Class prompts end to end, 4 bytes a token: 22,000 classes take about a megabyte.

    Args:
        prompts: Prompts with one template, slots reserved.
        lengths: Tokens of each prompt, the end of text included.
    """

    def __init__(self, prompts: ClassPrompts, lengths: Int[Tensor, " prompts"]) -> None:
        ids = prompts.input_ids
        self.lengths = lengths.cpu()
        self._starts = self.lengths.cumsum(0) - self.lengths
        self._ids = ids[torch.arange(ids.shape[1]) < self.lengths[:, None]].to(torch.int32)

    def rows(self, classes: Int[Tensor, " kept"]) -> Int[Tensor, "kept tokens"]:
        """Token ids of some classes, cut to the longest of them; behind its end a row repeats its last token.

        Args:
            classes: Positions of the classes, on the CPU.
        """
        lengths = self.lengths[classes]
        within = torch.arange(int(lengths.max()))[None].minimum(lengths[:, None] - 1)
        return self._ids[self._starts[classes][:, None] + within].long()
