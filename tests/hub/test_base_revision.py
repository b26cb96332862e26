"""The revision of the base model that an adapter records is the one that is loaded, in all its parts."""

import json
import tempfile
from pathlib import Path

import pytest
from peft import get_peft_model
from transformers import CLIPModel

from peft_vlm import CoOpConfig, PromptedClassifier, publish
from peft_vlm.evaluation.report import EvalReport
from peft_vlm.evaluation.run import load_model
from tests.cases import processor
from tests.hub.adapters import BASE, SKIP_TUNING, evaluate, put_base_model, write_images
from tests.hub.storage import File
from tests.tiny import clip_processor, noise_image, tiny_clip


@pytest.fixture
def first(hub) -> str:
    """Commit of a base model whose main branch moved on: other weights, another image size, no tokenizer."""
    put_base_model(hub)
    repository = hub.repositories["model", BASE]
    before = repository.branches["main"][-1]
    with tempfile.TemporaryDirectory() as folder:
        tiny_clip(seed=9).save_pretrained(folder)
        clip_processor(size=32).save_pretrained(folder)
        files = {p.name: File(p.read_bytes(), p.suffix == ".safetensors") for p in Path(folder).iterdir()}
    repository.commit("main", "another model", files)
    return before.oid


@pytest.fixture
def adapter(first, tmp_path) -> Path:
    """An adapter made on the first commit, with the image preparation of its training."""
    config = SKIP_TUNING.config(init_weights=False)
    config.class_names, config.template = ["red", "orange", "yellow", "green", "blue", "purple"], "a {}."
    images = processor().image_processor
    config.image_mean, config.image_std, config.image_size = list(images.image_mean), list(images.image_std), [16, 16]
    model = get_peft_model(CLIPModel.from_pretrained(BASE, revision=first), config, revision=first)
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


def test_model_tokenizer_and_processor_are_of_the_recorded_revision(adapter, first):
    """The main branch may have moved on: its weights give other labels, and here it has no tokenizer at all."""
    loaded = load_model(adapter)
    assert loaded.base_revision == first
    by_hand = load_model(adapter, base_model=BASE, base_revision=first)
    pictures = [noise_image(20, 30, seed=seed) for seed in range(3)]
    expected = PromptedClassifier(
        by_hand.model, by_hand.tokenizer, by_hand.image_processor, class_names=by_hand.class_names, template="a {}."
    ).predict(pictures)
    assert PromptedClassifier.from_pretrained(adapter).predict(pictures) == expected
    assert PromptedClassifier.from_pretrained(adapter, base_model=BASE).predict(pictures) == expected


def test_the_baseline_of_an_evaluation_is_the_recorded_revision(adapter, tmp_path):
    """A gain over another model's zero-shot accuracy would be no gain of the adapter."""
    evaluate(adapter, write_images(tmp_path / "colours"))
    reports = [EvalReport.load(adapter / f"{name}.json") for name in ("report", "zero_shot")]
    assert [report.model for report in reports] == [BASE, BASE]


def test_words_of_a_context_are_read_by_the_recorded_tokenizer(first):
    """The main branch here has no tokenizer, so that asking it fails; another one would give other words."""
    config = {"context_init": "a photo", "num_text_tokens": 2}
    model = get_peft_model(CLIPModel.from_pretrained(BASE, revision=first), CoOpConfig(**config), revision=first)
    assert len(model.active_peft_config.context_init_ids) == 6, "the tiny tokenizer has a token per letter"
    with pytest.raises(ValueError, match="has no tokenizer to read them"):
        get_peft_model(CLIPModel.from_pretrained(BASE, revision=first), CoOpConfig(**config))


def test_a_revision_is_published_with_its_own_base_model_only(adapter, hub, first):
    """Under another name the same revision is another model, or none."""
    for base, revision in ((BASE, first), ("me/other", None)):
        publish(adapter, "me/adapter", license="mit", base_model=base, incomplete=True)
        files = hub.repositories["model", "me/adapter"].files
        config = json.loads(files["adapter_config.json"])
        assert (config["base_model_name_or_path"], config["revision"]) == (base, revision)
