"""The design as a test: imports go down only, methods are islands, files and functions stay small."""

import ast
import re
import tomllib
from graphlib import CycleError, TopologicalSorter
from importlib.metadata import packages_distributions

import pytest

from tests.source_tree import (
    CODE_FOLDERS,
    PACKAGE,
    ROOT,
    Module,
    functions,
    imported_names,
    internal_imports,
    python_modules,
)

#: Layer of each folder or root file of the package (docs/architecture.md). A part imports lower layers only.
LAYERS = {
    **dict.fromkeys(("errors", "files", "distributed", "settings", "serving"), 0),
    "models": 1,
    **dict.fromkeys(("adapters", "data", "text", "conversion", "losses", "registry", "objective"), 2),
    "classification": 2,
    **dict.fromkeys(("methods", "training", "evaluation", "hub"), 3),
    **dict.fromkeys(("experiments", "classifier", "export"), 4),
    **dict.fromkeys(("app", "cli", ""), 5),
}
#: Imports inside one layer that the design allows; L4 and L5 are open, the cycle test parts them.
SAME_LAYER = {
    *((part, "objective") for part in ("data", "text", "registry")),
    *((part, "text") for part in ("adapters", "data")),
    *((part, "errors") for part in ("files", "settings")),
    ("errors", "serving"),
    *((part, "evaluation") for part in ("training", "hub")),
    ("training", "hub"),
    ("conversion", "registry"),
    *(("classification", part) for part in ("data", "text", "objective")),
}
OPEN_LAYERS = {4, 5}

MAX_FILE_LINES = 600
MAX_FUNCTION_LINES = 60

EMPTY_NAMES = {"utils", "util", "helpers", "helper", "misc", "common", "tools"}
#: Imported only where an extra or the user's own install brings them.
OPTIONAL_DISTRIBUTIONS = {"gradio", "matplotlib", "onnxruntime"}


def part_of(name: str) -> str:
    """First folder or file below the package: `text` for `peft_vlm.text.prompts`, an empty string for the root."""
    return (name.split(".") + [""])[1]


def is_allowed(importer: str, imported: str) -> bool:
    """Whether the design lets one module of the package import another."""
    source, target = part_of(importer), part_of(imported)
    if source == target:
        return True
    if target == "methods":
        return source == ""
    if LAYERS[source] == LAYERS[target]:
        return LAYERS[source] in OPEN_LAYERS or (source, target) in SAME_LAYER
    return LAYERS[source] > LAYERS[target]


@pytest.fixture(scope="module")
def package() -> list[Module]:
    """Every module of the package."""
    modules = python_modules(PACKAGE)
    assert len(modules) >= 6
    return modules


@pytest.fixture(scope="module")
def import_graph(package: list[Module]) -> dict[str, set[str]]:
    """Modules of the package and the modules each imports."""
    known = {module.name for module in package}
    graph = {module.name: internal_imports(module, known) - {module.name} for module in package}
    assert sum(map(len, graph.values())) >= 5
    return graph


def test_every_part_of_the_package_has_a_layer(package: list[Module]) -> None:
    """A new folder without a layer would escape the import rule."""
    parts = {part_of(module.name) for module in package}
    assert len(parts) >= 5
    assert parts <= set(LAYERS), f"give {sorted(parts - set(LAYERS))} a layer here and in docs/architecture.md"


def test_imports_go_down_only(import_graph: dict[str, set[str]]) -> None:
    """A shared part that imports a method, or a neighbour, cannot be understood or removed alone."""
    wrong = [
        f"{importer} imports {imported}"
        for importer, targets in sorted(import_graph.items())
        for imported in sorted(targets)
        if not is_allowed(importer, imported)
    ]
    assert not wrong, wrong


def test_the_import_rule_sees_violations() -> None:
    """The rule itself: upward, sideways and method imports are refused, the named exceptions are not."""
    allowed = [("training.trainer", "evaluation"), ("hub.card", "evaluation.report"), ("text.prompts", "errors")]
    refused = [
        ("text", "data"),
        ("evaluation", "training"),
        ("training", "methods.coop"),
        ("models.towers", "text"),
        ("text", "adapters"),
        ("hub", ""),
    ]
    assert all(is_allowed(f"{PACKAGE}.{a}", f"{PACKAGE}.{b}") for a, b in allowed)
    assert not any(is_allowed(f"{PACKAGE}.{a}", f"{PACKAGE}.{b}".rstrip(".")) for a, b in refused)


def test_methods_do_not_import_each_other(import_graph: dict[str, set[str]]) -> None:
    """One folder is one method: deleting it must break no other."""
    inside = {name: targets for name, targets in import_graph.items() if name.startswith(f"{PACKAGE}.methods.")}
    assert inside, "no method found"
    wrong = []
    for importer, targets in sorted(inside.items()):
        own = ".".join(importer.split(".")[:3])
        others = [name for name in targets if part_of(name) == "methods" and not f"{name}.".startswith(f"{own}.")]
        wrong += [f"{importer} imports {name}" for name in others]
    assert not wrong, wrong


def test_modules_import_each_other_without_cycles(import_graph: dict[str, set[str]]) -> None:
    """A cycle makes the import order matter; inside a package, import the sibling file instead of the package."""
    try:
        TopologicalSorter(import_graph).prepare()
    except CycleError as error:
        pytest.fail(f"import cycle: {' -> '.join(error.args[1])}")


def test_every_method_folder_is_imported_explicitly() -> None:
    """A folder that `methods/__init__.py` does not name is not registered with PEFT, and nothing says so."""
    folder = ROOT / PACKAGE / "methods"
    methods = sorted(path.name for path in folder.iterdir() if (path / "__init__.py").is_file())
    assert len(methods) >= 1
    (index,) = [m for m in python_modules(f"{PACKAGE}/methods") if m.name == f"{PACKAGE}.methods"]
    listed = {f"{name}." for name in imported_names(index)}
    missing = [name for name in methods if not any(i.startswith(f"{PACKAGE}.methods.{name}.") for i in listed)]
    assert not missing, f"add an import line for {missing} to methods/__init__.py"


def test_files_hold_one_idea() -> None:
    """A file of the package beyond 600 lines hides a second idea."""
    modules = python_modules(PACKAGE)
    assert len(modules) >= 10
    lengths = {module.path: len(module.text.splitlines()) for module in modules}
    assert not {path: lines for path, lines in lengths.items() if lines > MAX_FILE_LINES}


def test_functions_are_short() -> None:
    """A function that does not fit on a screen does more than its name says."""
    lengths = {f"{m.path}:{name}": lines for m in python_modules(*CODE_FOLDERS) for name, lines in functions(m)}
    assert len(lengths) >= 20
    assert not {name: n for name, n in lengths.items() if n > MAX_FUNCTION_LINES}


def test_no_file_is_named_after_nothing() -> None:
    """`utils` collects whatever has no home; the name must say what is inside."""
    modules = python_modules(*CODE_FOLDERS)
    assert len(modules) >= 10
    assert not [module.path for module in modules if module.path.rpartition("/")[2].removesuffix(".py") in EMPTY_NAMES]


def test_public_modules_declare_existing_names(package: list[Module]) -> None:
    """A package that re-exports says so in `__all__`, once per name (ruff RUF022 keeps the order)."""
    packages = [m for m in package if m.path.endswith("__init__.py") and imported_names(m)]
    assert len(packages) >= 2
    for module in packages:
        assignments = [
            node.value
            for node in module.tree.body
            if isinstance(node, ast.Assign)
            and any(isinstance(t, ast.Name) and t.id == "__all__" for t in node.targets)
        ]
        assert len(assignments) == 1, f"{module.path}: expected one `__all__`, got {len(assignments)}"
        names = ast.literal_eval(assignments[0])
        bound = {node.id for node in ast.walk(module.tree) if isinstance(node, ast.Name)}
        bound |= {name.rpartition(".")[2] for name in imported_names(module)}
        bound |= {
            a.asname for n in ast.walk(module.tree) if isinstance(n, ast.ImportFrom) for a in n.names if a.asname
        }
        bound |= {n.name for n in module.tree.body if isinstance(n, ast.FunctionDef | ast.ClassDef)}
        assert len(set(names)) == len(names), module.path
        assert set(names) <= bound, f"{module.path}: `__all__` names {sorted(set(names) - bound)}, which are not there"


def test_every_import_of_the_package_is_declared(package: list[Module]) -> None:
    """A package found only because another one pulls it in disappears with that one's next release."""
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    declared = {re.split(r"[<>=!~\[; ]", entry)[0].lower().replace("_", "-") for entry in project["dependencies"]}
    assert len(declared) >= 8
    providers = packages_distributions()
    own = {"peft_vlm", "__future__"}
    tops = {(name.split(".")[0], module.path) for module in package for name in imported_names(module)}
    missing = {}
    for top, path in sorted(tops):
        names = {entry.lower().replace("_", "-") for entry in providers.get(top, [])}
        if top not in own and names and not names & (declared | OPTIONAL_DISTRIBUTIONS):
            missing[top] = path
    assert not missing, f"declare in pyproject.toml: {missing}"
