"""ATPrompt beside its parity: layouts, presets, and what is refused."""

import json
import pickle

import pytest
import torch
from peft import PeftModel, get_peft_model
from safetensors.torch import load_file
from torch.testing import assert_close

from peft_vlm import ATPromptObjective, CoCoOpConfig, CoOpConfig, MaPLeConfig, PromptedClassifier, PromptSRCConfig
from peft_vlm.adapters.config import read_config
from peft_vlm.adapters.learned_tokens import ATTRIBUTE_STD, INIT_STD
from peft_vlm.conversion.formats import export
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.errors import AdapterError, ClassNameError
from peft_vlm.methods.atprompt import ATTRIBUTES, preset_for, search_attributes
from peft_vlm.methods.maple import fold
from peft_vlm.models.packed_texts import passes
from peft_vlm.models.towers import image_features, towers_of
from peft_vlm.text import encode_classes, reserve_slots, tokenize_classes
from tests.cases import WORD_A, class_prompts, images, perturb, pixels, processor
from tests.tiny import CONTEXT_LENGTH, clip_processor, tiny_clip, tiny_tokenizer

PHOTO = tiny_tokenizer()("photo", add_special_tokens=False)["input_ids"]
DEEP = {
    "maple": (MaPLeConfig, {"depth": 3}),
    "promptsrc": (PromptSRCConfig, {"text_depth": 3, "vision_depth": 2, "num_vision_tokens": 2}),
}


def words(**settings):
    """Two vectors, "photo"; one vector, "a"; two vectors."""
    own = {"num_text_tokens": 2, "attribute_ids": [PHOTO, WORD_A], "num_attribute_tokens": [2, 1]}
    return own | {"context_init": None} | settings


def adapted(config=None):
    """The tiny CLIP with an adapter that has been moved."""
    torch.manual_seed(0)
    model = get_peft_model(tiny_clip(), config or CoOpConfig(**words()))
    perturb(model)
    return model.eval()


def test_prompts_are_vectors_word_vectors_word_context_and_class():
    """A word in the wrong place, or one that is trained, would still give numbers."""
    model = adapted()
    layer, prompts = towers_of(model).token_embedding, reserve_slots(model, class_prompts())
    rows, table = layer(prompts.input_ids)[0], layer.base_layer.weight
    vectors = model.get_parameter(f"base_model.model.{layer_name(model)}.coop_prompt.default")
    count = len(PHOTO)
    assert vectors.shape[0] == 5
    expected = torch.cat([vectors[:2], table[PHOTO], vectors[2:3], table[WORD_A], vectors[3:]])
    assert torch.equal(rows[1 : 7 + count - 1 + len(WORD_A)], expected)
    rows.sum().backward()
    assert table.grad is None
    assert vectors.grad is not None


def layer_name(model) -> str:
    """Name of the token embedding in the base model."""
    return next(n for n, m in model.get_base_model().named_modules() if m is towers_of(model).token_embedding)


def test_vectors_of_attributes_start_smaller_than_the_context():
    """The official code draws them with half the deviation."""
    torch.manual_seed(0)
    config = CoOpConfig(**words(num_text_tokens=8, num_attribute_tokens=[8, 8]))
    vectors = towers_of(get_peft_model(tiny_clip(), config)).token_embedding.prompts["default"]
    assert vectors[:16].std().item() == pytest.approx(ATTRIBUTE_STD, rel=0.15)
    assert vectors[16:].std().item() == pytest.approx(INIT_STD, rel=0.2)


def test_a_template_gives_its_initial_words_to_the_context_alone():
    """Words of the template that stayed would stand twice in the prompt."""
    model = get_peft_model(tiny_clip(), CoOpConfig(**words(context_init_ids=PHOTO)))
    spelled = tokenize_classes(tiny_tokenizer(), ["red"], template="photo {}.", max_length=CONTEXT_LENGTH)
    plain = tokenize_classes(tiny_tokenizer(), ["red"], template="{}.", max_length=CONTEXT_LENGTH)
    assert torch.equal(reserve_slots(model, spelled).input_ids, reserve_slots(model, plain).input_ids)
    table, layer = towers_of(model).token_embedding.base_layer.weight, towers_of(model).token_embedding
    assert torch.equal(layer.own_context("default"), table[PHOTO])


@pytest.mark.parametrize("kind", DEEP)
def test_deep_prompts_replace_the_context_alone(kind):
    """Attribute words and vectors flow on: a layer's output changes with them only through what it was given."""
    config, own = DEEP[kind]
    model = adapted(config(**words(**own)))
    layer, before = towers_of(model).text_layers[1], 3 + len(PHOTO) + len(WORD_A)
    hidden = torch.randn(2, 14, model.config.text_config.hidden_size)
    entered = layer.enter(hidden)
    assert torch.equal(entered[:, : 1 + before], hidden[:, : 1 + before])
    assert torch.equal(entered[:, 3 + before :], hidden[:, 3 + before :])
    assert torch.equal(entered[0, 1 + before : 3 + before], layer.prompts["default"])


@pytest.mark.parametrize("kind", DEEP)
def test_packed_prompts_give_the_same_features(kind):
    """Prompts that share less than a layer replaces must not run packed."""
    config, own = DEEP[kind]
    model = adapted(config(**words(**own)))
    prompts, towers = reserve_slots(model, class_prompts()), towers_of(model)
    plain = towers.pool_text(towers.run_text(towers.embed_text(prompts.input_ids), 0), prompts.input_ids)
    passes.clear()
    features = encode_classes(model, class_prompts())
    assert passes["packed"] == 1
    assert_close(features, torch.nn.functional.normalize(plain, dim=-1).detach(), rtol=0, atol=1e-5)


@pytest.mark.parametrize("config", [CoOpConfig, CoCoOpConfig, MaPLeConfig, PromptSRCConfig])
def test_saved_and_loaded(config, tmp_path):
    """Words are ids in the configuration, no tensors in the file; a file with other vectors is refused before."""
    own = {MaPLeConfig: {"depth": 2}, PromptSRCConfig: DEEP["promptsrc"][1]}.get(config, {})
    model = adapted(config(**words(**own)))
    model.save_pretrained(tmp_path)
    for low_memory in (False, True):
        again = PeftModel.from_pretrained(tiny_clip(), tmp_path, low_cpu_mem_usage=low_memory)
        assert again.active_peft_config.before == model.active_peft_config.before
        layers = [pickle.loads(pickle.dumps(towers_of(m).token_embedding)) for m in (again, model)]
        vectors = [layer.with_words("default", layer.prompts["default"]) for layer in layers]
        assert torch.equal(*vectors)
    entrance = [t for n, t in load_file(tmp_path / "adapter_model.safetensors").items() if "embeddings.token" in n]
    assert max(len(t) for t in entrance if t.ndim == 2) >= 5
    file = tmp_path / "adapter_config.json"
    file.write_text(file.read_text().replace('"num_text_tokens": 2', '"num_text_tokens": 3'))
    with pytest.raises(AdapterError, match="by the configuration, got"):
        PeftModel.from_pretrained(tiny_clip(), tmp_path)


def test_folding_keeps_the_outputs_of_both_towers(tmp_path):
    model = adapted(MaPLeConfig(**words(depth=2)))
    fold(model, tmp_path / "folded")
    folded = PeftModel.from_pretrained(tiny_clip(), tmp_path / "folded").eval()
    assert read_config(tmp_path / "folded").attribute_ids == [PHOTO, WORD_A]
    assert_close(encode_classes(folded, class_prompts()), encode_classes(model, class_prompts()), rtol=0, atol=1e-6)
    assert_close(image_features(folded, pixels()), image_features(model, pixels()), rtol=0, atol=1e-5)


def test_new_names_classify_with_a_tokenizer_that_reads_the_words(tmp_path):
    """Words are read by the tokenizer beside the base model, as a user writes them."""
    tiny_clip().save_pretrained(tmp_path)
    tiny_tokenizer().save_pretrained(tmp_path)
    base = type(tiny_clip()).from_pretrained(tmp_path)
    model = get_peft_model(base, CoOpConfig(attributes=["photo", "a"], num_text_tokens=1)).eval()
    config, tools = model.active_peft_config, processor()
    assert config.attribute_ids == [PHOTO, WORD_A]
    assert config.num_attribute_tokens == [1, 1]
    classifier = PromptedClassifier(model, tools.tokenizer, tools.image_processor, template="{}.")
    found = classifier.predict(images(per_class=1).image(0), class_names=["quite", "new"])
    assert {prediction.label for prediction in found} == {"quite", "new"}
    with pytest.raises(ValueError, match=r"knows, got '<\|endoftext\|>'.*Take another word"):
        get_peft_model(type(base).from_pretrained(tmp_path), CoOpConfig(attributes=["<|endoftext|>"]))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"attributes": []}, "to be words"),
        ({"attributes": ["color", " "]}, "to be words"),
        ({"attributes": "color"}, "`attributes` to be"),
        ({"attributes": ["color"], "num_attribute_tokens": [2, 2]}, "one entry for each attribute"),
        ({"attribute_ids": [[]]}, "at least one token id"),
        ({"attribute_ids": [[5]], "num_attribute_tokens": [-1]}, "0 or more"),
        ({"num_attribute_tokens": [2]}, "without `attributes`"),
        ({"attributes": ["color"], "class_position": "middle"}, "'end' of a context with `attributes`"),
        ({"attributes": ["color"], "network": "lstm"}, "leave one out"),
    ],
)
def test_impossible_settings_are_refused(settings, message):
    with pytest.raises((ValueError, TypeError), match=message):
        CoOpConfig(**settings)


def test_words_that_the_base_model_cannot_have_are_refused():
    with pytest.raises(AdapterError, match="`attribute_ids` below"):
        get_peft_model(tiny_clip(), CoOpConfig(**words(attribute_ids=[[99_999], WORD_A])))
    with pytest.raises(ValueError, match="no tokenizer to read them. Pass their token ids as `attribute_ids`"):
        get_peft_model(tiny_clip(), CoOpConfig(attributes=["color"]))


def test_prompts_that_get_too_long_are_refused(tmp_path):
    with pytest.raises(ValueError, match="fit into .* tokens, the limit of the text tower, got"):
        get_peft_model(tiny_clip(), CoOpConfig(**words(num_attribute_tokens=[CONTEXT_LENGTH, 1])))
    most = CONTEXT_LENGTH - len(PHOTO) - len(WORD_A) - 1
    model = get_peft_model(tiny_clip(), CoOpConfig(**words(num_attribute_tokens=[most, 1])))
    with pytest.raises(ClassNameError, match="the limit of the text tower"):
        encode_classes(model, class_prompts())


def test_a_strangers_number_of_vectors_asks_for_no_memory(tmp_path):
    """A list of a billion places would be made before the file is compared with the configuration."""
    adapted().save_pretrained(tmp_path)
    file = tmp_path / "adapter_config.json"
    values = json.loads(file.read_text()) | {"num_attribute_tokens": [10**12, 1]}
    file.write_text(json.dumps(values))
    with pytest.raises(AdapterError, match="by the configuration, got"):
        PeftModel.from_pretrained(tiny_clip(), tmp_path)


def test_an_adapter_without_words_is_not_trained_as_one():
    """A run that ended as plain CoOp would be published as ATPrompt."""
    model = get_peft_model(tiny_clip(), CoOpConfig(num_text_tokens=2))
    with pytest.raises(ValueError, match="with attribute words, got 'CoOpConfig' without"):
        ATPromptObjective(class_prompts()).prepare(model, images())


def test_official_files_of_the_other_methods_cannot_hold_the_words(tmp_path):
    for config, own in ((CoCoOpConfig, {}), (CoOpConfig, {}), *DEEP.values()):
        with pytest.raises(AdapterError, match="has no place for them"):
            export(adapted(config(**words(**own))), tmp_path / "model.pth.tar-1")
    assert not list(tmp_path.iterdir())


def test_presets_are_those_of_the_repository():
    assert len(ATTRIBUTES) == 11
    assert preset_for("dtd").config == {
        "attributes": ["pattern", "color", "design"],
        "num_text_tokens": 4,
        "context_init": None,
    }
    assert preset_for("eurosat", base="cocoop").config["num_text_tokens"] == 6
    assert preset_for("eurosat", base="maple").training["num_train_epochs"] == 10
    assert preset_for("ucf101", base="maple").config["num_text_tokens"] == 2
    assert preset_for(protocol="cross_dataset").training["num_train_epochs"] == 10
    with pytest.raises(ValueError, match="got 'mnist'"):
        preset_for("mnist")


def test_a_search_weighs_all_combinations_and_is_the_same_again():
    """A search that depended on the order of earlier calls would give other words to the next user."""
    plain = images().with_transform(EvalTransform(clip_processor()))
    train, validation = plain.select(range(0, len(plain), 2)), plain.select(range(1, len(plain), 2))
    ids = [[PHOTO], [WORD_A], [PHOTO, WORD_A]]
    found = [
        search_attributes(
            tiny_clip(), class_prompts(), ["photo", "a"], train, validation, epochs=3, batch_size=8, attribute_ids=ids
        )
        for _ in range(2)
    ]
    assert found[0] == found[1]
    assert set(found[0]) == {("photo",), ("a",), ("photo", "a")}
    assert sum(found[0].values()) == pytest.approx(1.0)
    assert list(found[0].values()) == sorted(found[0].values(), reverse=True)
    assert len(set(found[0].values())) == 3
