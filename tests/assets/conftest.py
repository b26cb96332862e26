"""The scripts that built the assets, importable by their own names."""

import sys
from pathlib import Path

ASSETS = Path(__file__).resolve().parents[2] / "examples" / "assets"
sys.path.insert(0, str(ASSETS / "scripts"))
