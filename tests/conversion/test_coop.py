"""Official CoOp, KgCoOp and POMP files become adapters that give the recorded outputs."""

import pytest
import torch
from torch.testing import assert_close

from peft_vlm.cli import main
from peft_vlm.conversion.formats import convert
from peft_vlm.errors import AdapterError, ClassNameError
from peft_vlm.evaluation.classify import TextClassifier
from peft_vlm.methods.coop import convert_checkpoint
from peft_vlm.text.class_features import encode_classes
from peft_vlm.text.prompts import ClassPrompts
from tests.conversion.official_files import adapter, logits, official, official_tensors
from tests.parity.recorded import facts, recorded_tokenizer, tensors

#: The recorded classes have digits and punctuation, whose spelling no file holds: see `test_class_names.py`.
pytestmark = pytest.mark.filterwarnings("ignore:Class names were read off")

CASES = {
    "E1_coop_words4_end": "end",
    "E2_coop_random16_end": "end",
    "E3_coop_random16_middle": "middle",
    "E4_coop_random16_front": "front",
    "E5_coop_csc16_end": "end",
    "E6_coop_csc4_middle": "middle",
    "E7_coop_punct4_front": "front",
}
NAMES = facts("E1_coop_words4_end")["classnames"]


@pytest.mark.parametrize(("name", "position"), CASES.items())
def test_the_recorded_logits_come_out_of_the_official_file(name, position, student_folder, tmp_path):
    """Class names included: they are read off the file and give the recorded classes in their order."""
    report = convert(official(name), tmp_path / "adapter", base_model=student_folder, class_position=position)
    recorded, atol = tensors(name), facts(name)["tolerance"]["logits_atol"]
    assert report.kind == "CoOp"
    assert report.used == ("ctx",)
    assert sorted(report.unused) == ["token_prefix", "token_suffix"]
    assert_close(
        logits(adapter(tmp_path / "adapter"), recorded["in.images"]), recorded["expected.logits"], rtol=0, atol=atol
    )


@pytest.mark.parametrize("name", ["E5_coop_csc16_end", "E6_coop_csc4_middle"])
def test_contexts_per_class_from_the_command_to_the_classifier_and_back(name, student_folder, tmp_path, capsys):
    """Its classes in any order, no others, and the same tensors in the official file of the way back."""
    folder, back = str(tmp_path / "adapter"), str(tmp_path / "model.pth.tar-1")
    command = ["convert", str(official(name)), "--base_model", str(student_folder), "--class_position", CASES[name]]
    assert main([*command, "--output_dir", folder, "--json"]) == 0
    model, recorded = adapter(tmp_path / "adapter"), tensors(name)
    classes = tuple(reversed(model.active_peft_config.class_names))
    classifier = TextClassifier(model, recorded_tokenizer(), template="{}.")
    expected, atol = recorded["expected.logits"].flip(1), facts(name)["tolerance"]["logits_atol"]
    assert_close(classifier.logits_for(classes)(recorded["in.images"]).detach(), expected, rtol=0, atol=atol)
    with pytest.raises(ClassNameError, match="nothing to say about new classes"):
        classifier.logits_for((*classes, "frog"))(recorded["in.images"])
    assert main(["convert", folder, "--base_model", str(student_folder), "--official_file", back, "--json"]) == 0
    assert '"CSC": true' in capsys.readouterr().out
    again, first = torch.load(back, weights_only=True)["state_dict"], official_tensors(name)
    assert torch.equal(again["ctx"], first["ctx"])


@pytest.mark.parametrize(("variant", "atol"), [("fp16", 5e-3), ("verbatim", None)])
@pytest.mark.parametrize("words", [None, "a photo of a"])
def test_half_precision_and_whole_official_files(variant, atol, words, student_folder, tmp_path):
    """The verbatim file pickles optimizer and scheduler; the words of the start change no output."""
    name = "E1_coop_words4_end"
    settings = {"base_model": student_folder, "class_position": "end", "context_init": words}
    report = convert_checkpoint(official(f"{name}.{variant}"), tmp_path / "a", class_names=NAMES, **settings)
    assert report.config.class_names == NAMES
    assert report.config.image_size == [32, 32]
    assert report.config.template == ("{}." if words is None else "a photo of a {}.")
    recorded, atol = tensors(name), atol or facts(name)["tolerance"]["logits_atol"]
    assert_close(
        logits(adapter(tmp_path / "a"), recorded["in.images"]), recorded["expected.logits"], rtol=0, atol=atol
    )


def test_a_kgcoop_file_is_a_context(student_folder, tmp_path):
    recorded, case = tensors("H_kgcoop"), facts("H_kgcoop")
    content = official_tensors("E1_coop_words4_end") | {
        "ctx": recorded["in.text_ctx"],
        "bias_vectors": torch.zeros(64),
    }
    content |= {"meta_net.linear1.weight": torch.zeros(4, 64), "meta_net.linear1.bias": torch.zeros(4)}
    torch.save({"state_dict": {f"prompt_learner.{key}": value for key, value in content.items()}}, tmp_path / "kg.pth")
    report = convert(tmp_path / "kg.pth", tmp_path / "adapter", base_model=student_folder)
    assert report.kind == "KgCoOp"
    assert len(report.unused) == 5
    actual = logits(adapter(tmp_path / "adapter"), recorded["in.images"])
    assert_close(actual, recorded["expected.logits"], rtol=0, atol=case["tolerance"]["logits_atol"])


def test_a_pomp_file_gives_the_recorded_class_features(skip_folder, tmp_path):
    """POMP trains CoOp's prompts, on a base model that has no tokenizer here."""
    recorded = tensors("P1_pomp")
    buffers = {
        f"{part}_token_{kind}": torch.zeros(50, 1, 64) for part in ("train", "test") for kind in ("prefix", "suffix")
    }
    torch.save({"ctx": recorded["ctx_init"], **buffers}, tmp_path / "pomp.pth")
    report = convert(tmp_path / "pomp.pth", tmp_path / "adapter", base_model=skip_folder, class_position="end")
    assert report.kind == "POMP"
    assert set(report.unused) == set(buffers)
    assert any("no tokenizer" in note for note in report.notes)
    model = adapter(tmp_path / "adapter", clip="tiny_clip")
    slots = model.active_peft_config.slots
    ids = recorded["prompt_token_ids"].clone()
    ids[:, 1:5] = slots.placeholder_id
    prompts = ClassPrompts(tuple(f"class {i}" for i in range(50)), ("{}.",), ids, slots=slots)
    assert_close(encode_classes(model, prompts), recorded["text_features_all"], rtol=0, atol=1e-6)


def test_what_a_file_does_not_hold_is_asked_for(student_folder, tmp_path):
    with pytest.raises(AdapterError, match=r"checkpoint of CoOp\. Missing: `class_position`, which the file"):
        convert(official("E1_coop_words4_end"), tmp_path / "a", base_model=student_folder)
    settings = {"base_model": student_folder, "class_position": "end"}
    with pytest.raises(
        AdapterError, match=r"Not for this kind: `start_layer`\. It takes `base_model`, `class_position`"
    ):
        convert(official("E1_coop_words4_end"), tmp_path / "a", start_layer=2, **settings)
    with pytest.raises(AdapterError, match="`context_init` of 4 tokens.*'a photo' with 2"):
        convert(official("E1_coop_words4_end"), tmp_path / "a", context_init="a photo", **settings)
    assert not (tmp_path / "a").exists()


def test_class_names_that_are_not_the_files_are_refused(student_folder, tmp_path):
    settings = {"base_model": student_folder, "class_position": "end"}
    with pytest.raises(ClassNameError, match=rf"got 'frog' for class 0, where .* has '{NAMES[0].lower()}"):
        convert(official("E1_coop_words4_end"), tmp_path / "a", class_names=["frog", *NAMES[1:]], **settings)
    with pytest.raises(ClassNameError, match="Expected the 7 class names of the training, got 2"):
        convert(official("E1_coop_words4_end"), tmp_path / "a", class_names=NAMES[:2], **settings)


def test_the_base_model_of_another_training_is_refused(teacher_folder, tmp_path):
    """Both text towers have the same sizes: only the token embeddings in the file tell them apart."""
    with pytest.raises(AdapterError, match="made on another CLIP.*token embeddings"):
        convert(official("E1_coop_words4_end"), tmp_path / "a", base_model=teacher_folder, class_position="end")


def test_unknown_files_are_refused(student_folder, tmp_path):
    torch.save({"fc.weight": torch.zeros(2, 2)}, tmp_path / "other.pth")
    with pytest.raises(AdapterError, match=r"of no kind that is known .*1 tensors begin with \['fc\.weight'\]"):
        convert(tmp_path / "other.pth", tmp_path / "a", base_model=student_folder)
    torch.save({"ctx": torch.full((4, 64), torch.nan)}, tmp_path / "nan.pth")
    with pytest.raises(AdapterError, match=r"finite values in 'ctx' of .*nan\.pth"):
        convert(tmp_path / "nan.pth", tmp_path / "a", base_model=student_folder, class_position="end")
