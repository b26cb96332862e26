"""How much a command or an example says while it runs: by default its own progress and nothing of the libraries below.

The level of the logger `peft_vlm` decides: above WARNING there are no bars, at DEBUG there are those of the libraries.
"""

import argparse
import logging
from collections.abc import Iterator
from contextlib import contextmanager

PACKAGE = logging.getLogger("peft_vlm")


def add_console_flags(parser: argparse.ArgumentParser) -> None:
    """Add `--quiet` and `--verbose`, one of which may be given.

    Args:
        parser: Parser of a command or an example.
    """
    group = parser.add_mutually_exclusive_group()
    group.add_argument("--quiet", action="store_true", help="show no progress, only warnings and the result")
    group.add_argument("--verbose", action="store_true", help="show the bars and remarks of the libraries below, too")


def start_console(arguments: argparse.Namespace) -> None:
    """Set for this process what `--quiet` and `--verbose` say.

    Args:
        arguments: What a parser with `add_console_flags` gave.
    """
    logging.basicConfig(level=logging.INFO if arguments.verbose else logging.WARNING, format="%(message)s")
    PACKAGE.setLevel(logging.ERROR if arguments.quiet else logging.DEBUG if arguments.verbose else logging.WARNING)
    if not arguments.verbose:
        _set_bars(transformers=False, datasets=False)


@contextmanager
def console(*, quiet: bool, verbose: bool) -> Iterator[None]:
    """The level of the logger, for as long as a command runs.

    Args:
        quiet: Show no progress.
        verbose: Show also what the libraries below show.
    """
    before = PACKAGE.level
    PACKAGE.setLevel(logging.ERROR if quiet else logging.DEBUG if verbose else before)
    try:
        yield
    finally:
        PACKAGE.setLevel(before)


@contextmanager
def calm() -> Iterator[None]:
    """Within this, the libraries below draw no bars for reading weights and tables; bars of downloads stay."""
    if PACKAGE.isEnabledFor(logging.DEBUG):
        yield
        return
    import datasets
    import transformers.utils.logging

    before = {"transformers": transformers.utils.logging.is_progress_bar_enabled()}
    before["datasets"] = not datasets.are_progress_bars_disabled()
    _set_bars(transformers=False, datasets=False)
    try:
        yield
    finally:
        _set_bars(**before)


def _set_bars(*, transformers: bool, datasets: bool) -> None:
    """Switch the libraries' bars; those of downloads stay unless there is to be no progress at all."""
    import datasets as datasets_library
    import huggingface_hub.utils
    import transformers.utils.logging as transformers_logging

    switch = transformers_logging.enable_progress_bar if transformers else transformers_logging.disable_progress_bar
    switch()  # that of the downloads as well
    (datasets_library.enable_progress_bars if datasets else datasets_library.disable_progress_bars)()
    if PACKAGE.isEnabledFor(logging.WARNING):
        huggingface_hub.utils.enable_progress_bars()
