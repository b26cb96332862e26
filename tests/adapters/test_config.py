"""Class names in an adapter folder: as they were, all of them, a list."""

import json
from pathlib import Path

import pytest

from peft_vlm import CoOpConfig
from peft_vlm.adapters.config import MAX_LISTED_CLASSES, read_config
from peft_vlm.errors import AdapterError

LONG = [f"class {number}" for number in range(MAX_LISTED_CLASSES + 1)]


def saved(folder: Path, names: list[str]) -> Path:
    """A configuration with class names on disk."""
    config = CoOpConfig(num_text_tokens=2)
    config.class_names = names
    config.save_pretrained(str(folder))
    return folder


def test_long_lists_come_back_with_every_name_in_its_place(tmp_path: Path) -> None:
    """A form feed or U+2028 inside a name ended it, and all labels behind it meant the class before."""
    names = [*LONG, "sea\u2028lion", "ox\x0cen", "th\u00e9\x85", "last"]
    folder = saved(tmp_path, names)
    assert json.loads((folder / "adapter_config.json").read_text())["num_class_names"] == len(names)
    assert read_config(folder).class_names == names


@pytest.mark.parametrize("change", [lambda lines: lines[:-1], lambda lines: [*lines, "one more\n"]])
def test_a_list_with_another_number_of_names_is_refused(tmp_path: Path, change) -> None:
    """A cut file gives labels of other classes, or an IndexError at the first rare one."""
    path = saved(tmp_path, LONG) / "class_names.txt"
    path.write_text("".join(change(path.read_text().splitlines(keepends=True))))
    with pytest.raises(AdapterError, match=f"Expected {len(LONG)} class names in .*, got"):
        read_config(tmp_path)


def test_folders_that_count_no_names_are_still_read(tmp_path: Path) -> None:
    """Older releases wrote no number."""
    path = saved(tmp_path, LONG) / "adapter_config.json"
    values = json.loads(path.read_text())
    del values["num_class_names"]
    path.write_text(json.dumps(values))
    assert read_config(tmp_path).class_names == LONG


def test_a_word_is_no_list_of_class_names(tmp_path: Path) -> None:
    """ "cat" stood for the classes c, a, t."""
    path = saved(tmp_path, ["cat", "dog"]) / "adapter_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | {"class_names": "cat"}))
    with pytest.raises(ValueError, match="Expected `class_names` to be a list of texts or None, got 'cat'"):
        read_config(tmp_path)
