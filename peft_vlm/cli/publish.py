"""`peft-vlm publish`: an adapter folder to the Hub, evaluated first if asked to."""

import argparse
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any

from peft_vlm.cli.command import add_command, print_json, print_line
from peft_vlm.cli.console import calm
from peft_vlm.errors import PeftVLMError
from peft_vlm.files import CONFIG_NAME
from peft_vlm.settings import PROTOCOLS, EvaluationArguments

EXAMPLES = """
  peft-vlm publish outputs/readme user/my-adapter --license apache-2.0
      the folder holds the reports of `peft-vlm evaluate --baseline ... --output_dir outputs/readme`
  peft-vlm publish outputs/readme user/my-adapter --license mit --protocol few-shot --dataset my_images/ --shots 16
      evaluates adapter and base model first, into the folder
  peft-vlm publish outputs/readme user/my-adapter --license mit --private --base_model openai/clip-vit-base-patch16
  peft-vlm publish outputs/readme user/my-adapter --license mit --space user/my-app
      and a Space that runs `peft-vlm app` on it
  peft-vlm publish outputs/promptsrc/* --collection user/promptsrc --license mit
      all prompts of a table that `peft-vlm reproduce` made, with the table as card
"""


def register(commands: Any) -> None:
    """Add the command to the program."""
    command = add_command(
        commands,
        "publish",
        run,
        summary="an adapter folder to the Hub, with a model card made from it",
        description="Uploads weights, configuration, reports and card in one commit. Log in first: hf auth login",
        examples=EXAMPLES,
    )
    command.add_argument("folder", help="adapter folder; with --collection also a folder of them")
    repo_id = command.add_argument("repo_id", help="owner/name; made if it does not exist; with --collection a folder")
    repo_id.required = False
    command.add_argument("folders", nargs="*", default=[], help="further folders, with --collection")
    command.add_argument("--collection", metavar="OWNER/NAME", help="one repository for all adapters, in subfolders")
    command.add_argument("--license", help="licence as the Hub spells it: apache-2.0, mit, cc-by-4.0, ...")
    command.add_argument("--base_model", help="Hub id of the base model, if the adapter was trained on a folder")
    command.add_argument("--title", help="heading of the card")
    command.add_argument("--note", default="", help="further paragraph of the card")
    command.add_argument("--subfolder", help="where in the repository")
    command.add_argument("--revision", help="branch; made if it does not exist")
    command.add_argument("--private", action="store_true", default=None, help="make a private repository")
    command.add_argument("--incomplete", action="store_true", help="publish what others cannot use, without warnings")
    command.add_argument("--space", metavar="OWNER/NAME", help="also a Space that shows the adapter in the app")
    command.add_argument(
        "--space_package", default="peft-vlm[app,plots]", help="what the Space installs, as in requirements.txt"
    )
    evaluation = command.add_argument_group("evaluation before publishing")
    evaluation.add_argument("--dataset", nargs="+", help="folder, CSV file or Hub id of the test images")
    evaluation.add_argument("--protocol", choices=PROTOCOLS, default="few-shot")
    evaluation.add_argument("--split", default="test", help="part of the dataset")
    evaluation.add_argument("--shots", type=int, help="labelled training images per class, for the card")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate if asked to, publish, and print the address.

    Args:
        arguments: Parsed words.

    Raises:
        PeftVLMError: If neither one folder and its repository nor a collection are given.
    """
    if arguments.collection:
        _publish_collection(arguments)
        return
    if arguments.repo_id is None or arguments.folders:
        raise PeftVLMError(
            f"Expected a folder and owner/name, got {_words(arguments)!r}. For several folders pass `collection`."
        )
    from peft_vlm.evaluation.run import run_evaluation
    from peft_vlm.hub.publish import check_repo_id, publish, publish_space

    if arguments.space:
        check_repo_id(arguments.space, what="space")
        if arguments.subfolder or arguments.revision:
            raise PeftVLMError("Expected `space` for an adapter at the head of its repository, got a place inside it.")
    folder = arguments.folder
    if arguments.dataset:
        evaluation = EvaluationArguments(
            protocol=arguments.protocol,
            dataset=arguments.dataset,
            output_dir=folder,
            adapter=folder,
            split=[arguments.split],
            shots=arguments.shots,
            baseline=True,
            plots=False,
        )
        with calm():
            run_evaluation(evaluation)
    names = ("license", "base_model", "title", "note", "subfolder", "revision", "private", "incomplete")
    published = publish(folder, arguments.repo_id, **{name: getattr(arguments, name) for name in names})
    space = None
    if arguments.space:
        options = {"license": arguments.license, "private": arguments.private, "package": arguments.space_package}
        space = publish_space(arguments.space, [published.repo_id], title=arguments.title, **options)
    _print(published, arguments, space=space)


def _words(arguments: argparse.Namespace) -> list[str]:
    """What stands on the command line beside the flags."""
    return [arguments.folder, *filter(None, [arguments.repo_id]), *arguments.folders]


def _print(published: Any, arguments: argparse.Namespace, *, space: Any = None) -> None:
    """The address, and that of the Space."""
    if arguments.json:
        print_json(asdict(published) | ({} if space is None else {"space": asdict(space)}))
        return
    for one in filter(None, (published, space)):
        print_line(one.url if one.changed else f"{one.url} has the same files already: no new commit.")


def _publish_collection(arguments: argparse.Namespace) -> None:
    """All adapters in and below some folders, with the table beside them."""
    unused = [
        name for name in ("dataset", "title", "note", "subfolder", "revision", "space") if getattr(arguments, name)
    ]
    if unused:
        raise PeftVLMError(f"Expected `{unused[0]}` for one adapter only, got it with `collection`. Leave it out.")
    from peft_vlm.hub.publish import publish_collection

    places = [Path(word).absolute() for word in _words(arguments)]
    missing = [str(place) for place in places if not place.exists()]
    if missing:
        raise PeftVLMError(f"Expected folders with adapters, got {missing!r}, which do not exist.")
    found = sorted({file.parent for place in places if place.is_dir() for file in place.rglob(CONFIG_NAME)})
    found = [folder for folder in found if not any(part.startswith("checkpoint-") for part in folder.parts)]
    root = Path(os.path.commonpath([place.parent for place in places] if len(places) > 1 else places))
    root = root.parent if root in found else root
    table = root / "table.md"
    names = ("license", "base_model", "private", "incomplete")
    published = publish_collection(
        {folder.relative_to(root).as_posix(): folder for folder in found},
        arguments.collection,
        table=table.read_text("utf-8") if table.is_file() else "",
        **{name: getattr(arguments, name) for name in names},
    )
    _print(published, arguments)
