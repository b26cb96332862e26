"""What the attacks begin from."""

import shutil
from collections.abc import Callable
from pathlib import Path

import pytest

from tests.hostile.folders import write_adapters, write_base
from tests.served import address, client, exported  # noqa: F401 - fixtures


@pytest.fixture(scope="session")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A tiny base model."""
    return write_base(tmp_path_factory.mktemp("base") / "clip")


@pytest.fixture(scope="session")
def sound(base: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Sound adapters of each type."""
    return write_adapters(base, tmp_path_factory.mktemp("sound"))


@pytest.fixture
def copy_of(sound: Path, tmp_path: Path) -> Callable[[str], Path]:
    """Copies a sound adapter, to be changed."""
    return lambda name: Path(shutil.copytree(sound / name, tmp_path / "stranger"))
