"""The size of the package: `make size` prints it. Nothing fails here; the numbers are there to be looked at.

Code lines hold a token other than a comment or a docstring. Public names are the functions and classes at the top of
a module without a leading underscore.
"""

import ast
import io
import tokenize
from types import FunctionType

from tests.source_tree import PACKAGE, Module, python_modules

NO_CODE = {
    tokenize.COMMENT,
    tokenize.NL,
    tokenize.NEWLINE,
    tokenize.INDENT,
    tokenize.DEDENT,
    tokenize.ENCODING,
    tokenize.ENDMARKER,
}


def code_lines(module: Module) -> int:
    """Number of lines of a file that are neither blank nor comment nor docstring."""
    lines: set[int] = set()
    for token in tokenize.generate_tokens(io.StringIO(module.text).readline):
        if token.type not in NO_CODE:
            lines.update(range(token.start[0], token.end[0] + 1))
    for node in ast.walk(module.tree):
        if isinstance(node, ast.Module | ast.ClassDef | ast.FunctionDef | ast.AsyncFunctionDef):
            if ast.get_docstring(node, clean=False) is not None:
                docstring = node.body[0]
                assert docstring.end_lineno is not None
                lines.difference_update(range(docstring.lineno, docstring.end_lineno + 1))
    return len(lines)


def public_names(module: Module) -> list[str]:
    """Functions and classes at the top of a module, without those with a leading underscore."""
    named = ast.FunctionDef | ast.AsyncFunctionDef | ast.ClassDef
    return [node.name for node in module.tree.body if isinstance(node, named) and not node.name.startswith("_")]


def root_files(modules: list[Module]) -> list[str]:
    """Single files at the root of the package."""
    return [module.path for module in modules if module.path.count("/") == 1]


def trainer_overrides() -> list[str]:
    """Methods and properties of `transformers.Trainer` that `VLMTrainer` or a base of it in this package redefines."""
    from transformers import Trainer

    from peft_vlm import VLMTrainer

    own = [base for base in VLMTrainer.__mro__ if base.__module__.startswith(PACKAGE)]
    kinds = FunctionType | property | classmethod | staticmethod
    defined = {name for base in own for name, value in vars(base).items() if isinstance(value, kinds)}
    return sorted(name for name in defined if hasattr(Trainer, name))


def main() -> None:
    """Print one line per number."""
    modules = python_modules(PACKAGE)
    root, overrides = root_files(modules), trainer_overrides()
    print(f"{len(modules):7,} files")
    print(f"{sum(map(code_lines, modules)):7,} code lines, without blank lines, comments and docstrings")
    print(f"{len(root):7,} single files at the root")
    print(f"{sum(len(public_names(module)) for module in modules):7,} public functions and classes")
    print(f"{len(overrides):7,} methods of transformers.Trainer overridden: {', '.join(overrides)}")


if __name__ == "__main__":
    main()
