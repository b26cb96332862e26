"""Attacks as rows of tables, run in a process of their own with little memory and little time."""

import json
import os
import resource
import signal
import socket
import time
import traceback
import unicodedata
from collections.abc import Callable, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

from peft_vlm.errors import AdapterError, PeftVLMError
from tests import forked

#: Memory that an attack may make the package ask for, counted from after the imports.
MEGABYTES = 1000
#: Seconds until a refusal, on a busy machine.
SECONDS = 5.0
#: Unicode categories of characters that no message holds.
FORBIDDEN = {"Cc", "Cf", "Cs", "Co", "Zl", "Zp"}
#: Errors that stand for all of their subclasses.
ANY = (ValueError, PeftVLMError)


@dataclass(frozen=True)
class Attack:
    """Files of a stranger, and what the package must say about them.

    Args:
        name: What is wrong, for the test's name.
        make: Writes the files into a folder, which may hold sound ones.
        message: Part of the message.
        error: Type of the error, exactly.
    """

    name: str
    make: Callable[[Path], Any]
    message: str
    error: type[PeftVLMError] = AdapterError


def outcomes(
    table: str,
    use: str,
    folders: Mapping[str, Path],
    log: Path,
    *,
    error: type[PeftVLMError] | None = None,
    attacks: str = "ATTACKS",
) -> dict[str, str]:
    """Run the attacks of a table in a child process, which checks error, message, memory and time of each.

    Args:
        table: Module with the table and the function that reads the files.
        use: Name of the function; it gets the folder.
        folders: Folder with the files of each attack.
        log: What the child prints; its beginning is the name of the file with the outcomes.
        error: Type of the error that this function raises for all of them; None for that of each attack.
        attacks: Name of the table in the module.

    Returns:
        What went wrong, by name; empty where the attack was refused as it should be.
    """
    found: dict[str, str] = {}
    results = log.with_suffix(".jsonl")
    while missing := {name: str(folder) for name, folder in folders.items() if name not in found}:
        results.write_text("")
        child = forked.start(
            log, _resist, table, use, missing, str(results), error, attacks, environ={"CUDA_VISIBLE_DEVICES": ""}
        )
        code = forked.wait(child, log, timeout=10 * len(missing) + 60)
        found |= dict(json.loads(line) for line in results.read_text().splitlines())
        if code:  # the one that it was at has ended the child
            victim = next(name for name in missing if name not in found)
            found[victim] = f"exit code {code}: {log.read_text()[-3000:]}"
    return found


def _resist(table: str, use: str, folders: dict[str, str], results: str, error: Any, name_of_table: str) -> None:
    module = import_module(table)
    attacks, read = getattr(module, name_of_table), getattr(module, use)
    for name, folder in folders.items():
        signal.alarm(60)  # ends the child
        try:
            with little_memory(), no_connections():
                wanted = error or attacks[name].error
                check_refusal(lambda path=Path(folder): read(path), wanted, attacks[name].message)
            failure = ""
        except Exception:
            failure = traceback.format_exc()
        signal.alarm(0)
        with open(results, "a") as file:
            file.write(json.dumps([name, failure]) + "\n")


def check_refusal(call: Callable[[], Any], error: type[Exception], message: str) -> None:
    """Assert that a call ends soon, with an error of one type and one line."""
    begun, caught = time.monotonic(), None
    try:
        call()
    except (ValueError, TypeError) as refusal:
        caught = refusal
    seconds = time.monotonic() - begun
    assert caught is not None, "nothing was refused"
    assert type(caught) is error or (error in ANY and isinstance(caught, error)), repr(caught)
    assert message in str(caught), str(caught)
    assert "\n" not in str(caught), repr(str(caught))
    assert not obeyed(str(caught)), repr(str(caught))
    assert seconds < SECONDS, f"{seconds:.1f} s: {caught}"


def obeyed(text: str) -> list[str]:
    """Characters that a terminal or a reader's eye would obey; ends of lines are ours."""
    return [letter for letter in text if unicodedata.category(letter) in FORBIDDEN and letter not in "\n\u200c\u200d"]


@contextmanager
def little_memory(megabytes: int = MEGABYTES):
    """Let this process ask for so much memory more than it has."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    before = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * os.sysconf("SC_PAGE_SIZE") + megabytes * 2**20, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, before)


@contextmanager
def no_connections():
    """Make every connection of this process an error that no handler of ours catches."""
    before = socket.socket.connect

    def refuse(self: socket.socket, address: Any) -> None:
        raise SystemExit(f"a connection to {address!r}")

    socket.socket.connect = refuse
    try:
        yield
    finally:
        socket.socket.connect = before


def table(*attacks: Attack) -> dict[str, Attack]:
    """Attacks by name."""
    named = {attack.name: attack for attack in attacks}
    assert len(named) == len(attacks), "two attacks have one name"
    return named
