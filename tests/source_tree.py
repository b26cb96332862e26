"""Reads the repository as data for the tests of its own rules: tracked files, parsed modules, their imports."""

import ast
import subprocess
from dataclasses import dataclass
from functools import cache
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
PACKAGE = "peft_vlm"
CODE_FOLDERS = (PACKAGE, "tests", "examples", "benchmarks")


@dataclass(frozen=True)
class Module:
    """One parsed Python file.

    Args:
        name: Dotted name, `peft_vlm.text.prompts` or, for a package, `peft_vlm.text`.
        path: Path relative to the repository.
        tree: Syntax tree.
        text: Source.
    """

    name: str
    path: str
    tree: ast.Module
    text: str


def tracked_files() -> list[str]:
    """Paths that git tracks, relative to the repository; files deleted in the working tree are left out."""
    listing = subprocess.run(["git", "ls-files", "-z"], cwd=ROOT, check=True, capture_output=True, text=True).stdout
    return sorted(path for path in listing.split("\0") if path and (ROOT / path).is_file())


def python_modules(*folders: str) -> list[Module]:
    """Every Python file below the given folders, tracked or not."""
    paths = sorted(path for folder in folders for path in (ROOT / folder).rglob("*.py"))
    return [_parsed(path) for path in paths]


@cache
def _parsed(path: Path) -> Module:
    relative = path.relative_to(ROOT)
    parts = relative.with_suffix("").parts
    name = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
    text = path.read_text(encoding="utf-8")
    return Module(name, relative.as_posix(), ast.parse(text, filename=str(path)), text)


def imported_names(module: Module) -> set[str]:
    """Dotted names a file imports, inside functions and `TYPE_CHECKING` blocks too: `from a import b` gives `a.b`."""
    names: set[str] = set()
    is_package = module.path.endswith("__init__.py")
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Import):
            names.update(alias.name for alias in node.names)
        elif isinstance(node, ast.ImportFrom):
            source = node.module or ""
            if node.level:
                parents = module.name.split(".")
                keep = len(parents) - node.level + (1 if is_package else 0)
                source = ".".join([*parents[:keep], *filter(None, [source])])
            names.update(f"{source}.{alias.name}" for alias in node.names)
    return names


def internal_imports(module: Module, known: set[str]) -> set[str]:
    """Modules of the package that a file imports, each as the deepest name that is a module."""
    found = set()
    for name in imported_names(module):
        if name.split(".")[0] != PACKAGE:
            continue
        while name not in known and "." in name:
            name = name.rpartition(".")[0]
        found.add(name)
    return found


def functions(module: Module) -> list[tuple[str, int]]:
    """Qualified name and number of lines, without the docstring, of every function of a file, nested ones included."""
    found: list[tuple[str, int]] = []

    def visit(node: ast.AST, prefix: str) -> None:
        for child in ast.iter_child_nodes(node):
            if isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef):
                found.append((prefix + child.name, _lines_without_docstring(child)))
            named = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef)
            visit(child, f"{prefix}{child.name}." if named else prefix)

    visit(module.tree, "")
    return found


def _lines_without_docstring(function: ast.FunctionDef | ast.AsyncFunctionDef) -> int:
    assert function.end_lineno is not None
    lines = function.end_lineno - function.lineno + 1
    first = function.body[0]
    if ast.get_docstring(function, clean=False) is not None:
        assert first.end_lineno is not None
        lines -= first.end_lineno - first.lineno + 1
    return lines
