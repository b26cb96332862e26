"""A paper's table from its recipe: plan the grid, run the cells that are missing, compare.

One process, or several started by `accelerate launch`, which divide each training among them: cells run one after
the other.
"""

import errno
import math
import os
import time
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from peft import PeftModel
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from peft_vlm.data.benchmarks import BENCHMARKS
from peft_vlm.data.loading import load_image_dataset
from peft_vlm.data.questions import ImageQuestionDataset
from peft_vlm.data.splits import base_and_new_classes
from peft_vlm.data.transforms import EvalTransform
from peft_vlm.distributed import is_main_process, part_of
from peft_vlm.errors import AdapterError, DataError, PeftVLMError
from peft_vlm.evaluation import protocols
from peft_vlm.evaluation.classify import TextClassifier
from peft_vlm.evaluation.mllm import evaluate_prompt
from peft_vlm.evaluation.report import EvalReport
from peft_vlm.evaluation.run import load_model
from peft_vlm.evaluation.transfer import TransferReport
from peft_vlm.experiments.cells import CELL_NAME, finished_cell, run_cell
from peft_vlm.experiments.comparison import STAND_IN_NOTE, TABLE_NAME, lines_of, write_table
from peft_vlm.experiments.recipes import ASSETS, TEACHER, Cell, Grid
from peft_vlm.experiments.run import images_of, preset_of
from peft_vlm.experiments.transfer import ImageTextModel
from peft_vlm.files import REPORT_NAME, TRANSFER_NAME, last_part, read_json, write_json
from peft_vlm.hub.card import write_card
from peft_vlm.models.repository import is_local
from peft_vlm.registry import RunSize
from peft_vlm.serving.escape import one_line
from peft_vlm.settings import RunSettings
from peft_vlm.training.arguments import VLMTrainingArguments

#: Makes the arguments of a training from recommended settings and further words of the command line.
MakeArguments = Callable[[dict[str, Any], list[str]], VLMTrainingArguments]
#: Test images of a multimodal model in a stand-in, the first ones of a fixed shuffle.
STAND_IN_IMAGES = 48


#: Classes, training and test images of what a recipe trains on, so that a plan needs no data. ImageNet-21K: the
#: processed winter release, arXiv 2104.10972.
SIZES = {name: (one.num_classes, one.num_train or one.num_test, one.num_test) for name, one in BENCHMARKS.items()}
SIZES |= {"uoft-cs/cifar10": (10, 50_000, 10_000), "imagenet21k": (10_450, 11_060_223, 522_500)}


@dataclass(frozen=True)
class Place:
    """Where data and models of a grid are, and where its results go.

    Args:
        output_dir: Folder of the cells and the table.
        data_root: Folder of all data sets; None for ids on the Hub only.
        stand_in: Take the bundled ones.
        changes: Settings that differ from the recipe's by flags, as the table and the cells record them.
        select_on_test: Choose checkpoints on test images, as the official code does.
    """

    output_dir: Path
    data_root: str | None = None
    stand_in: bool = False
    changes: Mapping[str, Any] = field(default_factory=dict)
    select_on_test: bool = False

    def data(self, name: str) -> dict[str, str | None]:
        """`dataset` and `data_root` of a data set, as `RunSettings` and `load_image_dataset` take them.

        Args:
            name: Its name in the recipe.

        Raises:
            DataError: If no folder is given that it could be in.
        """
        if "/" in name:  # an id on the Hub, or a copy of it
            return {"dataset": str(self._copy(name) or name), "data_root": None}
        root = self._root()
        if root is None:
            raise DataError(
                "Expected `data_root`, the folder of all data sets, got none. docs/reproduce.md says how to fill it."
            )
        if name in BENCHMARKS:
            return {"dataset": name, "data_root": root}
        return {"dataset": str(Path(root) / name), "data_root": None}

    def model(self, name: str) -> str:
        """Folder or Hub id of a model: a copy in `data_root`, if there is one.

        Args:
            name: Its name in the recipe.
        """
        return name if is_local(name) else str(self._copy(name) or name)

    def _root(self) -> str | None:
        if self.data_root is None and self.stand_in and not ASSETS.is_dir():
            raise DataError(
                f"Expected the bundled models and data in {str(ASSETS)!r}, which an installed package does not bring. "
                "Clone the repository, and pass its examples/assets as `data_root`."
            )
        return self.data_root or (str(ASSETS) if self.stand_in else None)

    def _copy(self, name: str) -> Path | None:
        """A folder in `data_root` that is called like the last part of an id."""
        root = self._root()
        copy = None if root is None else Path(root, last_part(name))
        return copy if copy is not None and copy.is_dir() else None


@dataclass(frozen=True)
class Plan:
    """Size of one row of a grid.

    Args:
        row: Data set.
        runs: Trainings.
        images: Training images of one.
        steps: Optimizer steps of one, by one process.
        tests: Test images, each classified by adapter and base model.
    """

    row: str
    runs: int
    images: int
    steps: int
    tests: int


def plan_of(grid: Grid, place: Place, arguments: MakeArguments) -> list[Plan]:
    """Sizes of all rows, the teachers' included, in the order of the run; of the benchmarks as the papers count them.

    Args:
        grid: The grid.
        place: Where its data are.
        arguments: Makes training arguments.
    """
    rows: dict[str, list[Cell]] = {}
    for cell in grid.cells:
        rows.setdefault(cell.row, []).append(cell)
    plans = []
    for row, (cell, *others) in rows.items():
        size = _size(cell, place)
        training = {**preset_of(_run_settings(cell), size).training, **cell.training}
        args = arguments(training, [f"--output_dir={place.output_dir}"])
        whole = math.floor if args.dataloader_drop_last else math.ceil
        batches = whole(size.num_images / args.per_device_train_batch_size)
        updates = math.ceil(batches / args.gradient_accumulation_steps)
        steps = args.max_steps if args.max_steps > 0 else math.ceil(args.num_train_epochs * updates)
        targets = [target for target in cell.targets.values() if "dataset" in target]
        tests = sum(_counts(one, place, "test")[1].total() for one in (cell.settings, *targets))
        plans.append(Plan(row, 1 + len(others), size.num_images, steps, tests))
    return plans


def plan_table(grid: Grid, plans: Sequence[Plan]) -> str:
    """The plan as text.

    Args:
        grid: The grid.
        plans: Its rows.
    """
    lines = [f"{grid.method}, {grid.protocol}: {len(grid.cells)} runs", ""]
    lines += [f"{'trained on':32}{'runs':>6}{'images each':>13}{'steps each':>12}{'test images':>13}"]
    lines += [f"{p.row:32}{p.runs:6}{p.images:13,}{p.steps:12,}{p.tests:13,}" for p in plans]
    images, steps = sum(p.runs * p.images for p in plans), sum(p.runs * p.steps for p in plans)
    return "\n".join([*lines, f"{'in all':32}{len(grid.cells):6}{images:13,}{steps:12,}"])


def _size(cell: Cell, place: Place) -> RunSize:
    """What a training sees."""
    settings = cell.settings
    classes, count = _counts(settings, place, "train")
    shown = range(classes)
    if settings["protocol"] == "base_to_new" and not settings.get("transductive"):
        shown, _ = base_and_new_classes(classes)
    numbers = [min(count[label], settings["shots"] or count[label]) for label in shown if count[label]]
    return RunSize(
        protocol=settings["protocol"],
        num_images=sum(numbers),
        num_classes=len(numbers),
        fewest=min(numbers),
        is_small=place.stand_in,
    )


def _counts(settings: Mapping[str, Any], place: Place, part: str) -> tuple[int, Counter[int]]:
    """Number of classes, and images of each in the part for training or test."""
    name = settings["dataset"]
    if name in SIZES:
        classes, train, test = SIZES[name]
        total = train if part == "train" else test
        return classes, Counter({label: len(part_of(total, index=label, parts=classes)) for label in range(classes)})
    key = "split" if part == "train" else "test_split"
    where = place.data(name)
    images = load_image_dataset(where["dataset"], data_root=where["data_root"], split=settings.get(key, part))
    return len(images.class_names), Counter(images.labels)


#: Checkpoints after every epoch, of which the best one on the validation images stays.
_BEST_EPOCH = {
    **{"eval_strategy": "epoch", "save_strategy": "epoch", "save_total_limit": 1},
    **{"load_best_model_at_end": True, "metric_for_best_model": "accuracy"},
}


def _run_settings(cell: Cell) -> RunSettings:
    """The settings of a cell's training with the recipe's names of data and models."""
    return RunSettings(**cell.settings, evaluate=not cell.targets)


def reproduce(
    grid: Grid, place: Place, arguments: MakeArguments, *, steps: Mapping[str, int], say: Callable[[str], None]
) -> tuple[str, dict[str, str]]:
    """Run the cells that are missing, and write the table after each.

    Args:
        grid: The grid.
        place: Where data are and results go.
        arguments: Makes training arguments.
        steps: Steps of a training by row, for the time.
        say: Prints a line.

    Returns:
        The table as Markdown, and the errors of the cells that failed.

    Raises:
        DataError: If the folder holds another table, or cells of other settings.
        PeftVLMError: If the disk is full.
    """
    _check_folder(grid, place)
    for cell in grid.cells:
        place.data(cell.settings["dataset"])  # without a data root nothing can run
    failed: dict[str, str] = {}
    runs = {cell.name: _Run(cell, grid, place, failed) for cell in grid.cells}
    found = {name: run.result() for name, run in runs.items()}
    done = {name: result for name, result in found.items() if result is not None}
    complete = {name for name, result in done.items() if runs[name].is_complete(result)}
    clock = _Clock({cell.name: steps[cell.row] for cell in grid.cells if cell.name not in done}, say=say)
    table = _write(grid, place, done, failed)
    for number, cell in enumerate(grid.cells, start=1):
        if cell.name in complete:
            continue
        say(f"{number}/{len(grid.cells)} {cell.name}")
        if cell.teacher in failed:
            failed[cell.name] = f"its teacher {cell.teacher!r} failed"
            continue
        clock.start(cell.name)
        try:
            result = runs[cell.name].run(arguments, clock, trained=done.get(cell.name))
        except Exception as error:  # named here, in the table and at the end; the others continue
            if _is_full(error):
                raise PeftVLMError(f"{cell.name}: {error} Free some room; the same command continues.") from error
            if int(os.environ.get("WORLD_SIZE", 1)) > 1:  # the other processes may not have failed
                raise
            failed[cell.name] = one_line(f"{type(error).__name__}: {error}")
            say(f"  failed: {failed[cell.name]}")
        else:
            if result is not None:
                done[cell.name] = result
                scores = ", ".join(f"{name} {value:.1f} %" for name, value in result["scores"].items())
                say(f"  {scores}{clock.left()}")
        table = _write(grid, place, done, failed)
    return table, failed


def _is_full(error: Exception) -> bool:
    """Whether an error comes from a full disk, on which no further cell could run."""
    cause = error.__cause__ or error
    return isinstance(cause, OSError) and cause.errno in (errno.ENOSPC, errno.EDQUOT)


def _check_folder(grid: Grid, place: Place) -> None:
    """Refuse the folder of another table; a damaged one is written again from the cells."""
    path = place.output_dir / TABLE_NAME
    try:
        table = read_json(path) if path.is_file() else {}
    except AdapterError:
        return
    wanted = {"method": grid.method, "protocol": grid.protocol, "stand_in": grid.stand_in}
    if isinstance(table, dict) and table and {name: table.get(name) for name in wanted} != wanted:
        raise DataError(
            f"{str(place.output_dir)!r} holds the table of {table.get('method')!r}, {table.get('protocol')!r}"
            f"{', stand-in' if table.get('stand_in') else ''}. Pass another `output_dir`."
        )


@dataclass(frozen=True)
class _Run:
    """A cell where it runs.

    Args:
        cell: The cell.
        grid: Its grid.
        place: Where data are and results go.
        failed: Errors by name; targets that cannot be read are added.
    """

    cell: Cell
    grid: Grid
    place: Place
    failed: dict[str, str]

    @property
    def folder(self) -> Path:
        """Folder of the cell."""
        return self.place.output_dir / self.cell.name

    @property
    def selects(self) -> bool:
        """Whether the checkpoint is chosen on test images; a teacher's never is."""
        return self.place.select_on_test and not self.cell.row.startswith(TEACHER)

    def settings(self) -> RunSettings:
        """The settings of the training, with the places of data, models and teacher."""
        settings, place, teacher = _run_settings(self.cell), self.place, self.cell.teacher
        return replace(
            settings,
            **place.data(settings.dataset),
            model=place.model(settings.model),
            teacher=None if settings.teacher is None else place.model(settings.teacher),
            teacher_adapter=None if teacher is None else str(place.output_dir / teacher),
            eval_split=settings.test_split if self.selects else None,
        )

    def wanted(self) -> dict[str, Any]:
        """What decides the result, as JSON values; not where the data lie."""
        settings = asdict(_run_settings(self.cell)) | {"teacher_adapter": self.cell.teacher}
        return settings | {
            "seed": self.cell.seed,
            "training": self.cell.training,
            "changes": dict(self.place.changes),
            "select_on_test": self.place.select_on_test,
        }

    def result(self) -> dict[str, Any] | None:
        """The result of a cell that is trained, and measured unless it has targets."""
        columns = () if self.cell.targets else self.grid.columns
        return finished_cell(self.folder, self.wanted(), columns=columns)

    def is_complete(self, result: Mapping[str, Any]) -> bool:
        """Whether all targets of a trained cell are measured, and the source with them."""
        measured = {name.rpartition("/")[0] or name for name in result["scores"]}
        return not self.cell.targets or {self.cell.row, *self.cell.targets} <= measured

    def run(
        self, arguments: MakeArguments, clock: "_Clock", *, trained: dict[str, Any] | None
    ) -> dict[str, Any] | None:
        """Train and measure; measure only where it is trained."""
        saving = _BEST_EPOCH if self.selects else {"save_strategy": "no"}
        last = [f"--seed={self.cell.seed}", f"--output_dir={self.folder}", "--resume_from_checkpoint=auto"]

        def training(recommended: dict[str, Any]) -> VLMTrainingArguments:
            own = _divided({**recommended, **self.cell.training}, self.place)
            return arguments({**saving, "report_to": "none", **own}, last)

        def measure() -> dict[str, float]:
            several_models = self.grid.protocol == "mllm_transfer"
            return self._measure_models(training({})) if several_models else self._measure_targets(training({}))

        if trained is not None:
            if not is_main_process():
                return None
            result = trained | {"scores": measure()}
            write_json(self.folder / CELL_NAME, result)
            return result
        several = measure if self.cell.targets else None
        return run_cell(
            self.settings(), training, self.folder, wanted=self.wanted(), measure=several, callbacks=[clock]
        )

    def _measure_targets(self, args: VLMTrainingArguments) -> dict[str, float]:
        """Accuracy on the source and on every target, each with its own class names and template."""
        cell, settings = self.cell, self.settings()
        loaded = load_model(self.folder, base_model=settings.model, device=str(args.device))
        rows = {cell.row: cell.settings, **cell.targets}
        transform, datasets = EvalTransform(loaded.image_processor), {}
        for name, row in rows.items():
            one = replace(settings, **self.place.data(row["dataset"]))
            with self._named(name):
                datasets[name] = images_of(one, row.get("test_split", "test"), transform)
        if not datasets.keys() & cell.targets.keys():
            return {}  # all are named in `failed`; the training stays
        source = cell.row if cell.row in datasets else None
        templates = {name: rows[name]["template"] for name in datasets if "template" in rows[name]}
        classifier = TextClassifier(loaded.model, loaded.tokenizer, template=loaded.template or settings.template)
        measured = protocols.domain_shift if self.grid.protocol == "domain_shift" else protocols.cross_dataset
        result = measured(classifier, datasets, source=source, templates=templates, progress=not args.disable_tqdm)
        report = EvalReport.from_result(
            result,
            model=settings.model,
            adapter=str(self.folder),
            dataset=", ".join(datasets),
            template=tuple(dict.fromkeys(templates.values())) or (settings.template,),
            shots=settings.shots or None,
            seed=cell.seed,
        )
        report.save(self.folder / REPORT_NAME)
        write_card(self.folder, license=args.hub_license)
        return result.scores

    def _measure_models(self, args: VLMTrainingArguments) -> dict[str, float]:
        """The prompt on the model it was trained on and on all others."""
        cell, settings, effects = self.cell, self.settings(), {}
        images = images_of(settings, settings.test_split)
        if self.place.stand_in:
            order = torch.randperm(len(images), generator=torch.Generator().manual_seed(0))
            images = images.select(sorted(order[:STAND_IN_IMAGES].tolist()))
        models = {cell.row: cell.settings["model"], **{name: one["model"] for name, one in cell.targets.items()}}
        for name, model_name in models.items():
            with self._named(name):
                member = ImageTextModel.load(self.place.model(model_name))
                questions = ImageQuestionDataset.from_images(images, question=settings.question)
                model = PeftModel.from_pretrained(member.model.to(args.device), self.folder).eval()
                effects[name] = evaluate_prompt(model, questions.with_collator(member.collator))
        report = TransferReport(f"{settings.dataset}, {len(images)} test images", (cell.row,), effects, seed=cell.seed)
        report.save(self.folder / TRANSFER_NAME)
        write_card(self.folder, license=args.hub_license)
        return {name: score for name, score in report.scores().items() if "/" in name}

    @contextmanager
    def _named(self, target: str) -> Iterator[None]:
        """Within this, a target that cannot be read is named; the others are measured, and the next start tries it."""
        try:
            yield
        except (ValueError, OSError) as error:
            self.failed[f"{self.cell.name} on {target}"] = one_line(f"{type(error).__name__}: {error}")


def _divided(training: dict[str, Any], place: Place) -> dict[str, Any]:
    """Training arguments of one of several processes, whose batches together are the recipe's."""
    name = "per_device_train_batch_size"
    batch, processes = training.get(name), int(os.environ.get("WORLD_SIZE", 1))
    if batch is None or processes == 1 or name in place.changes:
        return training
    if batch % processes:
        raise DataError(
            f"Expected a number of processes that divides the recipe's batch of {batch}, got {processes}. Start "
            f"fewer, or pass `{name}`, which the table will record."
        )
    return {**training, name: batch // processes}


def _scores(cell: Cell, grid: Grid, scores: Mapping[str, float]) -> dict[str, dict[str, float]]:
    """Scores of a cell by row and column of the table."""
    if grid.protocol == "mllm_transfer":
        rows: dict[str, dict[str, float]] = {}
        for name, score in scores.items():
            row, _, column = name.rpartition("/")
            rows.setdefault(row, {})[column] = score
        return rows
    if cell.targets:
        return {row: {"accuracy": scores[row]} for row in (cell.row, *cell.targets) if row in scores}
    return {cell.row: {column: scores[column] for column in grid.columns if column in scores}}


def _write(grid: Grid, place: Place, done: Mapping[str, dict[str, Any]], failed: Mapping[str, str]) -> str:
    """Write the table from the main process."""
    by_name = {cell.name: cell for cell in grid.cells}
    scores = {name: _scores(by_name[name], grid, cell["scores"]) for name, cell in done.items()}
    notes = [STAND_IN_NOTE] if grid.stand_in else []
    if place.changes:
        changed = ", ".join(f"{name}={value}" for name, value in place.changes.items())
        notes.append(f"Settings that are not the recipe's: `{changed}`.")
    if place.select_on_test:
        notes.append("**Checkpoints were chosen on test images**, as the official code does: too high on new images.")
    if any(cell.settings.get("transductive") for cell in grid.cells):
        notes.append("Transductive: trained on unlabelled images of all classes, new ones included.")
    lines = lines_of(grid, scores)
    if not is_main_process():
        return ""
    place.output_dir.mkdir(parents=True, exist_ok=True)
    return write_table(place.output_dir, grid, lines, notes=notes, failed=failed, missing=len(grid.cells) - len(done))


class _Clock(TrainerCallback):
    """Estimates the time of the missing cells: from the first steps, then from what whole cells take.

    Args:
        steps: Steps of the missing cells by name.
        say: Prints a line.
    """

    def __init__(self, steps: Mapping[str, int], *, say: Callable[[str], None]) -> None:
        self.steps, self.say, self.said = dict(steps), say, False
        self.begun = self.before = time.perf_counter()
        self.total = sum(steps.values())

    def start(self, name: str) -> None:
        """Take a cell from those that are left.

        Args:
            name: Its name.
        """
        self.steps.pop(name, None)

    def on_step_end(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Measure the second step, the first one without preparations."""
        now = time.perf_counter()
        if not self.said and state.global_step == 2 and state.is_world_process_zero:
            self.said = True
            step = now - self.before
            time_ = _duration(step * self.total)
            self.say(f"  a step takes {step:.2f} s here: {time_} for {self.total:,} steps, evaluation not counted")
        self.before = now

    def left(self) -> str:
        """Time left, if the missing cells take as long per step as those that are done, evaluation included."""
        left = sum(self.steps.values())
        taken = (time.perf_counter() - self.begun) / max(1, self.total - left)
        return f"; about {_duration(taken * left)} left" if left else ""


def _duration(seconds: float) -> str:
    """A time for readers."""
    if seconds < 120:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 7200 else f"{seconds / 3600:.1f} h"
