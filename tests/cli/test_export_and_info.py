"""`peft-vlm export`, `predict` on what it wrote, patterns, and `info`."""

import json

import pytest

from peft_vlm.cli import main
from peft_vlm.cli.predict import image_files
from peft_vlm.errors import PeftVLMError
from peft_vlm.registry import METHODS
from tests.cli.test_train import save_clip
from tests.tiny import colour_names, colour_rows


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """A tiny CLIP, its zero-shot export, and images in a folder with an odd name."""
    root = tmp_path_factory.mktemp("exported")
    save_clip(root / "clip")
    pictures = root / "Bilder [vom] S\u00fcden" / "\u65e5\u672c"
    pictures.mkdir(parents=True)
    for number, row in enumerate(colour_rows(1, classes=3)):
        row["image"].save(pictures / f"photo {number} \u00e9.PNG")
    words = ["export", str(root / "clip"), str(root / "out"), "--zero_shot", "--class_names", *colour_names(3)]
    assert main([*words, "--template", "a {}.", "--formats", "safetensors", "onnx", "--json"]) == 0
    return root


def test_exported_files_predict_like_the_model(exported, capsys) -> None:
    """The same labels from the base model, the torch module and the ONNX file."""
    capsys.readouterr()
    model = [str(exported / "clip"), "--zero_shot", "--class_names", *colour_names(3), "--template", "a {}."]
    answers = []
    for words in (
        model,
        [str(exported / "out" / "classifier.safetensors")],
        [str(exported / "out" / "classifier.onnx")],
    ):
        images = str(exported / "Bilder [[]vom] *" / "**" / "*.PNG")
        assert main(["predict", words[0], images, *words[1:], "--json", "--top_k", "1"]) == 0
        answers.append(json.loads(capsys.readouterr().out))
    assert len(answers[0]) == 3
    for other in answers[1:]:
        for row, expected in zip(other, answers[0], strict=True):
            assert row["file"] == expected["file"]
            assert row["labels"][0]["label"] == expected["labels"][0]["label"]
            assert row["labels"][0]["probability"] == pytest.approx(expected["labels"][0]["probability"], abs=1e-5)


def test_files_folders_and_patterns(exported) -> None:
    """Every image once, in a fixed order; capital endings count; brackets in a name are no pattern."""
    folder = exported / "Bilder [vom] S\u00fcden"
    files = image_files([str(folder), str(folder / "\u65e5\u672c" / "photo 0 \u00e9.PNG")])
    assert [file.name for file in files] == [f"photo {n} \u00e9.PNG" for n in range(3)]
    with pytest.raises(PeftVLMError, match="no image file matches it"):
        image_files([str(exported / "*.jpg")])
    with pytest.raises(PeftVLMError, match="no such file or folder"):
        image_files([str(exported / "missing.jpg")])


def test_mistakes_end_with_two(exported, tmp_path, capsys) -> None:
    """Fixed classes cannot be changed; damaged files and images are named."""
    picture = next((exported / "Bilder [vom] S\u00fcden").rglob("*.PNG"))
    file = exported / "out" / "classifier.safetensors"
    assert main(["predict", str(file), str(picture), "--class_names", "a", "b"]) == 2
    assert "classes are fixed; leave out ['class_names']" in capsys.readouterr().err
    (tmp_path / "cut.safetensors").write_bytes(file.read_bytes()[:1000])
    assert main(["predict", str(tmp_path / "cut.safetensors"), str(picture)]) == 2
    assert "complete safetensors file" in capsys.readouterr().err
    (tmp_path / "text.png").write_text("no picture")
    assert main(["predict", str(file), str(tmp_path / "text.png")]) == 2
    printed = capsys.readouterr()
    assert "text.png' cannot be read as an image" in printed.out
    assert "1 of 1 images could not be read" in printed.err
    assert main(["info", str(tmp_path)]) == 2
    assert "no method and no adapter" in capsys.readouterr().err


def test_info_teaches_the_settings_of_each_method(exported, capsys) -> None:
    """What `peft-vlm train --config --objective` can be told, with defaults; and what an exported file is."""
    for method in METHODS:
        assert main(["info", method, "--json"]) == 0
        facts = json.loads(capsys.readouterr().out)
        assert facts["config"]
        assert "class_names" not in facts["config"]
        assert facts["presets"].split(", ") == list(METHODS[method].presets)
        rates = [value["learning_rate"] for key, value in facts.items() if key.startswith("recommended for")]
        assert len(rates) == 2
        assert min(rates) > 0
    assert main(["info"]) == 0
    assert "skip_tuning" in capsys.readouterr().out
    assert main(["info", str(exported / "out" / "classifier.safetensors")]) == 0
    assert "red" in capsys.readouterr().out
