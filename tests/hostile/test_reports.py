"""Reports and summaries in a stranger's adapter folder: looked at, evaluated into, published."""

import json
import os
import shutil
from pathlib import Path

import pytest
import torch

from peft_vlm.cli import main
from peft_vlm.errors import AdapterError, DataError, PeftVLMError
from peft_vlm.evaluation.plots import bars_png, confusion_matrix_png
from peft_vlm.evaluation.report import EvalReport
from peft_vlm.evaluation.run import EvaluationArguments, run_evaluation
from peft_vlm.evaluation.transfer import TransferReport
from peft_vlm.files import (
    BASELINE_NAME,
    CARD_NAME,
    CURVE_NAME,
    FACTS_NAME,
    METRICS_NAME,
    REPORT_NAME,
    SUMMARY_NAME,
    TRANSFER_NAME,
    write_class_names,
    write_json,
)
from peft_vlm.hub import AdapterFolder, render_card, write_card, write_folder
from tests.hostile.attack import ANY, Attack, outcomes, table
from tests.hostile.folders import linked, piped, without, written
from tests.hub.adapters import write_images

SUMMARY = {
    **{"objective": {"a": 1}, "training": {"seed": 1}, "data": {"num_images": 3, "num_classes": 2}, "steps": 4},
    **{"metrics": {"train_loss": 1.0}, "environment": {"torch": "2"}, "epochs": 2.0},
    **{"training_images": {"count": 3, "sample": ["1:ab"]}, "selection": {"sample": []}},
}
REPORT = {
    **{"protocol": "few-shot", "model": "a/b", "adapter": "c", "dataset": "d (test)", "template": ["a {}"]},
    **{"scores": {"accuracy": 50.0}, "parts": {"all": {"num_images": 3}}, "note": "", "versions": {"torch": "2"}},
}
EFFECT = {"full_size": 1.0, "shrunken": 2.0, "prompted": 3.0}
TRANSFER = {
    **{"task": "t", "sources": ["a"], "effects": {"a": EFFECT, "b": EFFECT}, "seed": 1, "settings": {}, "note": ""},
    **{"versions": {}, "mean_gain_on_unseen": {}},
}
SOUND = {SUMMARY_NAME: SUMMARY, REPORT_NAME: REPORT, BASELINE_NAME: REPORT, TRANSFER_NAME: TRANSFER}
#: What stands instead of any value.
WRONG = (None, True, -1, 10**30, float("nan"), float("inf"), "x", [], [1], ["x"], [[]], {}, {"x": 1}, {"x": {}})


def changed(name: str, **values: object):
    """A report with other values; REMOVED ones are taken out."""
    return written(name, json.dumps(SOUND[name] | values).encode())


ATTACKS = table(
    *(
        Attack(f"{name}-{number}", written(name, content), "xpected", PeftVLMError)
        for name in SOUND
        for number, content in enumerate((b"", b"[]", b"3", b"null", b"\xff", b"[" * 10**5, b"9" * 5000, b" " * 2**25))
    ),
    *(Attack(f"{name}-is-a-pipe", piped(name), "got something else", AdapterError) for name in SOUND),
    *(Attack(f"{name}-linked-out", linked(name, "/etc/hostname"), "its own folder", AdapterError) for name in SOUND),
    *(
        Attack(f"{name}-{key}-is-{value!r}", changed(name, **{key: value}), "xpected", PeftVLMError)
        for name, key, value in (
            (SUMMARY_NAME, "data", {"num_images": "3", "num_classes": 2}),
            (SUMMARY_NAME, "data", {"num_images": 3}),
            (SUMMARY_NAME, "data", [3]),
            (SUMMARY_NAME, "training_images", {"sample": "text"}),
            (SUMMARY_NAME, "training_images", {"sample": [3], "count": 1}),
            (SUMMARY_NAME, "training_images", {"sample": [], "count": "3"}),
            (SUMMARY_NAME, "steps", "4"),
            (SUMMARY_NAME, "epochs", "4"),
            (REPORT_NAME, "scores", {}),
            (REPORT_NAME, "scores", {"accuracy": "50"}),
            (REPORT_NAME, "scores", {"accuracy": float("nan")}),
            (REPORT_NAME, "parts", {"all": {}}),
            (REPORT_NAME, "parts", {"all": {"num_images": "3"}}),
            (REPORT_NAME, "template", "a {}"),
            (REPORT_NAME, "template", [1]),
            (REPORT_NAME, "dataset", ["d"]),
            (REPORT_NAME, "unknown", 3),
            (TRANSFER_NAME, "effects", {"a": {"full_size": "1"}}),
            (TRANSFER_NAME, "effects", {}),
            (TRANSFER_NAME, "sources", "ab"),
        )
    ),
)  # fmt: skip


def look(folder: Path) -> None:
    """Every reader of reports: the card and its publication, and `info`."""
    adapter = AdapterFolder.read(folder)
    render_card(adapter, repo_id="a/b", license=None)


@pytest.fixture(scope="module")
def results(sound, tmp_path_factory):
    """What came of each attack."""
    folders = {}
    for number, (name, attack) in enumerate(ATTACKS.items()):
        folder = Path(shutil.copytree(sound / "coop", tmp_path_factory.mktemp("reports") / str(number)))
        file = name.partition(".json")[0] + ".json"
        for other in (SUMMARY_NAME, REPORT_NAME, BASELINE_NAME) if file != TRANSFER_NAME else (TRANSFER_NAME,):
            (folder / other).write_text(json.dumps(SOUND[other]))
        attack.make(folder)
        folders[name] = folder
    return outcomes(__name__, "look", folders, tmp_path_factory.mktemp("log") / "log", error=ANY[1])


@pytest.mark.parametrize("name", ATTACKS)
def test_a_strangers_report_is_refused(results, name):
    """A traceback out of a format of numbers, or what a link leads to on a published card."""
    assert not results[name], results[name][-800:]


@pytest.mark.parametrize("name", SOUND)
def test_any_value_is_taken_or_refused(copy_of, name, capsys):
    """Each entry with each wrong type: a card, or an error of ours; `info` as well."""
    for key in SOUND[name]:
        for value in WRONG:
            folder = copy_of("coop")
            for other in (SUMMARY_NAME, REPORT_NAME, BASELINE_NAME) if name != TRANSFER_NAME else (TRANSFER_NAME,):
                (folder / other).write_text(json.dumps(SOUND[other]))
            changed(name, **{key: value})(folder)
            try:
                look(folder)
            except PeftVLMError as error:
                assert "xpected" in str(error)  # noqa: PT017 - most values may be either
            assert main(["info", str(folder)]) in (0, 2)
            shutil.rmtree(folder)
    capsys.readouterr()


def test_sound_reports_are_read(copy_of):
    """What the attacks begin from."""
    folder = copy_of("coop")
    for name in (SUMMARY_NAME, REPORT_NAME, BASELINE_NAME):
        (folder / name).write_text(json.dumps(SOUND[name]))
    assert "50.00 | 50.00" in str(render_card(AdapterFolder.read(folder), repo_id="a/b", license=None))
    (folder / TRANSFER_NAME).write_text(json.dumps(TRANSFER))
    assert TransferReport.load(folder / TRANSFER_NAME).unseen == ("b",)
    assert EvalReport.load(folder / REPORT_NAME).scores == {"accuracy": 50.0}


@pytest.mark.parametrize("name", [*SOUND, METRICS_NAME, CURVE_NAME, FACTS_NAME, "class_names.txt", "confusion_a.png"])
def test_nothing_outside_the_folder_is_published(copy_of, tmp_path, name):
    """A link called `training_curve.png` would have put a private key on the Hub."""
    folder, secret = copy_of("coop"), tmp_path / "secret"
    secret.write_text("a private key")
    linked(name, str(secret))(folder)
    (tmp_path / "target").mkdir()
    try:
        write_folder(AdapterFolder.read(folder), tmp_path / "target", repo_id="a/b", license="mit")
    except (AdapterError, DataError) as error:
        assert "from its own folder" in str(error)  # noqa: PT017 - a file that is not read is not published either
    for path in (tmp_path / "target").iterdir():
        assert "a private key" not in path.read_bytes().decode(errors="replace")


def test_nothing_is_written_through_a_link(tmp_path):
    """An evaluation into a stranger's folder would have overwritten what its links lead to."""
    victim, folder = tmp_path / "victim", tmp_path / "folder"
    folder.mkdir()
    victim.write_text("mine")
    names = ["a.json", "names.txt", "bars.png", "confusion.png"]
    for name in names:
        for suffix in ("", ".part"):
            (folder / f"{name}{suffix}").symlink_to(victim)
    write_json(folder / names[0], {"a": 1})
    write_class_names(folder / names[1], ["a"])
    bars_png({"a": {"b": 1.0}}, folder / names[2])
    confusion_matrix_png(torch.eye(2, dtype=torch.int64), ["a", "b"], folder / names[3])
    assert victim.read_text() == "mine"
    assert not any(path.is_symlink() for path in folder.iterdir())
    assert sorted(path.name for path in folder.iterdir()) == sorted(names)


def test_an_evaluation_and_a_card_leave_what_links_lead_to(copy_of, tmp_path):
    """The whole command, in a folder whose every file to be written is a link."""
    folder, victim = copy_of("skip_tuning"), tmp_path / "victim"
    victim.write_text("mine")
    written_by_it = [REPORT_NAME, BASELINE_NAME, "scores.png", "confusion_all.png", "predictions.csv"]
    for name in written_by_it:
        linked(name, str(victim))(folder)
        linked(f"{name}.part", str(victim))(folder)
    dataset = write_images(tmp_path / "colours")
    arguments = EvaluationArguments(
        protocol="zero-shot", dataset=[str(dataset)], adapter=str(folder), output_dir=str(folder)
    )
    arguments.baseline, arguments.save_predictions = True, True
    run_evaluation(arguments)
    linked(CARD_NAME, str(victim))(folder)
    with pytest.raises(AdapterError, match="from its own folder"):
        write_card(folder)
    without(CARD_NAME)(folder)
    (folder / f"{CARD_NAME}.part").symlink_to(victim)
    write_card(folder)
    assert victim.read_text() == "mine"
    for name in (*written_by_it, CARD_NAME):
        assert not (folder / name).is_symlink()


@pytest.mark.parametrize(
    "head", ["license: [a]", "license: {a: b}", "license: \x1b", "a: [", "a: &a [*a]", "- a", ":"]
)
def test_a_card_that_is_there_is_no_trap(copy_of, head):
    """A card is written again after each evaluation, with the licence of the one before."""
    folder = copy_of("coop")
    (folder / CARD_NAME).write_text(f"---\n{head}\n---\n# x\n")
    write_card(folder)
    assert "\x1b" not in (folder / CARD_NAME).read_text()
    os.remove(folder / CARD_NAME)
