"""`peft-vlm reproduce`: the table of a paper, from its recipe."""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from peft_vlm.cli.command import add_command, print_json, print_line, read_settings
from peft_vlm.cli.console import calm
from peft_vlm.cli.train import arguments_maker, check_training_flags
from peft_vlm.errors import DataError, PeftVLMError
from peft_vlm.settings import ReproductionSettings

EXAMPLES = """
  peft-vlm reproduce skip_tuning --stand-in --output_dir outputs/stand_in
      the whole grid on bundled models and data, in minutes
  peft-vlm reproduce promptkd --protocol base_to_new --plan
  peft-vlm reproduce promptkd --protocol base_to_new --data-root /data --output_dir outputs/promptkd
  accelerate launch --num_processes 4 -m peft_vlm.cli reproduce coop --protocol few_shot --data-root /data \\
      --output_dir outputs/coop
      four GPUs divide the steps of each run; runs come one after the other
"""
DESCRIPTION = """\
Plans the runs of a table (data set x shots x seed), trains and tests them by the paper's protocol, and writes after
every run table.md, table.json and table.png: ours, the paper's number, the difference, and a verdict by our spread.
Stopped and started again, it continues with the runs that are missing. A run that fails is named, and the others
continue. docs/reproduce.md has the data, the times and how to read the verdicts."""


def register(commands: Any) -> None:
    """Add the command to the program."""
    command = add_command(
        commands,
        "reproduce",
        run,
        summary="a paper's table: all runs, ours beside the published numbers",
        description=DESCRIPTION,
        examples=EXAMPLES,
        settings=ReproductionSettings,
        takes_more=True,
        more="\n  and every field of VLMTrainingArguments, such as --use_cpu, --bf16, --report_to tensorboard;\n"
        "  those that change a result are recorded in the table\n",
    )
    command.usage = "peft-vlm reproduce METHOD [--flag value ...]   (all flags: --help)"
    command.add_argument("method", metavar="METHOD", help="method with a recipe, such as skip_tuning")


#: Flags that change how a run is shown or spread, not its result.
_HARMLESS = ("report_to", "disable_tqdm", "logging_", "save_", "dataloader_num_workers", "use_cpu", "run_name", "hub_")


def run(arguments: argparse.Namespace) -> None:
    """Plan, run, and print the table.

    Args:
        arguments: Parsed words.

    Raises:
        KeyboardInterrupt: If it was stopped.
        PeftVLMError: If runs failed, after the others are done.
    """
    settings = read_settings(arguments, ReproductionSettings)
    settings.check()
    check_training_flags(arguments.more)
    changes = _changes(arguments.more)
    if "seed" in changes:
        raise DataError("Expected `seeds`, the seeds of the runs, got `seed`. Pass them there.")
    from peft_vlm.distributed import from_main
    from peft_vlm.experiments.recipes import grid_of
    from peft_vlm.experiments.reproduce import Place, plan_of, plan_table, reproduce
    from peft_vlm.files import locked_folder

    names = ("datasets", "seeds", "model", "teacher", "stand_in")
    chosen = {name: getattr(settings, name) for name in names}
    grid = grid_of(arguments.method, settings.protocol, **chosen)
    if settings.select_on_test_as_official and not grid.selects_on_test:
        raise DataError(
            f"The official code of {grid.method!r} does not select on test images under {grid.protocol!r}. Leave out "
            "`select_on_test_as_official`."
        )
    folder = Path(settings.output_dir or "outputs")
    changes = {name: chosen[name] for name in ("model", "teacher") if chosen[name]} | changes
    place = Place(folder, settings.data_root, settings.stand_in, changes, settings.select_on_test_as_official)
    make = arguments_maker(
        arguments.more,
        {"disable_tqdm": True},
        usage="peft-vlm reproduce METHOD",
        has_preset="max_steps" not in changes,  # a few steps have no epoch to warm up in
    )
    with calm():
        plans = plan_of(grid, place, make)
        if settings.plan:
            _print_plan(grid, plans, as_json=arguments.json, text=plan_table(grid, plans))
            return
        args = make({}, [f"--output_dir={folder}"])  # wrong values are found before anything is loaded
        is_main = args.process_index == 0

        def say(text: str) -> None:
            if is_main and not arguments.json:
                for line in text.split("\n"):
                    print_line(line)

        say(plan_table(grid, plans) + "\n")
        steps = {plan.row: plan.steps for plan in plans}
        with locked_folder(folder, is_main=is_main, tell=from_main):
            try:
                table, failed = reproduce(grid, place, make, steps=steps, say=say)
            except KeyboardInterrupt as stop:
                raise KeyboardInterrupt("stopped; the same command continues with the runs that are missing") from stop
    if arguments.json and is_main:
        print_json({"table": str(folder / "table.json"), "failed": failed})
    say(f"\n{table}\nWritten to {folder}/: table.md, table.json, table.png, and a folder per run with its adapter.")
    if failed:
        names = ", ".join([*list(failed)[:10], *(["..."] if len(failed) > 10 else [])])
        raise PeftVLMError(
            f"{len(failed)} failed, all others are done: {names}. Their errors stand in "
            f"{str(folder / 'table.md')!r}. The same command runs them again."
        )


def _print_plan(grid: Any, plans: Sequence[Any], *, as_json: bool, text: str) -> None:
    """The plan as text or JSON."""
    if as_json:
        rows = [vars(plan) for plan in plans]
        print_json({"method": grid.method, "protocol": grid.protocol, "runs": len(grid.cells), "rows": rows})
        return
    print(text)


def _changes(words: Sequence[str]) -> dict[str, str]:
    """Flags that may change a result, with their values."""
    changes: dict[str, str] = {}
    name = ""
    for word in words:
        if word.startswith("--"):
            name, _, value = word[2:].partition("=")
            name = name.replace("-", "_")
            changes[name] = value
        else:
            changes[name] = f"{changes[name]} {word}".strip()
    return {name: value or "true" for name, value in changes.items() if not name.startswith(_HARMLESS)}
