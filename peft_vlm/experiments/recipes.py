"""The papers' experiments as data: `recipes/<method>.yaml`, what is trained on what, and what the paper reports.

A recipe makes a grid of cells, each one training: data set x shots x seed. Under cross-dataset and domain-shift one
source is trained on and several targets are tested. Nothing is loaded here but the recipe:

    model, seeds, template, teacher     of all protocols; a teacher with `method` is trained by cells of its own
    rows.<data set>                     settings of `RunSettings` and `training` of one data set
    protocols.<protocol>
        shots, run, rows, training      images per class, settings of all runs, and of one data set
        source, datasets                where they are not the standard ones; `per_target`: a training for each target
        selects_on_test                 the official code chooses checkpoints on test images
        published                       `citation`, `missing`, and `results.<row>.<score>` in percent
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import yaml

from peft_vlm.errors import DataError, check_choice

FOLDER = Path(__file__).parent / "recipes"
#: The bundled models and data sets in place of the papers', for a look at the grid without downloads.
STAND_IN = "stand_in"
#: Bundled data of a checkout.
ASSETS = Path(__file__).parent.parent.parent / "examples" / "assets"
#: Row of the mean over data sets.
AVERAGE = "average"
#: Begins the row of a teacher.
TEACHER = "teacher, "
ELEVEN = (
    *("imagenet", "caltech101", "oxford_pets", "stanford_cars", "oxford_flowers", "food101", "fgvc_aircraft"),
    *("sun397", "dtd", "eurosat", "ucf101"),
)
#: What is trained on alone, and all others, where a recipe names none.
STANDARD: dict[str, tuple[str | None, tuple[str, ...]]] = {
    "base_to_new": (None, ELEVEN),
    "few_shot": (None, ELEVEN),
    "cross_dataset": ("imagenet", ELEVEN[1:]),
    "domain_shift": ("imagenet", ("imagenetv2", "imagenet_sketch", "imagenet_a", "imagenet_r")),
}
#: Scores of one data set by protocol; several test sets: accuracy each.
COLUMNS = {"base_to_new": ("base", "new", "h"), "mllm_transfer": ("full_size", "shrunken", "prompted")}


@dataclass(frozen=True)
class Cell:
    """One training of a grid.

    Args:
        name: Folder below the grid's, such as `"dtd/seed1"`.
        row: Row of the table that its result goes to; for a training with several targets the name of the source.
        seed: Seed of shots and training.
        settings: For `RunSettings`, without the place of the data.
        training: For `VLMTrainingArguments`, instead of the preset's.
        targets: Other test sets, or other models, by name: `dataset`, `split` and `template`, or `model`.
        teacher: Name of the cell whose adapter teaches.
    """

    name: str
    row: str
    seed: int
    settings: dict[str, Any]
    training: dict[str, Any] = field(default_factory=dict)
    targets: dict[str, dict[str, Any]] = field(default_factory=dict)
    teacher: str | None = None


@dataclass(frozen=True)
class Grid:
    """All cells of a recipe, the rows of its table, and what the paper reports.

    Args:
        method: Training method.
        protocol: Protocol.
        cells: Trainings in the order of the run; teachers first.
        rows: Rows of the table in its order, without averages.
        averages: Rows that are averaged, by the name of the average.
        published: The paper's numbers: `{row: {column: percent}}`; what it lacks is not published.
        citation: Where they stand.
        missing: What the table says where there is none.
        selects_on_test: The official code chose its checkpoints on test images.
        stand_in: Whether bundled models and data replace the paper's.
    """

    method: str
    protocol: str
    cells: tuple[Cell, ...]
    rows: tuple[str, ...]
    averages: dict[str, tuple[str, ...]]
    published: dict[str, dict[str, float]]
    citation: str
    missing: str = "not recorded"
    selects_on_test: bool = False
    stand_in: bool = False

    @property
    def columns(self) -> tuple[str, ...]:
        """Scores of a row."""
        return COLUMNS.get(self.protocol, ("accuracy",))


def recipe_names() -> list[str]:
    """Methods that have a recipe."""
    return sorted(path.stem for path in FOLDER.glob("*.yaml") if path.stem != STAND_IN)


def read_recipe(method: str) -> dict[str, Any]:
    """The recipe of a method.

    Args:
        method: Name of a training method.

    Raises:
        ValueError: If there is no recipe of it.
    """
    check_choice("method", method, recipe_names())
    return _read(method)


def _read(name: str) -> dict[str, Any]:
    return yaml.safe_load((FOLDER / f"{name}.yaml").read_text("utf-8"))


def grid_of(
    method: str,
    protocol: str | None = None,
    *,
    datasets: Sequence[str] = (),
    seeds: Sequence[int] = (),
    model: str | None = None,
    teacher: str | None = None,
    stand_in: bool = False,
) -> Grid:
    """The grid of a recipe.

    Args:
        method: Name of a training method.
        protocol: One that its recipe has; None: the first.
        datasets: Data sets to train on, or targets where the training has several; none: all.
        seeds: Seeds; none: those of the recipe.
        model: Base model instead of the recipe's.
        teacher: Teacher, or CLIP of a loss, instead of the recipe's.
        stand_in: Take the bundled models and data.

    Raises:
        DataError: If the paper does not report the protocol, or the recipe lacks a data set or a teacher.
    """
    recipe = read_recipe(method)
    protocol = protocol or next(iter(recipe["protocols"]))
    if protocol not in recipe["protocols"]:
        raise DataError(
            f"The paper of {method!r} does not report {protocol!r}, so there is no table to compare with. Choose one "
            f"of {', '.join(recipe['protocols'])}."
        )
    parts = _as_stand_in(recipe, protocol) if stand_in else _resolved(recipe, protocol)
    if teacher is not None and "teacher" not in parts:
        raise DataError(f"{method!r} has no teacher under {protocol!r}. Leave out `teacher`.")
    if teacher is not None:
        parts["teacher"] = {**parts["teacher"], "model": teacher} if _is_taught(parts) else teacher
    parts |= {"model": model or parts["model"], "seeds": list(seeds) or parts["seeds"]}
    unknown = [name for name in datasets if name not in parts["datasets"]]
    if unknown:
        raise DataError(f"Expected `datasets` among {list(parts['datasets'])!r}, got {unknown!r}.")
    chosen = {name: row for name, row in parts["datasets"].items() if not datasets or name in datasets}
    rows, averages = _rows(parts, protocol)
    published = {} if stand_in else recipe["protocols"][protocol].get("published", {})
    return Grid(
        method=method,
        protocol=protocol,
        cells=tuple(_cells(method, protocol, parts, chosen)),
        rows=rows,
        averages=averages,
        published=published.get("results", {}),
        citation=published.get("citation", ""),
        missing=published.get("missing", "not recorded"),
        selects_on_test=bool(recipe["protocols"][protocol].get("selects_on_test")),
        stand_in=stand_in,
    )


def _resolved(recipe: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """A protocol of a recipe with the data sets and settings that hold for all of its protocols."""
    own = recipe["protocols"][protocol]
    parts = {name: recipe[name] for name in ("model", "seeds", "template", "teacher") if name in recipe} | own
    source, names = STANDARD.get(protocol, (None, ()))
    source, names = own.get("source", source), own.get("datasets", names)
    rows = {
        name: _merged(recipe.get("rows", {}).get(name), own.get("rows", {}).get(name)) for name in {source, *names}
    }
    parts |= {"datasets": {name: rows[name] for name in names}}
    return parts | ({} if source is None else {"source": {"name": source, **rows[source]}})


def _merged(*rows: Mapping[str, Any] | None) -> dict[str, Any]:
    """Settings of a data set, of which later ones replace earlier ones."""
    merged: dict[str, Any] = {}
    for row in rows:
        merged |= row or {}
    return merged


def _as_stand_in(recipe: Mapping[str, Any], protocol: str) -> dict[str, Any]:
    """The same grid on bundled models and data, with the settings that a method recommends for small models."""
    official, bundled = _resolved(recipe, protocol), _read(STAND_IN)
    own = bundled["protocols"][protocol]
    parts = {name: official[name] for name in ("seeds", "per_target") if name in official} | own
    run = {name: value for name, value in official.get("run", {}).items() if name == "transductive"}
    shots = official.get("shots", [0])
    parts |= {"run": own.get("run", {}) | run, "shots": [0] if shots == [0] else own["shots"]}
    parts |= {"model": own.get("model", bundled["model"]), "training": bundled["training"] | own.get("training", {})}
    if _is_taught(official):
        parts["teacher"] = {**official["teacher"], "model": bundled["teacher"], "run": {}, "shots": 4}
    elif "teacher" in official:
        parts["teacher"] = bundled["teacher"]
    return parts


def _is_taught(parts: Mapping[str, Any]) -> bool:
    """Whether the teacher is trained by cells of its own."""
    return isinstance(parts.get("teacher"), Mapping)


def _has_targets(parts: Mapping[str, Any]) -> bool:
    """Whether one training is tested on several targets."""
    return "source" in parts and not parts.get("per_target")


def _cells(method: str, protocol: str, parts: Mapping[str, Any], chosen: Mapping[str, Any]) -> list[Cell]:
    """All trainings, teachers first."""
    source = parts.get("source", {})
    trained_on = {source["name"]: source} if _has_targets(parts) else chosen
    kind = "model" if protocol == "mllm_transfer" else "dataset"
    targets = {name: {kind: name, **row} for name, row in chosen.items()} if _has_targets(parts) else {}
    teachers: dict[str, Cell] = {}
    cells = []
    for name, row in trained_on.items():
        first = None
        if _is_taught(parts):
            first = _teacher(protocol, parts, source if protocol != "base_to_new" else {"name": name, **row})
            teachers[first.name] = first
        for shots in parts["shots"]:
            for seed in parts["seeds"]:
                cell = _cell(method, protocol, parts, name, row, shots, seed)
                if "teacher" in parts:
                    cell.settings["teacher"] = parts["teacher"]["model"] if first else parts["teacher"]
                cells.append(replace(cell, targets=targets, teacher=first and first.name))
    return [*teachers.values(), *cells]


def _cell(
    method: str, protocol: str, parts: Mapping[str, Any], name: str, row: Mapping[str, Any], shots: int, seed: int
) -> Cell:
    """One training."""
    own = {key: value for key, value in row.items() if key not in ("training", "name")}
    settings: dict[str, Any] = {"method": method, "model": parts["model"], "dataset": name, "shots": shots}
    settings |= {"protocol": "base_to_new" if protocol == "base_to_new" else "few_shot"}
    settings |= {"template": parts["template"]} if "template" in parts else {}
    settings |= _as_words({**parts.get("run", {}), **own})
    folder, key = (f"{name}/shots{shots}", f"{name}, {shots} shots") if len(parts["shots"]) > 1 else (name, name)
    training = {**parts.get("training", {}), **row.get("training", {})}
    return Cell(f"{folder}/seed{seed}", key, seed, settings, training)


def _teacher(protocol: str, parts: Mapping[str, Any], row: Mapping[str, Any]) -> Cell:
    """The training of a teacher, one for all seeds of its students."""
    teacher = parts["teacher"]
    own = {key: value for key, value in row.items() if key in ("dataset", "template")}
    one = {**parts, "model": teacher["model"], "run": teacher.get("run", {}), "shots": [teacher["shots"]]}
    cell = _cell(teacher["method"], protocol, one, row["name"], own, teacher["shots"], teacher["seed"])
    return replace(cell, name=f"teacher/{cell.name}", row=f"{TEACHER}{cell.row}")


def _as_words(run: Mapping[str, Any]) -> dict[str, Any]:
    """Settings of a run, where mappings become the `name=value` words that `RunSettings` holds."""
    return {
        key: [f"{name}={json.dumps(one)}" for name, one in value.items()] if isinstance(value, Mapping) else value
        for key, value in run.items()
    }


def _rows(parts: Mapping[str, Any], protocol: str) -> tuple[tuple[str, ...], dict[str, tuple[str, ...]]]:
    """Rows of the table, and what its averages are over."""
    names = tuple(parts["datasets"])
    source = (parts["source"]["name"],) if _has_targets(parts) else ()
    if protocol == "mllm_transfer":
        return (*source, *names), {}
    if len(parts["shots"]) > 1:
        averages = {f"{AVERAGE}, {k} shots": tuple(f"{name}, {k} shots" for name in names) for k in parts["shots"]}
        return tuple(row for rows in averages.values() for row in rows), averages
    taught = names if protocol == "base_to_new" else (parts.get("source", {}).get("name"),)
    teachers = tuple(f"{TEACHER}{name}" for name in taught) if _is_taught(parts) else ()
    averages = {AVERAGE: names} | ({f"{TEACHER}{AVERAGE}": teachers} if len(teachers) > 1 else {})
    return (*source, *names, *teachers), averages
