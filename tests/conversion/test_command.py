"""`peft-vlm convert` as a user of official checkpoints tries it."""

import json

import pytest
import torch
from safetensors.torch import load_file
from torch.testing import assert_close

from peft_vlm.cli import main
from peft_vlm.conversion.clip import to_openai_names
from peft_vlm.conversion.official_file import read_checkpoint
from tests.conversion.official_files import adapter, logits, official
from tests.parity.recorded import facts, recorded_clip, tensors

#: The recorded classes have digits and punctuation, whose spelling no file holds: see `test_class_names.py`.
pytestmark = pytest.mark.filterwarnings("ignore:Class names were read off")

NAMES = facts("D2_promptkd_5steps")["classnames"]


def run(capsys, *words) -> tuple[int, str, str]:
    """Exit code and what was printed."""
    code = main(["convert", *map(str, words)])
    return code, *capsys.readouterr()


def test_teacher_then_student_then_back(student_folder, teacher_folder, tmp_path, capsys):
    """The two official files of a PromptKD run, with the class names in a text file, and the student as JSON."""
    teacher, student = tmp_path / "teacher", tmp_path / "student"
    words = ("--base_model", teacher_folder, "--context_init", "a photo of a", "--output_dir", teacher)
    code, out, _ = run(capsys, official("D_promptkd_teacher"), *words)
    assert code == 0
    assert f"D_promptkd_teacher.pth.tar (PromptSRC or IVLP) -> {teacher} (method promptsrc)" in out
    assert "missing: 121, taken from" in out
    (tmp_path / "classes.txt").write_text("\n".join(NAMES), encoding="utf-8")
    words = ("--base_model", student_folder, "--teacher", teacher, "--class_names", tmp_path / "classes.txt")
    code, out, _ = run(capsys, official("D2_promptkd_5steps"), *words, "--output_dir", student, "--json")
    report = json.loads(out)
    assert code == 0
    assert (report["kind"], report["class_names"], len(report["unused"])) == ("PromptKD", NAMES, 57)
    config = json.loads((student / "adapter_config.json").read_text())
    assert (config["teacher_name_or_path"], config["template"]) == (str(teacher), "a photo of a {}.")
    assert config["teacher_logit_scale"] == pytest.approx(1 / 0.07, rel=1e-5)
    recorded = tensors("D2_promptkd_5steps")
    actual, expected = logits(adapter(student), recorded["in.eval_images"]), recorded["expected.final.eval_logits"]
    assert_close(actual, expected, rtol=0, atol=facts("D2_promptkd_5steps")["tolerance"]["eval_logits_atol"])
    code, out, _ = run(capsys, student, "--official_file", tmp_path / "back" / "model.pth.tar-20")
    assert code == 0
    assert "'PROMPT_DEPTH_VISION': 3" in out
    back, first = (
        read_checkpoint(p) for p in (tmp_path / "back" / "model.pth.tar-20", official("D2_promptkd_5steps"))
    )
    assert back.keys() == first.keys()
    assert all(torch.equal(back[name], first[name]) for name in first)


def test_weights_of_openai_become_a_base_model(tmp_path, capsys):
    torch.save(to_openai_names(recorded_clip("weights_student").state_dict()), tmp_path / "tiny.pt")
    words = (
        "--hidden_act",
        "quick_gelu",
        "--vision_head_width",
        32,
        "--text_heads",
        2,
        "--output_dir",
        tmp_path / "clip",
    )
    code, out, _ = run(capsys, tmp_path / "tiny.pt", *words)
    assert code == 0
    assert "There is no tokenizer in it" in out
    expected = recorded_clip("weights_student").state_dict()
    written = load_file(tmp_path / "clip" / "model.safetensors")
    assert all(torch.equal(written[name], expected[name]) for name in expected)


def test_wrong_input_is_one_line_and_exit_code_two(student_folder, tmp_path, capsys):
    target = ("--output_dir", tmp_path / "out")

    def refused(message: str, *words) -> None:
        code, _, error = run(capsys, *words)
        assert code == 2
        assert message in error
        assert error.count("\n") == 1
        assert not (tmp_path / "out").exists()

    base = ("--base_model", student_folder)
    refused("Missing: `--class_position`", official("E5_coop_csc16_end"), *base, *target)
    refused("Missing: `--base_model`, `--class_position`", official("E1_coop_words4_end"), *target)
    refused("Expected `--teacher` for a PromptKD student", official("D2_promptkd_5steps"), *base, *target)
    refused("does not exist", tmp_path / "none.pth", *target)
    refused("file with class names, got 'none.txt'", official("T1_tvp.readme"), "--class_names", "none.txt", *target)
    refused("Not for this kind: `--start_layer`", official("T1_tvp.readme"), "--start_layer", 3, *target)
    refused("no --template for an export", tmp_path, "--template", "{}", "--official_file", tmp_path / "x.pth")
