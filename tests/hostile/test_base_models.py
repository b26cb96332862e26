"""Base models of strangers, which an adapter of theirs may name: sizes, types and files that are none."""

import json
import shutil
from pathlib import Path

import pytest

from peft_vlm.classifier import PromptedClassifier
from peft_vlm.errors import PeftVLMError
from tests.hostile.attack import Attack, outcomes, table
from tests.hostile.folders import linked, piped, written
from tests.tiny import noise_image

CONFIG, PREPARE, TOKENS = "config.json", "preprocessor_config.json", "tokenizer_config.json"


def changed(name: str, **values: object):
    """A JSON file of the base model with other values; dictionaries are merged."""

    def make(folder: Path) -> None:
        content = json.loads((folder / name).read_text())
        for key, value in values.items():
            is_part = isinstance(value, dict) and key.endswith("_config")
            content[key] = content.get(key, {}) | value if is_part else value
        (folder / name).write_text(json.dumps(content))

    return make


ATTACKS = table(
    *(
        Attack(f"{name}-{number}", written(name, content), "base model")
        for name in (CONFIG, PREPARE, TOKENS, "tokenizer.json", "model.safetensors")
        for number, content in enumerate((b"", b"[1]", b"\xff", b"[" * 10**5))
    ),
    *(
        Attack(f"{name}-is-a-pipe", piped(name), "which are none")
        for name in (CONFIG, PREPARE, TOKENS, "tokenizer.json", "model.safetensors")
    ),
    Attack("linked-to-itself", linked(CONFIG, CONFIG), "which are none"),
    Attack("another-type", changed(CONFIG, model_type="llama", architectures=["LlamaModel"]), "got `LlamaModel`"),
    *(
        Attack(f"{tower}-{name}", changed(CONFIG, **{f"{tower}_config": {name: value}}), "base model")
        for tower in ("text", "vision")
        for name, value in (("num_hidden_layers", 10**7), ("hidden_size", 10**12), ("intermediate_size", "x"))
    ),
    Attack("positions", changed(CONFIG, text_config={"max_position_embeddings": 10**9}), "`max_position"),
    Attack("vision-positions", changed(CONFIG, vision_config={"image_size": 10**6}), "`image_size` of at most 8,192"),
    Attack("text-in-place-of-a-number", changed(CONFIG, projection_dim="x"), "base model"),
    *(
        Attack(f"prepare-{number}", changed(PREPARE, **values), "xpected")
        for number, values in enumerate(
            (
                {"size": {"shortest_edge": 10**7}, "crop_size": {"height": 10**7, "width": 10**7}},
                {"size": {"shortest_edge": 10**7}},
                {"size": {"shortest_edge": -1}},
                {"crop_size": {"height": 0, "width": 0}},
                {"crop_size": {"height": 1.5, "width": 1.5}},
                {"image_std": [0, 0, 0]},
                {"image_std": [1, 1]},
                {"image_mean": "abc"},
                {"image_mean": [float("nan")] * 3},
            )
        )
    ),
)  # fmt: skip


def classify(folder: Path) -> None:
    """What `peft-vlm predict` does."""
    PromptedClassifier.from_pretrained(None, base_model=folder, class_names=["a"], device="cpu").predict(
        noise_image(9, 9)
    )


@pytest.fixture(scope="module")
def results(base, tmp_path_factory):
    """What came of each attack."""
    folders = {}
    for number, (name, attack) in enumerate(ATTACKS.items()):
        folders[name] = Path(shutil.copytree(base, tmp_path_factory.mktemp("base") / str(number)))
        attack.make(folders[name])
    return outcomes(__name__, "classify", folders, tmp_path_factory.mktemp("log") / "log", error=PeftVLMError)


@pytest.mark.parametrize("name", ATTACKS)
def test_a_strangers_base_model_is_refused(results, name):
    """A folder of some kB made a network of 7 billion parameters, or images of 10**14 pixels."""
    assert not results[name], results[name][-800:]


def test_no_code_of_a_base_model_runs(base, tmp_path):
    """`auto_map` names Python files of the repository."""
    folder = Path(shutil.copytree(base, tmp_path / "base"))
    changed(CONFIG, auto_map={"AutoModel": "evil.Model", "AutoConfig": "evil.Config"})(folder)
    changed(TOKENS, auto_map={"AutoTokenizer": ["evil.Tokenizer", None]})(folder)
    changed(PREPARE, auto_map={"AutoImageProcessor": "evil.Processor"})(folder)
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\n")
    try:
        classify(folder)
    except PeftVLMError as error:
        assert "base model" in str(error)  # noqa: PT017 - refused, or read without it
    assert not (tmp_path / "ran").exists()
