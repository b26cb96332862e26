"""The cache of keys and values has one name, whatever the version of transformers."""

import torch

from peft_vlm.models.towers import CACHE_NAME
from tests.source_tree import PACKAGE, python_modules
from tests.tiny_questions import tiny_llava


def test_a_model_gives_and_takes_its_cache_by_this_name() -> None:
    """The old name still works in transformers 5.24, with a warning on every call, and ends in 5.40."""
    model = tiny_llava().eval()
    question, answer = torch.tensor([[3, 4, 5]]), torch.tensor([[6, 7]])
    with torch.no_grad():
        cache = getattr(model(input_ids=question, use_cache=True), CACHE_NAME)
        continued = model(input_ids=answer, **{CACHE_NAME: cache}).logits
        whole = model(input_ids=torch.cat([question, answer], dim=1)).logits
    assert torch.allclose(continued, whole[:, 3:], atol=1e-5)


def test_no_other_file_spells_the_name() -> None:
    """A second spelling would break with one end of the range of versions, and only there."""
    modules = python_modules(PACKAGE)
    assert len(modules) > 50
    assert [module.path for module in modules if "past_key_values" in module.text] == ["peft_vlm/models/towers.py"]
