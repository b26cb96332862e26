"""`peft-vlm publish`: an adapter folder to the Hub, evaluated first if asked to."""

import argparse
from dataclasses import asdict
from typing import Any

from peft_vlm.cli.command import add_command, calm, print_json, print_line
from peft_vlm.settings import PROTOCOLS, EvaluationArguments

EXAMPLES = """
  peft-vlm publish outputs/readme user/my-adapter --license apache-2.0
      the folder holds the reports of `peft-vlm evaluate --baseline ... --output_dir outputs/readme`
  peft-vlm publish outputs/readme user/my-adapter --license mit --protocol few-shot --dataset my_images/ --shots 16
      evaluates adapter and base model first, into the folder
  peft-vlm publish outputs/readme user/my-adapter --license mit --private --base_model openai/clip-vit-base-patch16
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
    command.add_argument("folder", help="adapter folder")
    command.add_argument("repo_id", help="owner/name; made if it does not exist")
    command.add_argument("--license", help="licence as the Hub spells it: apache-2.0, mit, cc-by-4.0, ...")
    command.add_argument("--base_model", help="Hub id of the base model, if the adapter was trained on a folder")
    command.add_argument("--title", help="heading of the card")
    command.add_argument("--note", default="", help="further paragraph of the card")
    command.add_argument("--subfolder", help="where in the repository")
    command.add_argument("--revision", help="branch; made if it does not exist")
    command.add_argument("--private", action="store_true", default=None, help="make a private repository")
    command.add_argument("--incomplete", action="store_true", help="publish what others cannot use, without warnings")
    evaluation = command.add_argument_group("evaluation before publishing")
    evaluation.add_argument("--dataset", nargs="+", help="folder, CSV file or Hub id of the test images")
    evaluation.add_argument("--protocol", choices=PROTOCOLS, default="few-shot")
    evaluation.add_argument("--split", default="test", help="part of the dataset")
    evaluation.add_argument("--shots", type=int, help="labelled training images per class, for the card")


def run(arguments: argparse.Namespace) -> None:
    """Evaluate if asked to, publish, and print the address."""
    from peft_vlm.evaluation.run import run_evaluation
    from peft_vlm.hub.publish import publish

    if arguments.dataset:
        evaluation = EvaluationArguments(
            protocol=arguments.protocol,
            dataset=arguments.dataset,
            output_dir=arguments.folder,
            adapter=arguments.folder,
            split=[arguments.split],
            shots=arguments.shots,
            baseline=True,
            plots=False,
        )
        with calm():
            run_evaluation(evaluation)
    names = ("license", "base_model", "title", "note", "subfolder", "revision", "private", "incomplete")
    options = {name: getattr(arguments, name) for name in names}
    published = publish(arguments.folder, arguments.repo_id, **options)
    if arguments.json:
        print_json(asdict(published))
        return
    print_line(published.url if published.changed else f"{published.url} has the same files already: no new commit.")
