"""`peft-vlm reproduce`: plans like the papers', grids that survive a kill, tables that say what was compared."""

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from statistics import fmean
from typing import Any

import pytest
from transformers import AutoTokenizer, CLIPConfig, CLIPModel, CLIPProcessor

from peft_vlm.cli import main
from peft_vlm.data import BENCHMARKS, SKIP_TUNING_TEMPLATES
from peft_vlm.errors import DataError, PeftVLMWarning
from peft_vlm.evaluation.metrics import harmonic_mean
from peft_vlm.experiments.cells import finished_cell
from peft_vlm.experiments.comparison import Line
from peft_vlm.experiments.recipes import AVERAGE, ELEVEN, Grid, grid_of, read_recipe, recipe_names
from peft_vlm.files import locked_folder
from peft_vlm.methods.promptkd.objective import LOW_WEIGHT_DATASETS
from peft_vlm.methods.promptsrc.objective import LATE_MEAN
from peft_vlm.methods.skip_tuning.objective import QUARTER_EPOCHS
from peft_vlm.registry import METHODS
from peft_vlm.settings import TABLES
from tests.benchmark_trees import put_image, write_trees
from tests.source_tree import ROOT
from tests.tiny import clip_processor
from tests.tiny_questions import llava_processor, tiny_llava

#: Two runs of a second each.
SMALL = ["coop", "--stand-in", "--datasets", "emoji", "--seeds", "1", "2", "--protocol", "base_to_new"]
SMALL += ["--max_steps", "2", "--use_cpu"]
#: Runs of the papers' tables: data sets x shots x seeds, with the teachers of PromptKD.
RUNS = {"base_to_new": 11 * 3, "few_shot": 11 * 5 * 3, "cross_dataset": 3, "domain_shift": 3}
RUNS_OF: dict[tuple[str, str], int] = {
    ("promptkd", "base_to_new"): 11 + 11 * 3,
    ("promptkd", "cross_dataset"): 1 + 10 * 3,
    ("promptkd", "domain_shift"): 1 + 4 * 3,
    ("rpp", "cross_dataset"): 1,
    ("rpp", "domain_shift"): 1,
    ("tvp", "mllm_transfer"): 1,
}


#: The paper's own H is another than that of its base and new accuracies.
PRINTED_OTHERWISE = {("promptkd", "stanford_cars"), ("promptkd", "ucf101")}


def all_grids() -> list[Grid]:
    """The grid of every protocol of every recipe."""
    return [grid_of(method, protocol) for method in recipe_names() for protocol in read_recipe(method)["protocols"]]


def table_of(folder: Path) -> dict[str, Any]:
    """The table of a folder."""
    return json.loads((folder / "table.json").read_text())


@pytest.mark.parametrize("grid", all_grids(), ids=lambda grid: f"{grid.method}-{grid.protocol}")
def test_a_plan_has_as_many_runs_as_the_paper(grid: Grid, capsys: pytest.CaptureFixture[str]) -> None:
    """A grid that lacks a seed or a data set would be compared with an average that has it."""
    assert main(["reproduce", grid.method, "--protocol", grid.protocol, "--plan", "--json"]) == 0
    plan = json.loads(capsys.readouterr().out)
    runs = RUNS_OF.get((grid.method, grid.protocol), RUNS[grid.protocol] if grid.protocol in RUNS else 0)
    assert plan["runs"] == runs == sum(row["runs"] for row in plan["rows"])
    assert all(row["images"] > 0 and row["steps"] > 0 and row["tests"] > 0 for row in plan["rows"])


def test_every_method_has_a_recipe() -> None:
    """A method without one could not be compared with its paper, and nothing would say so."""
    assert set(recipe_names()) == set(METHODS)


def test_a_plan_counts_images_and_steps_of_the_paper(capsys: pytest.CaptureFixture[str]) -> None:
    """Hours are estimated from it: 16 shots of the 24 base classes of DTD, 4 a step, 20 epochs, are 1,920 steps."""
    words = ["--protocol", "base_to_new", "--plan", "--json", "--datasets", "dtd", "imagenet"]
    assert main(["reproduce", "skip_tuning", *words]) == 0
    imagenet, dtd = json.loads(capsys.readouterr().out)["rows"]
    assert (dtd["images"], dtd["steps"], dtd["tests"]) == (16 * 24, 16 * 24 // 4 * 20, 1_692)
    assert (imagenet["images"], imagenet["steps"]) == (16 * 500, 16 * 500 // 4 * 5), "a quarter of the epochs"
    assert main(["reproduce", "promptkd", *words[:4], "--datasets", "stanford_cars"]) == 0
    cars = json.loads(capsys.readouterr().out)["rows"][-1]
    assert cars["steps"] == 6_509 // 8 * 20, "its preset drops a batch that is not full"


@pytest.mark.parametrize("switch", ["--stand-in", "--stand_in", "--use_cpu", "--json", "--plan"])
def test_the_method_may_stand_behind_a_switch(switch: str, capsys: pytest.CaptureFixture[str]) -> None:
    """Read as the switch's value, the method would be missing, and the message would speak of true and false."""
    words = ["--seeds", "1", "--plan", "--json"]
    assert main(["reproduce", switch, "coop", *words]) == main(["reproduce", *words, switch, "coop"]) == 0
    first, _, second = capsys.readouterr().out.partition("}\n{")
    assert json.loads(first + "}") == json.loads("{" + second)
    assert json.loads(first + "}")["method"] == "coop"
    assert main(["reproduce", switch, "coopp", *words]) == 2
    assert "Did you mean 'coop'" in capsys.readouterr().err
    assert main(["reproduce", "--use_cpu", "false", "coop", *words]) == 0


def test_what_the_paper_does_not_report_is_refused_by_name(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Hours of training for a table that has nothing to compare with."""
    assert main(["reproduce", "clip_lora", "--protocol", "base_to_new", "--plan"]) == 2
    assert "does not report 'base_to_new'" in capsys.readouterr().err
    assert main(["reproduce", "coopp", "--plan"]) == 2
    assert "Did you mean 'coop'" in capsys.readouterr().err
    assert main(["reproduce", "coop", "--plan", "--datasets", "dtdd"]) == 2
    assert "'dtdd'" in capsys.readouterr().err
    assert main(["reproduce", "coop", "--plan", "--teacher", "m"]) == 2
    assert "has no teacher" in capsys.readouterr().err
    assert main(["reproduce", "coop", "--select-on-test-as-official", "--plan"]) == 2
    assert "does not select on test images" in capsys.readouterr().err
    assert main(["reproduce", "coop", "--seed", "1", "--plan"]) == 2
    assert "Expected `--seeds`" in capsys.readouterr().err
    assert main(["reproduce", "coop", "--output_dir", str(tmp_path / "new")]) == 2
    assert "Expected `--data_root`, the folder of all data sets, got none" in capsys.readouterr().err
    assert not (tmp_path / "new/table.md").exists()
    assert main(["reproduce", "coop"]) == 2
    assert "output_dir" in capsys.readouterr().err


@pytest.mark.parametrize("protocol", TABLES)
def test_published_numbers_recompute_to_the_printed_averages(protocol: str) -> None:
    """A digit that was copied wrongly would be reported as our failure to reproduce."""
    checked = 0
    for grid in all_grids():
        if grid.protocol != protocol:
            continue
        for row, scores in grid.published.items():
            assert row in (*grid.rows, *grid.averages), f"{grid.method}: no row {row!r}"
            assert set(scores) <= set(grid.columns)
            if set(scores) == {"base", "new", "h"} and (grid.method, row) not in PRINTED_OTHERWISE:
                assert harmonic_mean(scores["base"], scores["new"]) == pytest.approx(scores["h"], abs=0.011), row
                checked += 1
        for average, rows in grid.averages.items():
            for column in set(grid.columns) - {"h"}:
                known = [grid.published.get(row, {}).get(column) for row in (average, *rows)]
                if None not in known:
                    rounding = 0.051 if all(round(number, 1) == number for number in known) else 0.011
                    assert fmean(known[1:]) == pytest.approx(known[0], abs=rounding), f"{grid.method}: {average}"
                    checked += 1
    assert checked >= {"base_to_new": 90, "few_shot": 3, "cross_dataset": 6, "domain_shift": 7}.get(protocol, 0)


def test_recipes_name_what_is_there() -> None:
    """A misspelt data set or preset would be found after hours, in the run that needs it."""
    for grid in all_grids():
        method = METHODS[grid.method]
        for cell in grid.cells:
            one = METHODS[cell.settings["method"]]
            assert cell.settings.get("preset") in (None, *one.presets), cell
        for standard in ("base_to_new", "few_shot"):
            if grid.protocol == standard and not grid.averages.get(AVERAGE):
                assert len(grid.rows) % len(ELEVEN) == 0, method.name


def test_recipes_agree_with_the_official_lists() -> None:
    """Epochs, weights, templates stand in the methods' code as well; a table trained with others is another."""

    def settings(method: str, protocol: str, name: str, part: str) -> dict[str, Any]:
        """What a recipe adds to the preset of a data set."""
        return {cell.row: getattr(cell, part) for cell in grid_of(method, protocol).cells}[name]

    for name in ELEVEN:
        quarter = {"num_train_epochs": 5} if name in QUARTER_EPOCHS else {}
        assert settings("skip_tuning", "base_to_new", name, "training") == quarter, name
        skip = SKIP_TUNING_TEMPLATES.get(name, BENCHMARKS[name].template)
        assert settings("skip_tuning", "base_to_new", name, "settings")["template"] == skip
        weight = ["weight=200"] if name in LOW_WEIGHT_DATASETS else None
        assert settings("promptkd", "base_to_new", name, "settings").get("objective") == weight
        late = "few_shot_late" if name in LATE_MEAN else "few_shot"
        assert settings("promptsrc", "few_shot", f"{name}, 16 shots", "settings")["preset"] == late
        anchors = settings("kgcoop", "base_to_new", name, "settings").get("anchors", ["a photo of a {}."])
        assert anchors == [BENCHMARKS[name].template]
        assert settings("atprompt", "base_to_new", name, "settings")["preset"] == name
    for name, target in grid_of("skip_tuning", "domain_shift").cells[0].targets.items():
        assert target.get("template", "a photo of a {}.") == SKIP_TUNING_TEMPLATES.get(name, BENCHMARKS[name].template)


@pytest.mark.parametrize(
    ("values", "paper", "verdict"),
    [
        ([80.0, 81.0, 82.0], 82.9, "within"),
        ([80.0, 81.0, 82.0], 83.1, "below"),
        ([80.0, 81.0, 82.0], 78.9, "above"),
        ([80.0, 80.0, 80.0], 80.04, "within"),
        ([80.0, 81.0], 81.0, "-"),
        ([80.0], 80.0, "-"),
        ([80.0, 81.0, 82.0], None, "-"),
        ([], 80.0, "not run"),
    ],
)
def test_verdicts_follow_the_spread_of_our_seeds(values: list[float], paper: float | None, verdict: str) -> None:
    """A verdict from too few seeds, or within any distance, would say that a paper reproduces."""
    line = Line("dtd", "accuracy", dict(enumerate(values)), fmean(values) if values else None, paper, wanted=3)
    assert line.verdict == verdict


def test_a_killed_grid_continues_and_its_table_equals_an_unbroken_one(finished: Path, tmp_path: Path) -> None:
    """Days of training would begin anew, or a half-written run would count."""
    whole, broken = finished, tmp_path / "broken"
    kill_when(broken / "emoji/seed1/cell.json", SMALL, broken)
    first = (broken / "emoji/seed1/cell.json").stat().st_mtime_ns
    assert main(["reproduce", *SMALL, "--output_dir", str(broken)]) == 0
    assert (broken / "emoji/seed1/cell.json").stat().st_mtime_ns == first
    assert table_of(broken) == table_of(whole)
    assert (broken / "table.md").read_text() == (whole / "table.md").read_text()
    assert "nothing to compare with" in (whole / "table.md").read_text()
    assert "max_steps=2" in (whole / "table.md").read_text()
    assert (whole / "table.png").stat().st_size > 1000
    assert (whole / "emoji/seed2/adapter_model.safetensors").is_file()
    assert {row["verdict"] for row in table_of(whole)["rows"] if row["row"] == "emoji"} == {"-"}
    assert {row["verdict"] for row in table_of(whole)["rows"] if row["row"] == "icons"} == {"not run"}


@pytest.fixture(scope="module")
def finished(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A grid that nothing interrupted; tests change copies."""
    folder = tmp_path_factory.mktemp("grid") / "done"
    assert main(["reproduce", *SMALL, "--output_dir", str(folder)]) == 0
    return folder


def test_a_folder_keeps_its_table_and_its_settings(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Cells of two recipes, or of two learning rates, would be averaged."""
    before = {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()}
    other = ["--stand-in", "--datasets", "emoji", "--seeds", "1", "--use_cpu", "--output_dir", str(finished)]
    assert main(["reproduce", "kgcoop", *other, "--max_steps", "2"]) == 2
    assert "holds the table of 'coop', 'base_to_new', stand-in" in capsys.readouterr().err
    assert main(["reproduce", "coop", "--protocol", "few_shot", *other, "--max_steps", "2"]) == 2
    assert "Pass another `--output_dir`" in capsys.readouterr().err
    assert main(["reproduce", "coop", "--protocol", "base_to_new", *other, "--max_steps", "3"]) == 2
    assert "holds the run of other settings: changes {'max_steps': '2'} before" in capsys.readouterr().err
    assert {path: path.read_bytes() for path in finished.rglob("*") if path.is_file()} == before


def test_a_cell_of_an_earlier_version_counts(finished: Path, tmp_path: Path) -> None:
    """A setting that a later version adds would end a grid of weeks, though nothing has changed."""
    folder = Path(shutil.copytree(finished / "emoji/seed1", tmp_path / "seed1"))
    cell = json.loads((folder / "cell.json").read_text())
    wanted = dict(cell["settings"])
    del cell["settings"]["holdout"]
    (folder / "cell.json").write_text(json.dumps(cell))
    assert finished_cell(folder, wanted) == cell
    with pytest.raises(DataError, match=r"holdout 0.2 before, 0.5 now"):
        finished_cell(folder, wanted | {"holdout": 0.5})


@pytest.mark.parametrize(
    "content",
    [
        *(b"", b"{", b"[]", b'{"scores": {"base": "x"}, "settings": {}}', b"\xff"),
        b'{"scores": {}, "settings": {}}',
        b'{"scores": {"base": 50.0, "h": 50.0}, "settings": {}}',
        b'{"scores": {"base": 500.0, "new": 50.0, "h": 50.0}, "settings": {}}',
        b'{"scores": {"base": 50.0, "new": 50.0, "h": 50.0}, "settings": []}',
    ],
)
def test_a_damaged_result_is_said_and_run_again(content: bytes, finished: Path, tmp_path: Path) -> None:
    """Half a file would end the grid, or count as a run."""
    folder = Path(shutil.copytree(finished, tmp_path / "copy"))
    whole = json.loads((folder / "emoji/seed1/cell.json").read_text())
    (folder / "emoji/seed1/cell.json").write_bytes(content)
    (folder / "table.json").write_bytes(content)
    with pytest.warns(PeftVLMWarning, match=r"cell.json' is damaged: the cell is run again"):
        found = finished_cell(folder / "emoji/seed1", whole["settings"], columns=("base", "new", "h"))
    assert found is None
    if content == b"{":
        with pytest.warns(PeftVLMWarning, match="is damaged"):
            assert main(["reproduce", *SMALL, "--output_dir", str(folder)]) == 0
        assert json.loads((folder / "emoji/seed1/cell.json").read_text())["scores"] == whole["scores"]
        assert table_of(folder) == table_of(finished)


def test_a_run_that_was_stopped_continues_from_its_checkpoint(tmp_path: Path) -> None:
    """A run of a day would begin at its first step."""
    words = [*SMALL, "--seeds", "1", "--save_strategy", "steps", "--save_steps", "1", "--output_dir", str(tmp_path)]
    assert main(["reproduce", *words]) == 0
    run, whole = tmp_path / "emoji/seed1", table_of(tmp_path)
    weights = (run / "adapter_model.safetensors").read_bytes()
    for path in [path for path in run.iterdir() if path.name != "checkpoint-1"]:
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    first_step = (run / "checkpoint-1/adapter_model.safetensors").stat().st_mtime_ns
    assert main(["reproduce", *words]) == 0
    assert (run / "checkpoint-1/adapter_model.safetensors").stat().st_mtime_ns == first_step
    assert (run / "adapter_model.safetensors").read_bytes() == weights
    assert table_of(tmp_path) == whole


def test_a_second_process_is_refused(finished: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Two processes would write one run."""
    with locked_folder(finished, is_main=True, tell=lambda problem: problem):
        assert main(["reproduce", *SMALL, "--output_dir", str(finished)]) == 2
    assert "for this run alone, got another run in it" in capsys.readouterr().err


@pytest.mark.slow
def test_a_full_disk_ends_the_grid_and_what_was_done_stays(tmp_path: Path) -> None:
    """Every further run would be trained, and fail at its last file."""
    if os.geteuid() != 0 or os.system(f"mount -t tmpfs -o size=400k tmpfs {tmp_path} 2>/dev/null"):
        pytest.skip("mounting a tmpfs needs root and a system that lets tests do it")
    try:
        done = subprocess.run(command_of(SMALL, tmp_path / "grid"), env=ENVIRON, capture_output=True, text=True)
        assert done.returncode == 2, done.stderr
        assert "No space left on device" in done.stderr
        assert "Free some room" in done.stderr
        table = table_of(tmp_path / "grid")
        assert table["failed"] == {}
        assert [row["ours"]["values"].keys() for row in table["rows"] if row["ours"]][:1] == [{"1"}]
    finally:
        os.system(f"umount {tmp_path}")


@pytest.mark.slow
@pytest.mark.parametrize("stop", [signal.SIGINT, signal.SIGKILL])
def test_a_grid_stopped_at_random_moments_ends_with_the_same_table(stop: signal.Signals, tmp_path: Path) -> None:
    """Where a run stands when it is killed must not matter: reading, training, measuring, writing."""
    words = [*SMALL, "--datasets", "emoji", "icons", "--seeds", "1", "2", "3"]
    assert main(["reproduce", *words, "--output_dir", str(tmp_path / "whole")]) == 0
    moments = random.Random(0)
    for _ in range(5):
        process = subprocess.Popen(
            command_of(words, tmp_path / "broken"), env=ENVIRON, stderr=subprocess.PIPE, stdout=subprocess.DEVNULL
        )
        try:
            _, printed = process.communicate(timeout=moments.uniform(8, 40))
        except subprocess.TimeoutExpired:
            process.send_signal(stop)
            _, printed = process.communicate()
            assert process.returncode in ((130, 0) if stop == signal.SIGINT else (-stop, 0)), printed.decode()
    assert main(["reproduce", *words, "--output_dir", str(tmp_path / "broken")]) == 0
    assert table_of(tmp_path / "broken") == table_of(tmp_path / "whole")
    assert (tmp_path / "broken/table.md").read_text() == (tmp_path / "whole/table.md").read_text()


ENVIRON = os.environ | {"PYTHONPATH": str(ROOT)}


def command_of(words: list[str], folder: Path) -> list[str]:
    """A grid as a process of its own."""
    return [sys.executable, "-m", "peft_vlm.cli", "reproduce", *words, "--output_dir", str(folder)]


def kill_when(path: Path, words: list[str], folder: Path) -> None:
    """Start a grid, and kill it as soon as a file is there."""
    quiet = {"stdout": subprocess.DEVNULL, "stderr": subprocess.DEVNULL}
    with subprocess.Popen(command_of(words, folder), env=ENVIRON, **quiet) as process:
        deadline = time.monotonic() + 240
        while not path.exists() and process.poll() is None and time.monotonic() < deadline:
            time.sleep(0.05)
        process.send_signal(signal.SIGKILL)
        assert process.wait() in (-signal.SIGKILL, 0)
    assert path.exists()


def save_clip(folder: Path, *, width: int = 32, heads: int = 2, size: int = 32, patch: int = 8, dim: int = 16) -> str:
    """A random CLIP of 12 layers in both towers, as the official settings expect, with the bundled vocabulary."""
    tokenizer = AutoTokenizer.from_pretrained(ROOT / "examples/assets/clip_student")
    ends = {"bos_token_id": tokenizer.bos_token_id, "eos_token_id": tokenizer.eos_token_id}
    tower = {"intermediate_size": 4 * width, "num_hidden_layers": 12}
    text = {"hidden_size": min(width, 512), "num_attention_heads": min(heads, 8), "vocab_size": len(tokenizer)} | ends
    vision = {"hidden_size": width, "num_attention_heads": heads, "image_size": size, "patch_size": patch}
    config = CLIPConfig(text_config=tower | text, vision_config=tower | vision, projection_dim=dim)
    CLIPModel(config).save_pretrained(folder)
    CLIPProcessor(image_processor=clip_processor(size), tokenizer=tokenizer).save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def root(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Trees of all benchmarks in `DATA`, with a few classes of ImageNet-21K and CIFAR-10; two narrow CLIPs."""
    root = tmp_path_factory.mktemp("reproduce")
    write_trees(root / "DATA")
    for name, parts in {"imagenet21k": ("train", "val"), "cifar10": ("train", "test")}.items():
        for number, (part, label) in enumerate((part, label) for part in parts for label in ("cat", "dog", "ship")):
            put_image(root / "DATA" / name / part / label / f"{number}.png")
    save_clip(root / "clip")
    save_clip(root / "teacher", dim=24)
    return root


def run_small(
    root: Path, output: Path, method: str, protocol: str, *words: str, clip: str = "clip", teacher: str = "teacher"
) -> int:
    """Two steps per run on the miniature trees."""
    flags = [
        "--protocol",
        protocol,
        "--data_root",
        str(root / "DATA"),
        "--model",
        str(root / clip),
        "--max_steps",
        "2",
    ]
    flags += ["--teacher", str(root / teacher)] if "teacher" in read_recipe(method) else []
    return main(["reproduce", method, *flags, "--use_cpu", "--output_dir", str(output), *words])


def test_a_benchmark_that_is_missing_is_named_and_the_others_run(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """A night of runs would end at the first folder that was not unpacked."""
    (root / "DATA/dtd").rename(root / "elsewhere")
    try:
        words = ["--datasets", "dtd", "caltech101", "--seeds", "1"]
        assert run_small(root, tmp_path, "skip_tuning", "base_to_new", *words) == 2
    finally:
        (root / "elsewhere").rename(root / "DATA/dtd")
    error = capsys.readouterr().err
    assert "1 failed, all others are done: dtd/seed1" in error
    table = table_of(tmp_path)
    assert "The benchmark 'dtd' lacks" in table["failed"]["dtd/seed1"]
    rows = {(row["row"], row["column"]): row for row in table["rows"]}
    assert rows["caltech101", "base"]["ours"]["values"].keys() == {"1"}
    assert rows["dtd", "base"]["verdict"] == rows[AVERAGE, "h"]["verdict"] == "not run"
    assert "max_steps=2" in table["notes"][0]
    template = json.loads((tmp_path / "caltech101/seed1/adapter_config.json").read_text())["template"]
    assert template == "itap of a {}.", "Skip Tuning's template, not CoOp's"
    assert run_small(root, tmp_path, "skip_tuning", "base_to_new", *words) == 0, "the failed run is run again"
    assert rows["caltech101", "base"] in table_of(tmp_path)["rows"]


def test_a_teacher_is_trained_first_and_teaches_the_students_of_its_data_set(root: Path, tmp_path: Path) -> None:
    """A student of an untrained teacher, or of another data set's, would look like a failed reproduction."""
    words = ["--datasets", "imagenet_a", "--seeds", "1", "2"]
    assert run_small(root, tmp_path, "promptkd", "domain_shift", *words) == 0
    settings = json.loads((tmp_path / "imagenet_a/seed2/cell.json").read_text())["settings"]
    assert settings["teacher_adapter"] == "teacher/imagenet/seed1"
    assert settings["transductive"]
    assert settings["split"] == "test"
    config = json.loads((tmp_path / "teacher/imagenet/seed1/adapter_config.json").read_text())
    assert len(config["class_names"]) == 5, "all classes of the source"
    rows = {row["row"]: row for row in table_of(tmp_path)["rows"]}
    assert list(rows) == ["imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r", AVERAGE, "teacher, imagenet"]
    assert len(rows["imagenet_a"]["ours"]["values"]) == 2
    assert rows[AVERAGE]["verdict"] == "not run", "the paper's average is over all four"
    assert "Transductive" in " ".join(table_of(tmp_path)["notes"])


def test_only_the_official_switch_selects_on_test_images(root: Path, tmp_path: Path) -> None:
    """Numbers that were chosen on test images would stand beside honest ones, unmarked."""
    words = ["--datasets", "eurosat", "--seeds", "1"]
    with pytest.warns(PeftVLMWarning, match="The checkpoint is chosen on the test images"):
        assert run_small(root, tmp_path, "promptkd", "base_to_new", *words, "--select-on-test-as-official") == 0
    report = json.loads((tmp_path / "eurosat/seed1/report.json").read_text())
    assert report["selected_on_test"]
    assert not json.loads((tmp_path / "teacher/eurosat/seed1/report.json").read_text())["selected_on_test"]
    selection = json.loads((tmp_path / "eurosat/seed1/training_summary.json").read_text())["selection"]
    assert len(selection["sample"]) == 2, "test images of the two base classes; labels of the new one choose nothing"
    assert "chosen on test images" in (tmp_path / "table.md").read_text()
    assert run_small(root, tmp_path, "promptkd", "base_to_new", *words) == 2, "the cells are not those of this table"


def test_one_source_is_tested_on_all_targets(root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Ten trainings instead of one, or a training lost for a target that was not unpacked, cost days."""
    (root / "DATA/dtd").rename(root / "elsewhere")
    try:
        assert run_small(root, tmp_path, "coop", "cross_dataset", "--seeds", "1") == 2
    finally:
        (root / "elsewhere").rename(root / "DATA/dtd")
    assert "imagenet/seed1 on dtd" in capsys.readouterr().err
    verdicts = {row["row"]: row["verdict"] for row in table_of(tmp_path)["rows"]}
    assert (verdicts["dtd"], verdicts[AVERAGE], verdicts["eurosat"]) == ("not run", "not run", "-")
    trained = (tmp_path / "imagenet/seed1/adapter_model.safetensors").stat().st_mtime_ns
    assert run_small(root, tmp_path, "coop", "cross_dataset", "--seeds", "1") == 0
    assert (tmp_path / "imagenet/seed1/adapter_model.safetensors").stat().st_mtime_ns == trained
    rows = {row["row"]: row["ours"] for row in table_of(tmp_path)["rows"]}
    assert list(rows) == [*ELEVEN, AVERAGE]
    targets = [rows[name]["mean"] for name in ELEVEN[1:]]
    assert rows[AVERAGE]["mean"] == pytest.approx(fmean(targets)), "without the source"
    report = json.loads((tmp_path / "imagenet/seed1/report.json").read_text())
    assert report["protocol"] == "cross-dataset"
    assert report["parts"]["ucf101"]["num_classes"] == 3


def test_a_training_stays_whatever_cannot_be_read_for_its_test(
    root: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """Without test images of the source, or of all targets, the run was thrown away after its training."""
    words = ["--seeds", "1", "--datasets", "dtd"]
    for number, missing in enumerate(("imagenet/images/val", "dtd"), start=1):
        (root / "DATA" / missing).rename(root / "elsewhere")
        try:
            assert run_small(root, tmp_path / str(number), "coop", "cross_dataset", *words) == 2
        finally:
            (root / "elsewhere").rename(root / "DATA" / missing)
        assert f"imagenet/seed1 on {missing.partition('/')[0]}" in capsys.readouterr().err
        adapter = tmp_path / str(number) / "imagenet/seed1/adapter_model.safetensors"
        trained = adapter.stat().st_mtime_ns
        assert run_small(root, tmp_path / str(number), "coop", "cross_dataset", *words) == 0
        assert adapter.stat().st_mtime_ns == trained
        rows = {row["row"]: row["ours"] for row in table_of(tmp_path / str(number))["rows"]}
        assert rows["imagenet"], "the source is measured too"
        assert rows["dtd"]


@pytest.mark.slow
@pytest.mark.parametrize("method", sorted({*recipe_names()} - {"tvp"}))
def test_a_run_at_real_size_works_for_every_method(method: str, root: Path, tmp_path: Path) -> None:
    """A recipe whose official settings do not fit ViT-B/16 would fail on the user's GPU, hours in."""
    size = {"width": 768, "heads": 12, "size": 224, "patch": 16, "dim": 512}
    save_clip(root / "vit", **size)
    save_clip(root / "vit_teacher", **size | {"width": 96, "heads": 3, "dim": 24})
    protocol = "cross_dataset" if method == "rpp" else next(iter(read_recipe(method)["protocols"]))
    words = ["--datasets", "caltech101", *(() if method == "rpp" else ("--seeds", "1"))]
    assert run_small(root, tmp_path, method, protocol, *words, clip="vit", teacher="vit_teacher") == 0
    done = [row for row in table_of(tmp_path)["rows"] if row["ours"]]
    assert {row["row"].partition(",")[0] for row in done} >= {"caltech101"}


def test_a_pixel_prompt_is_trained_on_one_model_and_measured_on_another(root: Path, tmp_path: Path) -> None:
    """The recipe's loss needs a CLIP, and its data set has columns of its own."""
    for seed, name in enumerate(("llava", "DATA/blip2-flan-t5-xl")):
        tiny_llava(seed=seed).save_pretrained(root / name)
        llava_processor().save_pretrained(root / name)
    assert run_small(root, tmp_path, "tvp", "mllm_transfer", clip="llava") == 0
    rows = {(row["row"], row["column"]): row["ours"]["mean"] for row in table_of(tmp_path)["rows"]}
    assert len(rows) == 2 * 3, "two models under three conditions"
    report = json.loads((tmp_path / "instructblip/seed42/transfer.json").read_text())
    assert report["sources"] == ["instructblip"]
    assert rows["blip2_t5", "prompted"] == report["effects"]["blip2_t5"]["prompted"]
    settings = json.loads((tmp_path / "instructblip/seed42/training_summary.json").read_text())["objective"]
    assert (settings["fca_weight"], settings["tse_weight"]) == (0.005, 0.001)
