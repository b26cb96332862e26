"""Class features: equal to the model's own, cheap in memory, and never stale."""

from collections.abc import Callable
from dataclasses import dataclass, field
from threading import Thread

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from torch import nn
from transformers import CLIPModel, PreTrainedTokenizerBase

from peft_vlm.errors import AdapterError, ClassNameError
from peft_vlm.text import (
    ClassFeatureCache,
    ClassPrompts,
    encode_classes,
    reserve_slots,
    tokenize_classes,
    tokenize_for_model,
)
from tests.tiny import tiny_clip, tiny_siglip, tiny_tokenizer

NAMES = ["cat", "golden retriever", "hippopotamus", "bee", "ox"]


def prompts_of(
    names: list[str] = NAMES, template: str | tuple[str, ...] = "a photo of a {}.", **kwargs
) -> ClassPrompts:
    """Prompts of the tiny tokenizer."""
    return tokenize_classes(tiny_tokenizer(), names, template=template, **({"max_length": 40} | kwargs))


def lora(target: str = r".*(text|vision)_model.*(q|v)_proj") -> PeftModel:
    """Two LoRA adapters "default" and "other" with random weights on the given modules."""
    config = LoraConfig(target_modules=target, r=2, init_lora_weights=False)
    model = get_peft_model(tiny_clip(), config)
    model.add_adapter("other", config)
    return model.eval()


def test_features_equal_the_model_at_full_text_length() -> None:
    """Cutting the text to the longest prompt is exact for CLIP: later positions never count (1e-6: order of sums)."""
    model = tiny_clip()
    texts = [f"a photo of a {name}." for name in NAMES]
    full = tiny_tokenizer()(texts, padding="max_length", max_length=40, return_tensors="pt")
    with torch.no_grad():
        expected = model.get_text_features(**full).pooler_output
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(encode_classes(model, prompts_of()), expected, rtol=0, atol=1e-6)


def test_siglip_features_equal_the_model() -> None:
    """SigLIP pools the last position, so its prompts must come at full length."""
    model = tiny_siglip()
    prompts = prompts_of(max_length=24, template="a {}.", pad_to_max=True)
    with torch.no_grad():
        expected = model.get_text_features(input_ids=prompts.input_ids).pooler_output
    expected = expected / expected.norm(dim=-1, keepdim=True)
    torch.testing.assert_close(encode_classes(model, prompts), expected, rtol=0, atol=1e-6)


def test_templates_are_normalised_averaged_and_normalised_again() -> None:
    """Averaging unnormalised features would let the template with the largest norm win."""
    model, templates = tiny_clip(), ("a {}.", "the big {} over there!", "{}")
    single = torch.stack([encode_classes(model, prompts_of(template=template)) for template in templates])
    expected = nn.functional.normalize(single.mean(0), dim=-1)
    torch.testing.assert_close(encode_classes(model, prompts_of(template=templates)), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("chunk_size", [1, 4, 7, 1000])
def test_the_chunk_size_changes_nothing(chunk_size: int) -> None:
    """A chunk that ends inside a template must add to the right classes."""
    model, prompts = tiny_clip(), prompts_of(template=("a {}.", "the {}."))
    expected = encode_classes(model, prompts)
    torch.testing.assert_close(encode_classes(model, prompts, chunk_size=chunk_size), expected, rtol=0, atol=1e-6)


def test_encoding_leaves_no_trace_on_the_model() -> None:
    """Dropout in training mode would make the features random; a lost training mode would switch it off for good."""
    model = tiny_clip().train()
    model.vision_model.eval()
    features = encode_classes(model, prompts_of())
    assert not features.requires_grad
    assert features.dtype == torch.float32
    assert model.training
    assert not model.vision_model.training
    nn.Linear(16, 1)(features).sum().backward()  # an inference tensor would raise here


def test_prompts_of_another_tokenizer_are_refused() -> None:
    """HF's CLIP silently pools position 0 when no token equals its end-of-text id: all classes get one feature."""
    with pytest.raises(ClassNameError, match="no end-of-text token of this model"):
        encode_classes(tiny_clip(eos_token_id=500), prompts_of())
    config = tiny_clip().config
    config.text_config.vocab_size = 510
    with pytest.raises(ClassNameError, match="token id 513, the model's vocabulary has 510 tokens"):
        encode_classes(CLIPModel(config), prompts_of())


def with_added_tokens(*tokens: str, old: bool = True) -> tuple[CLIPModel, PreTrainedTokenizerBase]:
    """A CLIP whose vocabulary was enlarged, under the old rule that the highest id is the end of a text, or not."""
    model, tokenizer = tiny_clip(eos_token_id=2 if old else 513), tiny_tokenizer()
    tokenizer.add_tokens(list(tokens))
    embeddings = model.text_model.embeddings
    table = embeddings.token_embedding.weight.detach()
    new = 0.2 * torch.randn(len(tokens), table.shape[1], generator=torch.Generator().manual_seed(1))
    embeddings.token_embedding = nn.Embedding.from_pretrained(torch.cat([table, new]))
    model.config.text_config.vocab_size = len(tokenizer)
    return model, tokenizer


@pytest.mark.parametrize("template", ["<sks> {}", "{} <sks>", "a {} with a <sks> hat"])
def test_added_tokens_are_refused_where_they_would_end_the_text(template: str) -> None:
    """Words after an added token count for nothing there: "<sks> dog" and "<sks> cat" would get the same features."""
    model, tokenizer = with_added_tokens("<sks>")
    with pytest.raises(ClassNameError, match=r"'<sks>' with the id 514, above the end-of-text token \(513\)"):
        tokenize_for_model(model, tokenizer, ["dog", "cat"], template=template)


def test_prompts_that_a_model_does_not_read_to_their_end_are_refused() -> None:
    """`tokenize_classes` does not know the model; its prompts are checked where they meet it."""
    model, tokenizer = with_added_tokens("<sks>")
    prompts = tokenize_classes(tokenizer, ["dog", "cat"], template="<sks> {}", max_length=40)
    with pytest.raises(ClassNameError, match="reads prompt 0 only up to the token 514 at position 1; words follow"):
        encode_classes(model, prompts)
    with pytest.raises(ClassNameError, match="load it with the tokenizer's ids"):
        reserve_slots(model, prompts)


def test_added_tokens_work_where_the_end_token_is_named() -> None:
    """The usual case since 2023: the end of a text is an id of its own."""
    model, tokenizer = with_added_tokens("<sks>", old=False)
    features = encode_classes(model, tokenize_for_model(model, tokenizer, ["dog", "cat"], template="<sks> {}"))
    assert (features[0] - features[1]).abs().max() > 0.01


@pytest.mark.parametrize("old", [True, False])
def test_texts_without_added_tokens_are_read_under_both_rules(old: bool) -> None:
    """An enlarged vocabulary alone changes nothing."""
    model, tokenizer = with_added_tokens("<sks>", old=old)
    prompts = tokenize_for_model(model, tokenizer, NAMES, template="a {}.")
    expected = encode_classes(tiny_clip(), tokenize_for_model(tiny_clip(), tiny_tokenizer(), NAMES, template="a {}."))
    torch.testing.assert_close(encode_classes(model, prompts), expected, rtol=0, atol=1e-6)


@pytest.mark.parametrize("token", ["<|startoftext|>", "<|endoftext|>"])
@pytest.mark.parametrize("place", ["name", "template"])
def test_start_and_end_tokens_inside_a_text_are_refused(token: str, place: str) -> None:
    """The tower stops at an end token; a start token would be taken for a place of learned context."""
    names, template = (["cat", f"big {token} dog"], "a {}.") if place == "name" else (["cat"], f"a {token} {{}}.")
    with pytest.raises(ClassNameError, match=r"start or end token inside \(\['<\|startoftext\|>'.*reads nothing"):
        prompts_of(names, template)


def test_the_cache_computes_once() -> None:
    """The point of the cache; equal prompts made anew count as the same."""
    cache, model = ClassFeatureCache(), tiny_clip()
    first = cache.get(model, prompts_of())
    assert cache.get(model, prompts_of()) is first
    assert cache.get(model, prompts_of(), refresh=False) is first
    assert cache.num_computed == 1
    cache.clear()
    torch.testing.assert_close(cache.get(model, prompts_of(), refresh=False), first, rtol=0, atol=0)
    assert cache.num_computed == 2


def optimizer_step(optimizer: type[torch.optim.Optimizer], **kwargs) -> Callable[[PeftModel], None]:
    """One step on all trainable tensors; `fused=True` does not raise the tensors' version counters."""

    def step(model: PeftModel) -> None:
        parameters = [p for p in model.parameters() if p.requires_grad]
        for parameter in parameters:
            parameter.grad = torch.full_like(parameter, 1e-3)
        optimizer(parameters, lr=1e-3, **kwargs).step()

    return step


def edit(change: Callable[[torch.Tensor], object]) -> Callable[[PeftModel], None]:
    """Change the weight of the text tower's final norm, which the adapters do not touch."""

    def apply(model: PeftModel) -> None:
        with torch.no_grad():
            change(model.get_base_model().text_model.final_layer_norm.weight)

    return apply


def swap_tokens(model: PeftModel) -> None:
    """Exchange two rows of the token embedding: every plain sum stays as it was."""
    weight = model.get_base_model().text_model.embeddings.token_embedding.weight
    with torch.no_grad():
        weight[[66, 67]] = weight[[67, 66]]


CHANGES = {
    "sgd": (optimizer_step(torch.optim.SGD), "weights on the text side"),
    "fused adamw": (optimizer_step(torch.optim.AdamW, fused=True), "weights on the text side"),
    "in-place edit": (edit(lambda weight: weight[3].add_(1e-6)), "weights on the text side"),
    "edit behind autograd's back": (edit(lambda weight: weight.data.mul_(1.001)), "weights on the text side"),
    "exchanged rows": (swap_tokens, "weights on the text side"),
    "half precision": (lambda model: model.half(), "weights on the text side"),
    "set_adapter": (lambda model: model.set_adapter("other"), "another adapter is active"),
    "merge": (lambda model: model.merge_adapter(), "adapters were switched off, on or merged"),
}


@pytest.mark.parametrize("name", CHANGES)
def test_a_change_on_the_text_side_is_noticed(name: str) -> None:
    """Stale class features are the classic silent bug: the numbers look right and belong to older weights."""
    change, reason = CHANGES[name]
    cache, model, prompts = ClassFeatureCache(), lora(), prompts_of()
    before = cache.get(model, prompts)
    change(model)
    with pytest.raises(AdapterError, match=f"stale: .*{reason}.*refresh=True"):
        cache.get(model, prompts, refresh=False)
    after = cache.get(model, prompts)
    assert cache.num_computed == 2
    torch.testing.assert_close(after, encode_classes(model, prompts), rtol=0, atol=0)
    if name not in ("merge", "exchanged rows"):
        assert not torch.equal(before, after)


def test_disabling_the_adapter_is_noticed_and_undone() -> None:
    """`disable_adapter()` changes no tensor, only a flag on each layer."""
    cache, model, prompts = ClassFeatureCache(), lora(), prompts_of()
    adapted = cache.get(model, prompts)
    with model.disable_adapter():
        with pytest.raises(AdapterError, match="switched off"):
            cache.get(model, prompts, refresh=False)
        base = cache.get(model, prompts)
        torch.testing.assert_close(base, encode_classes(tiny_clip(), prompts), rtol=0, atol=0)
    torch.testing.assert_close(cache.get(model, prompts), adapted, rtol=0, atol=0)


def test_other_prompts_are_noticed() -> None:
    """The same names in another order or template are other classes."""
    cache, model = ClassFeatureCache(), tiny_clip()
    cache.get(model, prompts_of())
    with pytest.raises(AdapterError, match="class prompts changed"):
        cache.get(model, prompts_of(NAMES[::-1]), refresh=False)
    assert cache.get(model, prompts_of(NAMES[:2])).shape == (2, 16)


@dataclass(frozen=True, eq=False)
class InterruptedPrompts(ClassPrompts):
    """Prompts during whose comparison another thread asks the same cache for other classes."""

    interrupt: list[Callable[[], object]] = field(default_factory=list)

    def is_same(self, other: ClassPrompts) -> bool:
        """The comparison, after the other thread is done."""
        if self.interrupt:
            thread = Thread(target=self.interrupt.pop())
            thread.start()
            thread.join()
        return super().is_same(other)


def test_two_threads_get_the_features_of_their_own_classes() -> None:
    """The features of one thread's classes would give another thread labels of other names."""
    cache, model, mine, theirs = ClassFeatureCache(), tiny_clip(), prompts_of(NAMES[:2]), prompts_of(NAMES[2:])
    interrupted = InterruptedPrompts(**vars(mine))
    cache.get(model, interrupted)
    interrupted.interrupt.append(lambda: cache.get(model, theirs))
    torch.testing.assert_close(cache.get(model, mine), encode_classes(model, mine), rtol=0, atol=0)
    assert not interrupted.interrupt
    torch.testing.assert_close(cache.get(model, theirs), encode_classes(model, theirs), rtol=0, atol=0)


def test_vision_changes_do_not_count() -> None:
    """Training only the vision side must not encode the classes again at every evaluation."""
    cache, model = ClassFeatureCache(), lora(r".*vision_model.*(q|v)_proj")
    features = cache.get(model, prompts_of())
    optimizer_step(torch.optim.AdamW, fused=True)(model)
    with torch.no_grad():
        model.get_base_model().visual_projection.weight.mul_(2)
        model.get_base_model().logit_scale.add_(1)
    model.set_adapter("other")
    with model.disable_adapter():
        assert cache.get(model, prompts_of(), refresh=False) is features
    assert cache.num_computed == 1
