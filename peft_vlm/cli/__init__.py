"""The command `peft-vlm`: one file per command, thin over the library."""

from peft_vlm.cli.program import main

__all__ = ["main"]
