"""Builds the wheel and tries it outside the repository; run by `make wheel` as `python -m tests.wheel_check`.

The wheel is installed into a fresh virtual environment in a temporary folder. The packages it declares (and theirs,
and no others) are linked there from the environment that runs this script: nothing is downloaded twice, and an import
that no dependency declares still fails.
"""

import subprocess
import sys
import tempfile
import venv
import zipfile
from importlib.metadata import Distribution, distribution
from pathlib import Path

from packaging.requirements import Requirement

from tests.readme_blocks import run_outside_repository, runnable_code
from tests.source_tree import PACKAGE, ROOT, tracked_files

MAX_WHEEL_BYTES = 1_000_000


def build_wheel(folder: Path) -> Path:
    """Build the wheel from the working tree."""
    command = [sys.executable, "-m", "pip", "wheel", "--quiet", "--disable-pip-version-check", "--no-deps"]
    subprocess.run([*command, "--wheel-dir", str(folder), str(ROOT)], check=True)
    (wheel,) = folder.glob("*.whl")
    return wheel


def check_contents(wheel: Path) -> None:
    """The wheel holds every tracked file of the package and nothing else, the type marker and the licence included."""
    with zipfile.ZipFile(wheel) as archive:
        names = set(archive.namelist())
    inside = {name for name in names if name.startswith(f"{PACKAGE}/")}
    metadata = {name for name in names if name.split("/")[0].endswith(".dist-info")}
    expected = {path for path in tracked_files() if path.startswith(f"{PACKAGE}/")}
    assert len(expected) >= 6, f"only {len(expected)} tracked files in {PACKAGE}/"
    assert names == inside | metadata, f"files outside the package: {sorted(names - inside - metadata)}"
    assert inside >= expected, f"missing in the wheel: {sorted(expected - inside)}"
    assert inside <= expected, f"in the wheel but not tracked by git: {sorted(inside - expected)}"
    assert f"{PACKAGE}/py.typed" in inside
    assert any(name.endswith("licenses/LICENSE") for name in metadata)
    assert wheel.stat().st_size <= MAX_WHEEL_BYTES, f"{wheel.stat().st_size} bytes, limit {MAX_WHEEL_BYTES}"


def declared_closure(requirements: list[str]) -> dict[str, Distribution]:
    """Installed distributions that a list of requirements asks for, directly or through others."""
    found: dict[str, Distribution] = {}
    todo = [(Requirement(text), "") for text in requirements]
    while todo:
        requirement, extra = todo.pop()
        if requirement.marker is not None and not requirement.marker.evaluate({"extra": extra}):
            continue
        package = distribution(requirement.name)
        key = f"{requirement.name.lower()}[{','.join(sorted(requirement.extras))}]"
        if key not in found:
            found[key] = package
            todo += [
                (Requirement(text), name) for text in package.requires or [] for name in ("", *requirement.extras)
            ]
    return found


def link_packages(packages: dict[str, Distribution], site: Path) -> None:
    """Link the top-level files and folders of installed distributions into another environment."""
    for package in packages.values():
        tops = {file.parts[0] for file in package.files or [] if file.parts[0] not in {"..", "__pycache__"}}
        for top in sorted(tops):
            target = site / top
            if not target.exists():
                target.symlink_to(Path(str(package.locate_file(top))))


def make_environment(wheel: Path, folder: Path) -> Path:
    """A virtual environment with the wheel and what it declares; returns its interpreter."""
    venv.create(folder, with_pip=True)
    python = folder / "bin" / "python"
    subprocess.run([python, "-m", "pip", "install", "--quiet", "--no-index", "--no-deps", str(wheel)], check=True)
    query = "import sysconfig; print(sysconfig.get_path('purelib'))"
    site = Path(subprocess.run([python, "-c", query], check=True, capture_output=True, text=True).stdout.strip())
    (metadata,) = site.glob("peft_vlm-*.dist-info")
    packages = declared_closure(Distribution.at(metadata).requires or [])
    assert len(packages) >= 20, f"only {len(packages)} packages found"
    link_packages(packages, site)
    subprocess.run([python, "-m", "pip", "check", "--disable-pip-version-check"], check=True)
    return python


def main() -> None:
    """Build, look inside, install, run the README's Python and the command line."""
    with tempfile.TemporaryDirectory(prefix="peft_vlm_wheel_") as name:
        folder = Path(name)
        wheel = build_wheel(folder / "dist")
        check_contents(wheel)
        python = make_environment(wheel, folder / "venv")
        where = "import peft_vlm, pathlib; print(pathlib.Path(peft_vlm.__file__).resolve())"
        (folder / "run").mkdir()
        code = runnable_code(ROOT / "README.md")
        assert code.strip(), "README.md has no runnable ```python block"
        result = run_outside_repository(f"{code}\n{where}\n", folder=folder / "run", python=str(python))
        assert result.returncode == 0, f"the README's example failed:\n{result.stdout}\n{result.stderr}"
        location = result.stdout.strip().splitlines()[-1]
        assert location.startswith(str((folder / "venv").resolve())), f"the example imported {location}"
        for words in (["--help"], ["reproduce", "coop", "--plan"]):  # recipes are files of the package
            command = [python.parent / "peft-vlm", *words]
            subprocess.run(command, check=True, cwd=folder / "run", stdout=subprocess.DEVNULL)
        print(f"{wheel.name}: contents, dependencies, README example and command line work outside the repository")


if __name__ == "__main__":
    main()
