"""The notebooks: committed with clean outputs, and their code runs."""

import re
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient

from tests.source_tree import ROOT

FOLDER = ROOT / "examples" / "notebooks"
NOTEBOOKS = sorted(FOLDER.glob("*.ipynb"))
#: Values of the cell with the tag `parameters` for a run of seconds.
TINY = {"first_adapter": {"SHOTS": 1, "STEPS": 1}, "look_at_a_prompt": {"STEPS": 1, "TEST_IMAGES": 4}}


def code_cells(notebook) -> list:
    """The cells that run."""
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_outputs_are_committed_and_clean(path: Path) -> None:
    """A reader sees results without running anything, and nothing of the machine that ran it."""
    assert len(NOTEBOOKS) == len(TINY)
    notebook = nbformat.read(path, as_version=4)
    nbformat.validate(notebook)
    cells = code_cells(notebook)
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    outputs = [output for cell in cells for output in cell.outputs]
    assert len(outputs) >= 5
    assert {output.output_type for output in outputs} <= {"stream", "execute_result"}
    assert not [output for output in outputs if output.get("name") == "stderr"]
    assert not re.search(r"/tmp/|site-packages|0x[0-9a-f]{6}", path.read_text(encoding="utf-8"))
    assert path.stat().st_size < 300_000


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_code_runs_with_tiny_settings(path: Path, tmp_path, monkeypatch) -> None:
    """Every code cell in order, as a notebook does, in this process."""
    monkeypatch.chdir(FOLDER)
    values: dict = {}
    for cell in code_cells(nbformat.read(path, as_version=4)):
        exec(compile(cell.source, path.name, "exec"), values)
        if "parameters" in cell.metadata.get("tags", []):
            values |= TINY[path.stem] | {"OUTPUT": tmp_path / "output"}
    assert (tmp_path / "output" / "adapter_model.safetensors").is_file()


@pytest.mark.slow
@pytest.mark.timeout(1800)
@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda path: path.stem)
def test_the_notebook_runs_as_committed(path: Path, tmp_path) -> None:
    """In a kernel, with the settings that the committed outputs were made with; only the output folder is another."""
    notebook = nbformat.read(path, as_version=4)
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source += f"\nOUTPUT = Path({str(tmp_path / 'output')!r})"
    NotebookClient(notebook, timeout=1700, resources={"metadata": {"path": str(FOLDER)}}).execute()
    assert (tmp_path / "output" / "adapter_model.safetensors").is_file()
