"""Results on disk are whole or absent."""

import json
import math
from pathlib import Path

import pytest

from peft_vlm.files import finite_or_null, write_json


def test_a_value_that_is_no_json_leaves_the_old_file(tmp_path: Path) -> None:
    """The report of an earlier run must not end as half a file."""
    path = tmp_path / "metrics.json"
    write_json(path, {"name": "na\u00efve", "scores": [1.5, None]})
    before = path.read_bytes()
    with pytest.raises(TypeError, match="not JSON serializable"):
        write_json(path, {"scores": [1.5, {1, 2}]})
    with pytest.raises(ValueError, match="not JSON compliant"):
        write_json(path, {"loss": math.nan}, allow_nan=False)
    assert path.read_bytes() == before
    assert sorted(tmp_path.iterdir()) == [path]
    assert json.loads(before) == {"name": "na\u00efve", "scores": [1.5, None]}
    assert "na\u00efve" in before.decode("utf-8"), "names stay readable"


def test_numbers_that_are_not_finite_become_null() -> None:
    """Readers beside Python's know no NaN."""
    value = {"loss": math.nan, "steps": [1, {"norm": -math.inf, "name": "nan"}], "best": None, "rate": 0.5}
    expected = {"loss": None, "steps": [1, {"norm": None, "name": "nan"}], "best": None, "rate": 0.5}
    assert finite_or_null(value) == expected


def test_nan_is_kept_where_it_is_allowed(tmp_path: Path) -> None:
    """A validation loss that overflowed is a fact of the run."""
    write_json(tmp_path / "metrics.json", {"loss": math.nan})
    assert math.isnan(json.loads((tmp_path / "metrics.json").read_text())["loss"])
