"""`PromptedClassifier`: from an adapter folder to labels, with every kind of image and every way it can fail."""

import json
import socket
import sys
import threading
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from peft import LoraConfig, get_peft_model
from PIL import Image

from peft_vlm import SkipTuningConfig
from peft_vlm.classifier import Prediction, PromptedClassifier
from peft_vlm.errors import AdapterError, ClassNameError, DataError
from tests.tiny import clip_processor, noise_image, tiny_clip, tiny_siglip, tiny_tokenizer

NAMES = ["cat", "golden retriever", "hippopotamus", "bee"]


@pytest.fixture(autouse=True)
def _no_network(monkeypatch: pytest.MonkeyPatch) -> None:
    """Folders must be enough; any attempt to connect fails the test."""
    monkeypatch.setattr("huggingface_hub.constants.HF_HUB_OFFLINE", False)

    def refuse(*args: object, **kwargs: object) -> None:
        raise AssertionError("the network was used")

    for name in ("create_connection", "getaddrinfo"):
        monkeypatch.setattr(socket, name, refuse)
    monkeypatch.setattr(socket.socket, "connect", refuse)


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base model with tokenizer and image processor, in a folder whose name has spaces."""
    folder = tmp_path_factory.mktemp("models") / "tiny clip \u00fc"
    tiny_clip().save_pretrained(folder)
    tiny_tokenizer().save_pretrained(folder)
    clip_processor().save_pretrained(folder)
    return folder


@pytest.fixture(scope="module")
def adapter(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A Skip Tuning adapter with random weights, class names and template, as the trainer leaves it."""
    return save_adapter(base, tmp_path_factory.mktemp("adapters") / "skip")


def save_adapter(base: Path, folder: Path, **changes: object) -> Path:
    """Save an adapter; `changes` overwrite entries of its configuration file."""
    processor = clip_processor()
    config = SkipTuningConfig(
        start_layer=2, init_weights=False, class_names=NAMES, template="a photo of a {}.",
        image_mean=list(processor.image_mean), image_std=list(processor.image_std), image_size=[16, 16],
    )  # fmt: skip
    torch.manual_seed(0)
    model = tiny_clip()
    model.name_or_path = str(base)
    model = get_peft_model(model, config)
    model.save_pretrained(folder)
    path = folder / "adapter_config.json"
    written = json.loads(path.read_text())
    assert not set(changes) - set(written)
    path.write_text(json.dumps({**written, "base_model_name_or_path": str(base), **changes}))
    return folder


def probabilities(classifier: PromptedClassifier, images: list[Image.Image], texts: list[str]) -> torch.Tensor:
    """What the model's own forward gives at full text length."""
    tokens = tiny_tokenizer()(texts, padding="max_length", max_length=40, return_tensors="pt").input_ids
    pixels = clip_processor()(images, return_tensors="pt")["pixel_values"]
    with torch.no_grad():
        return classifier.model(input_ids=tokens, pixel_values=pixels).logits_per_image.softmax(-1)


def test_predictions_equal_the_adapted_model(adapter: Path) -> None:
    """Class names, template and base model come from the folder; 1e-5: cut text and separate towers in float32."""
    classifier = PromptedClassifier.from_pretrained(adapter)
    images = [noise_image(20, 30, seed=seed) for seed in range(5)]
    expected = probabilities(classifier, images, [f"a photo of a {name}." for name in NAMES])
    results = classifier.predict(images, batch_size=2)
    assert len(results) == 5
    for predictions, row in zip(results, expected, strict=True):
        order = row.argsort(descending=True)
        assert [p.label for p in predictions] == [NAMES[i] for i in order]
        assert [p.probability for p in predictions] == pytest.approx(row[order].tolist(), abs=1e-5)
    with classifier.model.disable_adapter():
        base_results = classifier.predict(images, batch_size=2)
    assert base_results != results, "the adapter must have an effect, and the class features must follow it"
    assert classifier.predict(images, batch_size=2) == results


def test_one_image_gives_one_list(adapter: Path) -> None:
    """As HF pipelines do; `top_k` is cut to the number of classes."""
    classifier = PromptedClassifier.from_pretrained(adapter)
    image = noise_image(20, 20)
    predictions = classifier.predict(image, top_k=50)
    assert all(isinstance(prediction, Prediction) for prediction in predictions)
    assert sum(prediction.probability for prediction in predictions) == pytest.approx(1, abs=1e-5)
    assert classifier.predict([image], top_k=2) == [predictions[:2]]
    assert classifier.predict([]) == []
    with pytest.raises(ValueError, match="`top_k` of at least 1, got 0"):
        classifier.predict(image, top_k=0)


def test_threads_decode_in_order_and_end_with_the_call(adapter: Path) -> None:
    """Images are decoded beside the model: each keeps its labels, a bad one is named, and nothing runs on behind."""
    classifier = PromptedClassifier.from_pretrained(adapter)
    images: list[Any] = [noise_image(20, 20, seed=seed) for seed in range(23)]
    results = classifier.predict(images, batch_size=4)
    for row, image in zip(results, images, strict=True):
        alone = classifier.predict(image)
        assert [p.label for p in row] == [p.label for p in alone]
        assert [p.probability for p in row] == pytest.approx([p.probability for p in alone], abs=1e-5)
    assert len({row[0].probability for row in results}) > 20, "the images must differ"
    with pytest.raises(DataError, match="image 13"):
        classifier.predict([*images[:13], b"no image", *images[14:]], batch_size=4)
    assert not [thread for thread in threading.enumerate() if thread.name.startswith("peft_vlm-decode")]
    with pytest.raises(ValueError, match="`batch_size` of at least 1, got 0"):
        classifier.predict(images, batch_size=0)


def test_every_kind_of_image_is_accepted(adapter: Path, tmp_path: Path) -> None:
    """The same pixels by path (spaces and other scripts), bytes, PIL and numpy; grey and transparent ones too."""
    classifier = PromptedClassifier.from_pretrained(adapter)
    image = noise_image(20, 24)
    path = tmp_path / "photo \u00e4\u732b 1.png"
    image.save(path)
    expected = classifier.predict(image)
    for source in (path, str(path), path.read_bytes(), np.asarray(image)):
        assert classifier.predict(source) == expected
    assert len(classifier.predict([path, image, np.asarray(image)[..., 0], noise_image(5, 9, mode="RGBA")])) == 4


def test_new_class_names_need_no_training(adapter: Path) -> None:
    """The text side classifies among any names; the adapter's own come back afterwards."""
    classifier = PromptedClassifier.from_pretrained(adapter)
    image = noise_image(20, 20)
    before = classifier.predict(image)
    new = classifier.predict(image, class_names=["axolotl", "yak"])
    expected = probabilities(classifier, [image], ["a photo of a axolotl.", "a photo of a yak."])[0].tolist()
    assert {p.label: p.probability for p in new} == pytest.approx(
        {"axolotl": expected[0], "yak": expected[1]}, abs=1e-5
    )
    assert classifier.predict(image) == before
    other = PromptedClassifier.from_pretrained(adapter, class_names=["yak", "axolotl"], template="the {}!")
    assert {p.label for p in other.predict(image)} == {"axolotl", "yak"}


def test_the_base_model_alone_is_a_zero_shot_classifier(base: Path) -> None:
    """The same call for the row that every result is compared with."""
    classifier = PromptedClassifier.from_pretrained(None, base_model=base)
    with pytest.raises(ClassNameError, match="Pass `class_names=` to `predict`"):
        classifier.predict(noise_image(20, 20))
    assert len(classifier.predict(noise_image(20, 20), class_names=NAMES)) == 4


def test_adapters_of_other_peft_methods_work(base: Path, tmp_path: Path) -> None:
    """A LoRA adapter records neither classes nor template."""
    model = tiny_clip()
    model.name_or_path = str(base)
    get_peft_model(model, LoraConfig(target_modules=["q_proj"], r=2)).save_pretrained(tmp_path / "lora")
    classifier = PromptedClassifier.from_pretrained(tmp_path / "lora", class_names=NAMES)
    assert classifier.predict(noise_image(20, 20))[0].label in NAMES


def test_a_broken_image_in_a_list_is_named(adapter: Path, tmp_path: Path) -> None:
    """One of a thousand paths is wrong: which?"""
    classifier = PromptedClassifier.from_pretrained(adapter)
    with pytest.raises(DataError, match=r"image 1 \(file '.*gone.png'\) does not exist"):
        classifier.predict([noise_image(9, 9), tmp_path / "gone.png"])


def test_missing_folders_are_named_and_not_looked_up(adapter: Path, base: Path, tmp_path: Path) -> None:
    """A mistyped path must not end in a network error."""
    with pytest.raises(AdapterError, match="The adapter '.*no such' does not exist.*adapter_config.json"):
        PromptedClassifier.from_pretrained(tmp_path / "no such")
    with pytest.raises(AdapterError, match="The base model './gone' does not exist.*Pass `base_model=`"):
        PromptedClassifier.from_pretrained(adapter, base_model="./gone")
    moved = save_adapter(base, tmp_path / "moved", base_model_name_or_path="/old/place/clip")
    with pytest.raises(AdapterError, match="'/old/place/clip' does not exist"):
        PromptedClassifier.from_pretrained(moved)
    assert PromptedClassifier.from_pretrained(moved, base_model=base).class_names == tuple(NAMES)


def test_folders_without_the_right_files_are_explained(base: Path, tmp_path: Path) -> None:
    """An empty adapter folder, an adapter without base, a base without processor, and nothing at all."""
    (tmp_path / "empty").mkdir()
    with pytest.raises(AdapterError, match="Expected 'adapter_config.json' in '.*empty', got none"):
        PromptedClassifier.from_pretrained(tmp_path / "empty")
    orphan = save_adapter(base, tmp_path / "orphan", base_model_name_or_path=None)
    with pytest.raises(AdapterError, match="records no base model. Pass `base_model=`"):
        PromptedClassifier.from_pretrained(orphan)
    tiny_clip().save_pretrained(tmp_path / "bare")
    tiny_tokenizer().save_pretrained(tmp_path / "bare")
    with pytest.raises(AdapterError, match="could not be loaded with tokenizer and image processor"):
        PromptedClassifier.from_pretrained(None, base_model=tmp_path / "bare")
    with pytest.raises(AdapterError, match="got neither"):
        PromptedClassifier.from_pretrained(None)


def test_an_adapter_of_another_base_model_is_refused(adapter: Path, tmp_path: Path) -> None:
    """Same architecture, other sizes: PEFT alone would fail with a list of shapes, or load half of the tensors."""
    other = tmp_path / "other"
    tiny_clip(dim=24).save_pretrained(other)
    tiny_tokenizer().save_pretrained(other)
    clip_processor().save_pretrained(other)
    with pytest.raises(AdapterError, match="made for another base model .*projection_dim"):
        PromptedClassifier.from_pretrained(adapter, base_model=other)


def test_another_image_preparation_is_refused(base: Path, tmp_path: Path) -> None:
    """Other mean or size than in training: worse predictions without a message."""
    folder = save_adapter(base, tmp_path / "adapter", image_size=[32, 32])
    with pytest.raises(AdapterError, match=r"'image_size': \[32, 32\].*'image_size': \[16, 16\]"):
        PromptedClassifier.from_pretrained(folder)


def test_siglip_classifies_too(tmp_path: Path) -> None:
    """Probabilities are a softmax over the class names, also for SigLIP, whose own scores are sigmoids."""
    model = tiny_siglip()
    classifier = PromptedClassifier(
        model, tiny_tokenizer(), clip_processor(), class_names=["cat", "ox"], template="a {}."
    )
    assert sum(p.probability for p in classifier.predict(noise_image(20, 20))) == pytest.approx(1, abs=1e-5)


def lora_classifier(target: str = r".*text_model.*(q|v)_proj") -> PromptedClassifier:
    """Two LoRA adapters "default" and "other" with random weights on the text side."""
    config = LoraConfig(target_modules=target, r=2, init_lora_weights=False)
    model = get_peft_model(tiny_clip(), config)
    model.add_adapter("other", config)
    return PromptedClassifier(model.eval(), tiny_tokenizer(), clip_processor(), class_names=NAMES)


def scores(classifier: PromptedClassifier, **options: list[str]) -> list[float]:
    """Probabilities of one image in label order."""
    found = {p.label: p.probability for p in classifier.predict(noise_image(20, 30), top_k=99, **options)}
    return [found[name] for name in options.get("class_names", NAMES)]


def fresh_scores(classifier: PromptedClassifier) -> list[float]:
    """The same by a classifier that has kept nothing."""
    return scores(PromptedClassifier(classifier.model, tiny_tokenizer(), clip_processor(), class_names=NAMES))


def fused_step(classifier: PromptedClassifier) -> None:
    """A step that does not raise the tensors' version counters."""
    parameters = [p for p in classifier.model.parameters() if p.requires_grad]
    for parameter in parameters:
        parameter.grad = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(0))
    torch.optim.AdamW(parameters, lr=0.1, fused=True).step()


def edit_behind_autograd(classifier: PromptedClassifier) -> None:
    """The adapter's tensors, all changed."""
    for parameter in classifier.model.parameters():
        if parameter.requires_grad:
            parameter.data.mul_(-3)


def load_other_weights(classifier: PromptedClassifier) -> None:
    """The state of a model with other adapter weights."""
    state = {key: -3 * value for key, value in classifier.model.state_dict().items() if "lora" in key}
    classifier.model.load_state_dict(classifier.model.state_dict() | state)


def replace_the_adapter(classifier: PromptedClassifier) -> None:
    """Delete an adapter and add one of the same name."""
    classifier.model.set_adapter("other")
    classifier.model.delete_adapter("default")
    classifier.model.add_adapter("default", classifier.model.peft_config["other"])
    classifier.model.set_adapter("default")


NOTICED = {
    "load_state_dict": load_other_weights,
    "set_adapter": lambda classifier: classifier.model.set_adapter("other"),
    "switched off": lambda classifier: classifier.model.base_model.disable_adapter_layers(),
    "unloaded": lambda classifier: classifier.model.unload(),
    "an adapter of the same name": replace_the_adapter,
    "half precision": lambda classifier: classifier.model.bfloat16(),
}
TOLD = {"fused optimizer": fused_step, ".data": edit_behind_autograd}


@pytest.mark.parametrize("name", [*NOTICED, *TOLD])
def test_changed_weights_give_fresh_features_or_after_refresh(name: str) -> None:
    """Stale class features look right and belong to older weights; what needs `refresh()` is documented there."""
    classifier = lora_classifier()
    before = scores(classifier)
    (NOTICED | TOLD)[name](classifier)
    if name in TOLD:
        classifier.refresh()
    assert scores(classifier) == fresh_scores(classifier)
    assert scores(classifier) != before


def test_a_merge_is_noticed() -> None:
    """A merged adapter gives the same features up to rounding, computed from other weights."""
    classifier = lora_classifier()
    before = scores(classifier)
    classifier.model.merge_adapter()
    assert scores(classifier) == fresh_scores(classifier)
    assert scores(classifier) == pytest.approx(before, abs=1e-5)
    classifier.model.unmerge_adapter()
    assert scores(classifier) == fresh_scores(classifier)


def test_class_features_are_computed_once_per_class_list() -> None:
    """Two lists in turn must not encode the classes in every call."""
    classifier = lora_classifier()
    passes: list[int] = []
    base = classifier.model.get_base_model()
    base.text_projection.register_forward_hook(lambda *call: passes.append(1))
    for _ in range(3):
        for names in (NAMES, NAMES[::-1], ["ox", "bee"]):
            classifier.predict(noise_image(20, 30), class_names=names)
    assert len(passes) == 3


def test_threads_with_different_class_lists_get_their_own_labels() -> None:
    """A server predicts in several threads; features of another thread's classes would be labels of other names."""
    classifier = lora_classifier()
    lists = [NAMES, NAMES[::-1], ["ox", "bee"], ["gnu", "emu", "cat", "dog", "owl"]]
    expected = [scores(classifier, class_names=names) for names in lists]
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(4) as pool:

            def run(number: int) -> list[float]:
                if number % 7 == 0:
                    classifier.refresh()
                return scores(classifier, class_names=lists[number % 4])

            results = list(pool.map(run, range(60)))
    finally:
        sys.setswitchinterval(before)
    for number, result in enumerate(results):
        assert result == pytest.approx(expected[number % 4], abs=1e-6)


def test_threads_use_an_adapter_each_by_a_classifier_each(base: Path, adapter: Path, tmp_path: Path) -> None:
    """`set_adapter` is a state of the model: a thread that switches takes the adapter from under the others."""
    lora = get_peft_model(tiny_clip(), LoraConfig(target_modules=["q_proj"], r=2, init_lora_weights=False))
    lora.save_pretrained(tmp_path / "lora")
    classifiers = [
        PromptedClassifier.from_pretrained(adapter),
        PromptedClassifier.from_pretrained(tmp_path / "lora", base_model=base, class_names=NAMES),
        PromptedClassifier.from_pretrained(None, base_model=base, class_names=NAMES),
    ]
    expected = [scores(classifier) for classifier in classifiers]
    assert len({round(values[0], 4) for values in expected}) == 3, "the adapters must differ"
    before = sys.getswitchinterval()
    sys.setswitchinterval(1e-6)
    try:
        with ThreadPoolExecutor(6) as pool:
            results = list(pool.map(lambda number: scores(classifiers[number % 3]), range(60)))
    finally:
        sys.setswitchinterval(before)
    for number, result in enumerate(results):
        assert result == expected[number % 3]


def test_a_bare_string_is_no_class_list() -> None:
    """It would be taken as a class per letter."""
    with pytest.raises(ClassNameError, match="list of at least one class name, got 'cat'"):
        lora_classifier().predict(noise_image(20, 30), class_names="cat")
