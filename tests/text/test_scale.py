"""Thousands of classes and candidate answers: bounded memory, and several processes give what one gives."""

import weakref
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import CLIPConfig, CLIPModel

from peft_vlm.data import question_inputs
from peft_vlm.distributed import process_index
from peft_vlm.text import Candidates, ClassPrompts, candidate_scores, encode_classes
from tests import forked
from tests.tiny import tiny_clip
from tests.tiny_questions import colour_questions, tiny_llava

#: Rounding of sums in another order and with other padding.
ROUNDING = 1e-5


class Peak(TorchDispatchMode):
    """Largest sum of the tensors that live at one time, each storage once."""

    def __init__(self) -> None:
        super().__init__()
        self.live: dict[int, int] = {}
        self.bytes = self.peak = 0

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.untyped_storage()._cdata not in given:
                size = tensor.untyped_storage().nbytes()
                self.bytes += size
                self.peak = max(self.peak, self.bytes)
                weakref.finalize(tensor.untyped_storage(), self.release, size)
        return result

    def release(self, size: int) -> None:
        """A storage is gone."""
        self.bytes -= size


def peak_apart_from(function: Callable[[], Tensor]) -> int:
    """Bytes of the largest moment, without the result."""
    with Peak() as peak:
        result = function()
    return peak.peak - result.nbytes


def prompts_of(count: int) -> ClassPrompts:
    """Prompts of six tokens; no class has the tokens of another."""
    ids = torch.tensor([[512, 9, 10 + c // 200 % 200, 10 + c % 200, 210 + c // 40_000, 513] for c in range(count)])
    return ClassPrompts(tuple(f"class {number}" for number in range(count)), ("{}",), ids)


def wide_clip() -> CLIPModel:
    """A CLIP of one wide text layer and few shared dimensions, where features are small beside activations."""
    tower = {"hidden_size": 128, "intermediate_size": 512, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {"vocab_size": 514, "max_position_embeddings": 8, "bos_token_id": 512, "eos_token_id": 513}
    config = CLIPConfig(text_config=tower | text, vision_config=tower | {"image_size": 8, "patch_size": 8})
    return CLIPModel(config).eval()


def candidates_of(count: int) -> Candidates:
    """Answers of one to four tokens of the tiny vocabulary."""
    rows = tuple((5 + c % 20, 5 + c // 20 % 20, 5 + c // 400, 30)[: 1 + (c % 4 or 3)] for c in range(count))
    return Candidates(tuple(f"answer {number}" for number in range(count)), rows, include_end=False)


def test_22_thousand_classes_take_the_memory_of_a_tenth() -> None:
    """Features of ImageNet-21K must fit where those of 2,200 classes do; only the result grows."""
    model = wide_clip()
    prompts = [prompts_of(count) for count in (2_200, 22_000)]
    few, many = (peak_apart_from(lambda p=p: encode_classes(model, p)) for p in prompts)
    assert many < 1.1 * few


def test_a_thousand_candidates_take_the_memory_of_a_hundred() -> None:
    """A question with 1,000 answers must not need ten times the keys and values."""
    questions, model = colour_questions(), tiny_llava()
    inputs = question_inputs(questions.collate([questions[0], questions[1]]))
    few, many = (
        peak_apart_from(lambda c=c: candidate_scores(model, inputs, candidates_of(c), chunk_size=64))
        for c in (100, 1_000)
    )
    assert many < 1.1 * few


def write_parts(folder: str) -> None:
    """Class features and candidate scores, computed by all processes together."""
    torch.distributed.init_process_group("gloo")
    questions = colour_questions()
    inputs = question_inputs(questions.collate([questions[0], questions[1]]))
    scores = candidate_scores(tiny_llava(), inputs, candidates_of(101), chunk_size=32, divide=True)
    features = encode_classes(tiny_clip(), prompts_of(333), chunk_size=32, divide=True)
    torch.save((features, scores), Path(folder) / f"{process_index()}.pt")
    torch.distributed.destroy_process_group()


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
def test_processes_that_divide_classes_and_candidates_give_what_one_gives(tmp_path: Path) -> None:
    """A part that is lost, repeated or put in another's place would shift all labels behind it."""
    questions = colour_questions()
    inputs = question_inputs(questions.collate([questions[0], questions[1]]))
    scores = candidate_scores(tiny_llava(), inputs, candidates_of(101))
    features = encode_classes(tiny_clip(), prompts_of(333))
    forked.run_group(tmp_path, write_parts, str(tmp_path))
    for number in range(2):
        parts = torch.load(tmp_path / f"{number}.pt", weights_only=True)
        torch.testing.assert_close(parts[0], features, rtol=0, atol=ROUNDING)
        torch.testing.assert_close(parts[1], scores, rtol=0, atol=ROUNDING)
