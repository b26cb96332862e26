"""Scripts run as `python script.py ...` runs them, in a forked process that has the imports behind it."""

import runpy
import sys
import tempfile
from dataclasses import dataclass
from multiprocessing.context import ForkServerProcess
from pathlib import Path

from tests import forked
from tests.source_tree import ROOT


@dataclass(frozen=True)
class Finished:
    """The end of a script.

    Args:
        code: Exit code.
        printed: Standard output and error, as they came.
    """

    code: int
    printed: str


def run_script(script: str, *arguments: str) -> Finished:
    """Run a script of the repository with one thread and wait for its end.

    Args:
        script: Path from the root of the repository.
        arguments: Its command line.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log.txt"
        process = start_script(log, script, *arguments)
        try:  # the time limit is that of the test, which `slow` ones raise
            return Finished(forked.wait(process, log, timeout=3600), log.read_text())
        finally:
            process.kill()


def start_script(log: Path, script: str, *arguments: str) -> ForkServerProcess:
    """Start a script of the repository with one thread.

    Args:
        log: Where its output and errors go.
        script: Path from the root of the repository.
        arguments: Its command line.
    """
    return forked.start(log, _main, script, arguments)


def _main(script: str, arguments: tuple[str, ...]) -> None:
    path = ROOT / script
    sys.argv = [str(path), *arguments]
    sys.path.insert(0, str(path.parent))
    runpy.run_path(str(path), run_name="__main__")
