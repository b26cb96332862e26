"""Loads published adapters in a process that knows nothing of how they were made; run by `test_whole_life.py`.

Usage: python -m tests.hub.fresh_process FOLDER METHOD ...; writes FOLDER/logits.safetensors.
"""

import sys
from pathlib import Path

from safetensors.torch import save_file

from peft_vlm.evaluation.run import load_model
from tests.cases import CASES, logits_of
from tests.hub.guard import allow_loopback_only


def main() -> None:
    """Logits of each adapter on the images of `tests.cases`, into one file."""
    allow_loopback_only()
    methods = sys.argv[2:]
    cases = {case.method: case for case in CASES}
    logits = {name: logits_of(cases[name], load_model(f"me/{name}").model).contiguous() for name in methods}
    save_file(logits, Path(sys.argv[1]) / "logits.safetensors")


if __name__ == "__main__":
    main()
