"""What is loaded when: help, wrong flags and exported classifiers answer without torch; PEFT knows the methods anyway.

Modules are counted, not seconds.
"""

import json
import os
import pickle
import subprocess
import sys

import pytest

from peft_vlm import SkipTuningConfig
from peft_vlm.cli import main
from peft_vlm.cli.convert import KINDS
from peft_vlm.cli.export import FORMATS as EXPORT_FLAGS
from peft_vlm.evaluation.run import SEVERAL, SINGLE
from peft_vlm.export import FORMATS as EXPORTS
from peft_vlm.registry import ADAPTERS
from peft_vlm.settings import PROTOCOLS
from tests.cli.test_train import save_clip
from tests.source_tree import PACKAGE, ROOT, python_modules
from tests.tiny import colour_names, colour_rows

#: What takes seconds to import.
HEAVY = {"torch", "transformers", "peft", "datasets", "accelerate", "evaluate", "pandas", "matplotlib"}
COMMANDS = ("train", "evaluate", "reproduce", "predict", "app", "convert", "publish", "export", "info")


def loaded(code: str, *words: str, **environ: str) -> list[str]:
    """Names of the modules that a fresh process has loaded after some code, which is given the words as `argv`."""
    code = f"import json, sys\n{code}\nprint('\\n' + json.dumps(sorted(sys.modules)))"
    environ = os.environ | {"PYTHONPATH": str(ROOT), **environ}
    run = [sys.executable, "-W", "error", "-c", code, *words]
    done = subprocess.run(run, env=environ, capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1])


def tops(modules: list[str]) -> set[str]:
    """The packages of modules."""
    return {name.partition(".")[0] for name in modules}


def test_help_version_and_wrong_flags_load_neither_torch_nor_peft() -> None:
    """A program that takes ten seconds to say that a flag is missing teaches people not to ask it."""
    right = [["--help"], ["--version"], *([name, "--help"] for name in COMMANDS)]
    wrong = [[], ["bogus"], *([name] for name in COMMANDS if name != "info"), ["info", "--bogus"]]
    train = ["train", "--method", "coop", "--model", "m", "--dataset", "d"]
    evaluate = ["evaluate", "--dataset", "d", "--output_dir", "o", "--protocol"]
    wrong += [train, [*train, "--output_dir", "o", "--lerning_rate", "1"], [*train, "--protocol", "x"]]
    wrong += [[*evaluate, "x"], [*evaluate, "few-shot", "--baseline"], [*evaluate, "few-shot", "--sed", "1"]]
    wrong += [["train", "missing.yaml"], [*train, "--shots", "many"], ["predict", "adapter", "missing.png"]]
    code = """
from peft_vlm.cli import main
for group, code in zip(json.loads(sys.argv[1]), (0, 2), strict=True):
    for words in group:
        try:
            assert main(words) == code, words
        except SystemExit as stop:
            assert stop.code == code, words
"""
    modules = loaded(code, json.dumps([right, wrong]))
    assert len(right) + len(wrong) >= 25
    assert not tops(modules) & HEAVY


def test_a_misspelt_training_flag_is_answered_with_the_right_one(capsys) -> None:
    """Flags of the training's arguments are checked by name before anything is loaded."""
    words = ["train", "--method", "coop", "--model", "m", "--dataset", "d", "--output_dir", "o"]
    assert main([*words, "--lerning-rate=3"]) == 2
    assert "no flag --lerning_rate. Did you mean --learning_rate" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("flag", "own"),
    [("lr", "learning_rate"), ("epochs", "num_train_epochs"), ("batch-size", "per_device_train_batch_size")],
)
def test_a_flag_of_other_programs_is_answered_with_the_one_here(flag, own, capsys) -> None:
    """`--epochs` is close to `--warmup_epochs`, and `--lr` begins like three flags that nobody meant."""
    words = ["train", "--method", "coop", "--model", "m", "--dataset", "d", "--output_dir", "o"]
    assert main([*words, f"--{flag}", "3"]) == 2
    assert f"Did you mean --{own}?" in capsys.readouterr().err


def test_an_exported_classifier_is_served_without_torch(tmp_path) -> None:
    """A server that only runs ONNX files need not hold two gigabytes of libraries."""
    words = ["export", save_clip(tmp_path / "clip"), str(tmp_path / "out"), "--zero_shot", "--template", "a {}."]
    assert main([*words, "--class_names", *colour_names(3), "--formats", "onnx"]) == 0
    image = tmp_path / "\u65e5\u672c.png"
    colour_rows(1, classes=3)[0]["image"].save(image)
    code = """
import peft_vlm.serving.onnx
from peft_vlm.cli import main
assert len(peft_vlm.serving.onnx.OnnxClassifier(sys.argv[1]).predict([sys.argv[2]])[0]) == 3
assert main(["predict", sys.argv[1], sys.argv[2], "--json"]) == 0
assert main(["predict", sys.argv[1], sys.argv[2]]) == 0
"""
    narrow = {"PYTHONIOENCODING": "ascii", "PYTHONUTF8": "0"}  # a terminal that lacks the name's letters
    modules = loaded(code, str(tmp_path / "out" / "classifier.onnx"), str(image), **narrow)
    assert "onnxruntime" in modules
    assert not tops(modules) & HEAVY


CHECK = """
from peft import PeftModel
from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
missing = {"COOP", "PROMPTKD", "PROMPTSRC", "RPP", "SKIP_TUNING", "TVP"} - {kind.value for kind in CONFIGS}
assert not missing, missing
assert PeftModel.push_to_hub.__module__ == "peft_vlm.hub.publish"
import importlib, inspect, peft
assert importlib.import_module("peft") is peft is sys.modules["peft"]
assert "PeftModel" in inspect.getsource(peft)
"""


@pytest.mark.parametrize(
    "first",
    [
        "import peft_vlm",
        pytest.param("import peft\nimport peft_vlm", marks=pytest.mark.slow),
        "import peft_vlm\nfrom transformers import Trainer",  # imports PEFT while it is half imported itself
        pytest.param("import peft_vlm.serving.card\nassert 'peft' not in sys.modules", marks=pytest.mark.slow),
    ],
)
def test_peft_knows_the_methods_in_whatever_order_things_are_imported(first) -> None:
    """`import peft_vlm` loads nothing by itself; an adapter must load all the same."""
    assert "peft_vlm" in loaded(first + CHECK)


@pytest.mark.parametrize(
    "order", ["import peft_vlm, transformers.pipelines", "import transformers.pipelines, peft_vlm, peft"]
)
def test_the_order_of_imports_does_not_matter(order) -> None:
    """By name, transformers loads an adapter without anybody importing a method."""
    check = "import inspect, sys; p = sys.modules['transformers.pipelines']; assert inspect.getsource(p.pipeline)\n"
    check += "assert p.load_model.__module__ == 'peft_vlm.hub.pipelines'"
    subprocess.run([sys.executable, "-c", f"{order}\n{check}"], check=True)


def test_without_the_import_peft_does_not_know_the_type_but_a_pickle_brings_it(tmp_path):
    """Why every card begins with `import peft_vlm`, while spawned data-loader workers need no such line."""
    SkipTuningConfig().save_pretrained(tmp_path)
    (tmp_path / "config.pkl").write_bytes(pickle.dumps(SkipTuningConfig(start_layer=2)))
    code = (
        "import pickle, sys\n"
        "from peft import PeftConfig\n"
        "try: PeftConfig.from_pretrained(sys.argv[1])\n"
        "except KeyError as error: print(repr(error))\n"
        "print(pickle.load(open(sys.argv[1] + '/config.pkl', 'rb')).start_layer)\n"
        "print(type(PeftConfig.from_pretrained(sys.argv[1])).__name__)\n"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True)
    assert result.stdout.splitlines() == ["KeyError('SKIP_TUNING')", "2", "SkipTuningConfig"], result.stderr


def test_the_package_imports_without_optional_dependencies():
    """The plots' one is imported when a plot is drawn, if at all."""
    code = (
        "import sys\n"
        "for name in ('tensorboard', 'torchvision', 'sklearn'): sys.modules[name] = None\n"
        "import peft_vlm, peft_vlm.experiments.compare, peft_vlm.evaluation.run\n"
        "assert 'matplotlib' not in sys.modules\n"
    )
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_no_module_needs_what_windows_lacks() -> None:
    """`import resource` at the head of one file once kept the whole package from being imported on Windows."""
    modules = [module.name for module in python_modules(PACKAGE)]
    code = """
import builtins, importlib
original = builtins.__import__
def hide(name, globals=None, *rest, **named):
    if name.partition(".")[0] in HIDDEN and (globals or {}).get("__name__", "").startswith("peft_vlm"):
        raise ImportError(f"{name} is hidden")
    return original(name, globals, *rest, **named)
HIDDEN = ("resource", "fcntl", "pwd", "grp", "termios", "pty", "posix", "syslog")
builtins.__import__ = hide
for name in sys.argv[1:]:
    importlib.import_module(name)
import torch
from peft_vlm.training.callbacks import _peak
assert _peak(torch.device("cpu")) == ""
"""
    assert len(modules) >= 100
    assert set(modules) - {"peft_vlm.cli.__main__"} <= set(loaded(code, *(m for m in modules if "__main__" not in m)))


@pytest.mark.slow
def test_every_part_of_the_package_can_be_the_first_import() -> None:
    """Registering while one of our own modules is half imported would fail for whoever begins with that module."""
    folder = ROOT / PACKAGE
    parts = sorted(path.stem for path in folder.iterdir() if path.suffix == ".py" or (path / "__init__.py").is_file())
    code = """
import os, torch, transformers.modeling_utils
for part in sys.argv[1:]:
    child = os.fork()
    if not child:
        import importlib, traceback
        try:
            importlib.import_module(f"peft_vlm.{part}")
            from peft.mapping import PEFT_TYPE_TO_CONFIG_MAPPING as CONFIGS
            assert "COOP" in {kind.value for kind in CONFIGS}
        except BaseException:
            traceback.print_exc()
            os._exit(1)
        os._exit(0)
    assert os.waitpid(child, 0)[1] == 0, part
"""
    parts = [part for part in parts if not part.startswith("_")]
    assert len(parts) >= 15
    loaded(code, *parts)


def test_importing_the_package_adds_little_to_importing_peft() -> None:
    """The trainer, data sets and plots are loaded when they are used."""
    before, after = loaded("import peft"), loaded("import peft\nimport peft_vlm")
    added = set(after) - set(before)
    assert "peft_vlm.methods.coop.model" in added
    assert not tops(sorted(added)) & (HEAVY - {"torch", "transformers", "peft"})
    assert "peft_vlm.training" not in added
    assert "transformers.trainer" not in after
    assert len(added) < 250


def test_public_names_are_there_when_they_are_used() -> None:
    """A name in `__all__` that leads nowhere fails only on the day somebody uses it."""
    import peft_vlm

    assert len(peft_vlm.__all__) >= 20
    for name in peft_vlm.__all__:
        assert getattr(peft_vlm, name).__module__.startswith("peft_vlm.")
    assert set(peft_vlm.__all__) <= set(dir(peft_vlm))
    assert peft_vlm.data.load_image_dataset
    with pytest.raises(AttributeError, match="no attribute 'CoOpp'"):
        _ = peft_vlm.CoOpp


def test_lists_that_the_help_repeats_are_those_of_the_library() -> None:
    """The help lists them without loading what they belong to."""
    assert set(PROTOCOLS) == {*SINGLE, *SEVERAL}
    assert list(KINDS) == sorted(official.name for adapter in ADAPTERS.values() for official in adapter.formats)
    assert set(EXPORT_FLAGS) == set(EXPORTS)
