"""Results on disk are whole or absent."""

import json
import math
from pathlib import Path, PureWindowsPath

import pytest

from peft_vlm.errors import AdapterError
from peft_vlm.files import file_name, finite_or_null, last_part, new_folder, write_json


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


def test_paths_of_any_system_are_named_alike(tmp_path: Path) -> None:
    """A report that was written on Windows is read on Linux; a card must not show the whole path."""
    windows = PureWindowsPath("C:/Zo\u00eb/holiday photos/icons")
    assert "\\" in str(windows)
    for path in (windows, str(windows), "C:/data/icons", "/srv/zoe/icons/", "user/icons", "icons"):
        assert last_part(path) == "icons"
    assert last_part("D:\\data\\cifar.csv") == "cifar.csv"


def test_names_from_data_become_file_names_everywhere() -> None:
    """A domain called `night: fog/rain?` names a plot, which Windows would refuse."""
    assert file_name('night: fog/rain? <a|b> "c" \\d*') == "night_ fog_rain_ _a_b_ _c_ _d_"
    assert file_name("photo \u00e9 1.5") == "photo \u00e9 1.5"


def test_an_empty_folder_is_replaced_and_a_full_one_refused(tmp_path: Path) -> None:
    """The converter writes where the user has made a folder already; Windows replaces none."""
    (tmp_path / "new").mkdir()
    with new_folder(tmp_path / "new") as part:
        (part / "a").write_text("a")
    assert (tmp_path / "new" / "a").is_file()
    with pytest.raises(AdapterError, match="new or empty folder"), new_folder(tmp_path / "new"):
        raise AssertionError("entered")
    assert sorted(path.name for path in tmp_path.iterdir()) == ["new"]
