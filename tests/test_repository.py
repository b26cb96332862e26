"""Rules for what is committed: safe loading, no machine-local text, documented public names, size of the assets."""

import ast
import re
import tomllib

import pytest
from packaging.requirements import Requirement

from tests.oldest_versions import oldest_versions
from tests.source_tree import CODE_FOLDERS, PACKAGE, ROOT, Module, imported_names, python_modules, tracked_files

MEGABYTE = 1_000_000
#: Largest total size, in MB, of the tracked files below each path.
SIZE_BUDGETS = {"examples/assets/mllm_": 54, "examples/assets/": 60 + 54, "tests/": 44, "model_cards/": 30, "": 160}

#: Text that works on one machine only, or names a package registry that a reader may not use. Written in two halves so
#: that this file does not contain what it looks for.
LOCAL_TEXT = [
    "py" + r"pi\.org",
    "python" + r"hosted\.org",
    "npm" + r"js\.(org|com)",
    "deb" + r"ian\.(org|net)",
    r"(?<![\w.])/(work" + r"|root|opt|Users)/",
    r"(?<![\w.])/ho" + r"me/\w+/",
]


@pytest.fixture(scope="module")
def tracked() -> list[str]:
    """Paths that git tracks."""
    paths = tracked_files()
    assert len(paths) >= 10
    return paths


@pytest.fixture(scope="module")
def code() -> list[Module]:
    """Every Python file of the repository."""
    modules = python_modules(*CODE_FOLDERS)
    assert len(modules) >= 10
    return modules


def calls(module: Module) -> list[ast.Call]:
    """Every call in a file."""
    return [node for node in ast.walk(module.tree) if isinstance(node, ast.Call)]


def keywords(call: ast.Call) -> dict[str, object]:
    """Keyword arguments of a call that are constants."""
    return {k.arg: k.value.value for k in call.keywords if k.arg and isinstance(k.value, ast.Constant)}


def test_no_code_from_a_model_repository_is_run(code: list[Module]) -> None:
    """`trust_remote_code=True` lets a downloaded model run any code."""
    assert not [m.path for m in code for call in calls(m) if keywords(call).get("trust_remote_code")]


def test_checkpoints_are_read_as_tensors_only(code: list[Module]) -> None:
    """`torch.load` without `weights_only=True` unpickles, which runs whatever the file says."""
    loads = [(m, c) for m in code for c in calls(m) if ast.unparse(c.func) == "torch.load"]
    assert not [f"{m.path}:{c.lineno}" for m, c in loads if keywords(c).get("weights_only") is not True]


def test_nothing_that_ships_reads_or_writes_pickles(code: list[Module]) -> None:
    """Adapters are safetensors; only tests may pickle, to check that objects survive it."""
    shipped = [module for module in code if not module.path.startswith("tests/")]
    assert len(shipped) >= 5
    unsafe = {"pickle", "cPickle", "dill", "joblib", "shelve", "marshal"}
    assert not [m.path for m in shipped if {name.split(".")[0] for name in imported_names(m)} & unsafe]


def test_weights_are_never_loaded_loosely(code: list[Module]) -> None:
    """`strict=False` drops missing and unknown tensors without a word."""
    loads = [(m, c) for m in code for c in calls(m) if ast.unparse(c.func).endswith("load_state_dict")]
    assert not [f"{m.path}:{c.lineno}" for m, c in loads if keywords(c).get("strict") is False]


def test_python_files_are_ascii(code: list[Module]) -> None:
    """A look-alike character in code or in a tensor name cannot be seen."""
    assert not [module.path for module in code if not module.text.isascii()]


def test_text_files_name_no_registry_and_no_local_path(tracked: list[str]) -> None:
    """A path or host of one machine in a committed file is useless, or worse, on every other."""
    pattern = re.compile("|".join(LOCAL_TEXT))
    found, read = [], 0
    for path in tracked:
        try:
            text = (ROOT / path).read_text(encoding="utf-8")
        except UnicodeDecodeError:
            continue
        read += 1
        for number, line in enumerate(text.splitlines(), start=1):
            if match := pattern.search(line):
                found.append(f"{path}:{number}: {match.group()}")
    assert read >= 10
    assert not found, found[:20]


@pytest.mark.parametrize("line", ["see py" + "pi.org/project", 'open("/wo' + 'rk/x")', "deb.deb" + "ian.org"])
def test_the_local_text_rule_sees_violations(line: str) -> None:
    """The patterns themselves match what they are for."""
    assert re.search("|".join(LOCAL_TEXT), line)


def test_tested_versions_lie_in_the_ranges_that_are_claimed() -> None:
    """A requirement without a lower bound claims every old version, which no test could run."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    lines = (ROOT / "constraints.txt").read_text().splitlines()
    tested = dict(line.split("==") for line in lines if not line.startswith("#"))
    oldest = dict(pin.split("==") for pin in oldest_versions(project))
    extras = project["optional-dependencies"]
    ranges = [
        Requirement(text) for text in [*project["dependencies"], *extras["plots"], *extras["onnx"], *extras["test"]]
    ]
    named = [requirement for requirement in ranges if requirement.name != project["name"]]
    assert len(named) == len(oldest) >= 20
    for requirement in named:
        version = next(tested[name] for name in tested if name.lower() == requirement.name.lower())
        assert requirement.specifier.contains(version), requirement
        assert requirement.specifier.contains(oldest[requirement.name]), requirement
    with pytest.raises(ValueError, match="like 'name>=1.2'"):
        oldest_versions(project | {"dependencies": ["torch"]})


def test_public_names_are_documented() -> None:
    """A name in `peft_vlm.__all__` that neither the README nor a docs page mentions cannot be found by a reader."""
    tree = next(module.tree for module in python_modules(PACKAGE) if module.name == PACKAGE)
    (names,) = [
        ast.literal_eval(node.value)
        for node in tree.body
        if isinstance(node, ast.Assign) and ast.unparse(node.targets[0]) == "__all__"
    ]
    assert len(names) >= 3
    pages = [ROOT / "README.md", *sorted((ROOT / "docs").rglob("*.md"))]
    assert len(pages) >= 3
    text = "\n".join(page.read_text(encoding="utf-8") for page in pages)
    assert not [name for name in names if not re.search(rf"\b{re.escape(name)}\b", text)]


@pytest.mark.parametrize(("prefix", "budget"), SIZE_BUDGETS.items())
def test_tracked_files_stay_within_their_budget(tracked: list[str], prefix: str, budget: int) -> None:
    """A clone must stay cheap: models and data are committed, so their size is part of the design."""
    size = sum((ROOT / path).stat().st_size for path in tracked if path.startswith(prefix)) / MEGABYTE
    assert size <= budget, f"{prefix or 'repository'}: {size:.1f} MB, budget {budget} MB"
