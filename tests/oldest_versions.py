"""Print the oldest versions that pyproject.toml claims, as a pip constraint file; used by `make test-oldest`."""

import re
import sys
import tomllib
from pathlib import Path

PYPROJECT = Path(__file__).resolve().parents[1] / "pyproject.toml"


def oldest_versions(project: dict) -> list[str]:
    """The lower bound of every package that the library and its tests need.

    Args:
        project: The table `project` of pyproject.toml.

    Raises:
        ValueError: If a requirement has no lower bound, so that nothing is claimed that could be tested.
    """
    extras = project["optional-dependencies"]
    requirements = [*project["dependencies"], *extras["plots"], *extras["onnx"], *extras["test"]]
    pins = []
    for requirement in requirements:
        if requirement.startswith(f"{project['name']}["):  # an extra that contains others
            continue
        bound = re.fullmatch(r"([\w.-]+)(?:\[[\w,-]+\])?>=([\w.]+)(?:,<[\w.]+)?", requirement)
        if bound is None:
            raise ValueError(f"Expected a requirement like 'name>=1.2' in {PYPROJECT.name}, got {requirement!r}.")
        pins.append(f"{bound[1]}=={bound[2]}")
    return pins


if __name__ == "__main__":
    sys.stdout.write("\n".join(oldest_versions(tomllib.loads(PYPROJECT.read_text())["project"])) + "\n")
