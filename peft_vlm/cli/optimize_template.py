"""`peft-vlm optimize-template`: a template for the class prompts, proposed by a local language model."""

import argparse
from typing import Any

from peft_vlm.cli.command import add_command, print_json, print_line, read_settings
from peft_vlm.cli.console import calm
from peft_vlm.settings import TemplateSettings

EXAMPLES = """
  peft-vlm optimize-template --model examples/assets/clip_student --dataset examples/assets/emoji \\
      --proposer my-language-model/ --template "a photo of a {}." --shots 1 --steps 20 --output_dir outputs/template
"""


def register(commands: Any) -> None:
    """Add the command to the program."""
    add_command(
        commands,
        "optimize-template",
        run,
        summary="a template for the class prompts, proposed by a local language model (IPO)",
        description="Writes history.json: every template that was tried, with accuracy and loss on the shots. Started "
        "again with\nthe same settings, a search continues. Nothing is trained; the result is a --template.",
        examples=EXAMPLES,
        settings=TemplateSettings,
    )


def run(arguments: argparse.Namespace) -> None:
    """Search and print."""
    settings = read_settings(arguments, TemplateSettings)
    settings.check()
    from peft_vlm.experiments.templates import optimize_template

    with calm():
        result = optimize_template(settings)
    if arguments.json:
        print_json(result)
        return
    print_line(
        f"{result['template']!r}: {result['accuracy']:.2f} % of the shots, {result['test_accuracy']:.2f} % of the test"
    )
    print_line(f"{settings.template!r}: {result['test_accuracy_before']:.2f} % of the test")
    print_line(f"Written to {settings.output_dir}")
