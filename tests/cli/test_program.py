"""`peft-vlm` as a new user tries it: help, exit codes, JSON, folders with spaces and non-ASCII names."""

import json
import signal
import subprocess
import sys

import pytest
from peft import get_peft_model
from transformers import CLIPProcessor

from peft_vlm.cli import info, main
from peft_vlm.settings import EvaluationArguments, RunSettings
from tests.cases import perturb, skip_tuning_config
from tests.source_tree import ROOT
from tests.tiny import clip_processor, colour_names, colour_rows, tiny_clip, tiny_tokenizer


@pytest.fixture
def adapter(tmp_path):
    """An adapter with its base model on disk."""
    base = tmp_path / "base"
    tiny_clip().save_pretrained(base)
    CLIPProcessor(image_processor=clip_processor(), tokenizer=tiny_tokenizer()).save_pretrained(base)
    model = get_peft_model(tiny_clip().from_pretrained(base), skip_tuning_config())
    perturb(model)
    config = model.active_peft_config
    config.class_names, config.template = list(colour_names(3)), "a {}."
    model.save_pretrained(tmp_path / "adapter")
    return tmp_path / "adapter"


@pytest.fixture
def pictures(tmp_path):
    folder = tmp_path / "Bilder vom S\u00fcden"
    folder.mkdir()
    for number, row in enumerate(colour_rows(1, classes=3)):
        row["image"].save(folder / f"photo {number} \u00e9.png")
    return folder


def test_help_teaches(capsys):
    for words in (["--help"], ["evaluate", "--help"], ["predict", "--help"]):
        with pytest.raises(SystemExit) as stop:
            main(words)
        assert stop.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text
    assert "--protocol" in text
    assert "base-to-new" in text


def test_predict_a_folder(adapter, pictures, capsys):
    assert main(["predict", str(adapter), str(pictures), "--top_k", "2", "--json"]) == 0
    rows = json.loads(capsys.readouterr().out)
    assert [row["file"].rpartition("/")[2] for row in rows] == [f"photo {n} \u00e9.png" for n in range(3)]
    assert all(len(row["labels"]) == 2 for row in rows)
    assert main(["predict", str(adapter), str(pictures / "photo 0 \u00e9.png"), "--class_names", "red", "tomato"]) == 0
    assert "tomato" in capsys.readouterr().out


@pytest.mark.parametrize("exported", [False, True])
def test_predict_goes_on_after_an_unreadable_file(exported, adapter, pictures, tmp_path, capsys):
    """One bad file of thousands threw the labels of all others away."""
    (pictures / "photo 1b.png").write_text("no image")
    (pictures / "photo 1c").write_bytes((pictures / "photo 1 \u00e9.png").read_bytes())
    classifier = str(adapter)
    if exported:
        assert main(["export", str(adapter), str(tmp_path / "out"), "--formats", "safetensors"]) == 0
        classifier = str(tmp_path / "out" / "classifier.safetensors")
        capsys.readouterr()
        assert main(["predict", str(tmp_path / "out"), str(pictures)]) == 2
        assert f"It is the folder of an exported classifier: pass '{classifier}'" in capsys.readouterr().err
    assert main(["predict", classifier, str(pictures), "--json"]) == 2
    captured = capsys.readouterr()
    rows = json.loads(captured.out)
    names = ["photo 0 \u00e9.png", "photo 1 \u00e9.png", "photo 1b.png", "photo 1c", "photo 2 \u00e9.png"]
    assert [row["file"].rpartition("/")[2] for row in rows] == names
    assert [len(row["labels"]) for row in rows] == [3, 3, 0, 3, 3]
    assert rows[1]["labels"] == rows[3]["labels"], "content decides, not the name"
    assert [name for name, row in zip(names, rows, strict=True) if "error" in row] == ["photo 1b.png"]
    assert "cannot be read as an image" in rows[2]["error"]
    assert "BytesIO" not in rows[2]["error"], "an object of Python in place of a reason"
    assert captured.err.endswith(f"1 of 5 images could not be read, the first is '{pictures / 'photo 1b.png'}'.\n")
    assert main(["predict", classifier, str(pictures)]) == 2
    lines = capsys.readouterr().out.splitlines()
    assert len(lines) == 5
    assert "photo 1b.png: " in lines[2]
    assert "cannot be read" in lines[2]


def test_evaluate_writes_a_report(adapter, tmp_path, capsys):
    rows = colour_rows(2, classes=4)
    for number, row in enumerate(rows):
        path = tmp_path / "data" / "test" / colour_names(4)[row["label"]] / f"{number}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        row["image"].save(path)
    flags = ["--protocol", "base-to-new", "--dataset", str(tmp_path / "data"), "--adapter", str(adapter)]
    assert main(["evaluate", *flags, "--output_dir", str(tmp_path / "report")]) == 0
    assert "base" in capsys.readouterr().out
    assert (tmp_path / "report" / "report.json").is_file()
    assert (tmp_path / "report" / "scores.png").is_file()


def test_info(adapter, capsys):
    assert main(["info", "--json"]) == 0
    assert "skip_tuning" in json.loads(capsys.readouterr().out)["methods"]
    assert main(["info", str(adapter)]) == 0
    assert "skip_tuning" in capsys.readouterr().out


def test_wrong_input_exits_with_two_and_one_line(adapter, tmp_path, capsys):
    assert main(["predict", str(adapter), str(tmp_path / "missing.png")]) == 2
    error = capsys.readouterr().err
    assert "no such file or folder" in error
    assert error.count("\n") == 1
    (tmp_path / "empty").mkdir()
    assert main(["predict", str(adapter), str(tmp_path / "empty")]) == 2
    assert "holds no image file" in capsys.readouterr().err
    assert main(["predict", str(tmp_path / "no adapter"), str(adapter)]) == 2


def test_a_protocol_is_known_by_both_spellings() -> None:
    """`train` calls it few_shot and `evaluate` few-shot: who has learnt one must not be refused by the other."""
    run = RunSettings(method="coop", model="m", dataset="d", protocol="base-to-new")
    evaluation = EvaluationArguments(protocol="few_shot", dataset=["d"], output_dir="o")
    for settings in (run, evaluation):
        settings.check()
    assert (run.protocol, evaluation.protocol) == ("base_to_new", "few-shot")
    with pytest.raises(ValueError, match="got 'few-shots'"):
        EvaluationArguments(protocol="few_shots", dataset=["d"], output_dir="o").check()


def test_an_interrupted_command_ends_in_one_line(monkeypatch, capsys) -> None:
    """A traceback through ten files looks like a bug, and 1 like one to a script."""
    monkeypatch.setattr(info, "run", lambda arguments: signal.raise_signal(signal.SIGINT))
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job inherits that it is ignored
    try:
        assert main(["info"]) == 130
    finally:
        signal.signal(signal.SIGINT, before)
    assert capsys.readouterr().err == "\npeft-vlm info: interrupted\n"


@pytest.mark.slow
def test_ctrl_c_ends_a_command_that_stores_features(tmp_path) -> None:
    """The whole way, as in a terminal: one line, exit code 130, within seconds."""
    words = ["train", "--method", "skip_tuning", "--model", "examples/assets/clip_student", "--use_cpu"]
    words += ["--dataset", "examples/assets/icons", "--no_evaluate", "--objective", "cache_batch_size=1"]
    words += ["image_cache=ram"]
    command = [sys.executable, "-m", "peft_vlm.cli", *words, "--output_dir", str(tmp_path / "run")]
    handler = signal.signal(signal.SIGINT, signal.default_int_handler)  # a background job hands on that it is ignored
    try:
        child = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE)
    finally:
        signal.signal(signal.SIGINT, handler)
    printed = b""
    while b"Storing" not in printed:
        piece = child.stderr.read1()
        assert piece, printed.decode()
        printed += piece
    child.send_signal(signal.SIGINT)
    rest = child.communicate(timeout=20)[1]
    assert child.returncode == 130, rest.decode()
    assert rest.decode().strip().splitlines()[-1].startswith("peft-vlm train: Stopped before step 1, while")
    assert b"Traceback" not in rest
