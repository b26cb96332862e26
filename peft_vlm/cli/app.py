"""`peft-vlm app`: a page in the browser that compares adapters on images of one's own."""

import argparse
import threading
from importlib.util import find_spec
from typing import Any

from peft_vlm.cli.command import add_command, print_json, print_line
from peft_vlm.cli.console import calm
from peft_vlm.errors import PeftVLMError

EXAMPLES = """
  peft-vlm app outputs/readme
  peft-vlm app outputs/mine outputs/other --test my_images/
  peft-vlm app model_cards/tvp-lamplight --models examples/assets/mllm_idefics3 --question "what colour is it?"
"""


def register(commands: Any) -> None:
    """Add the command to the program."""
    command = add_command(
        commands,
        "app",
        run,
        summary="a page in the browser: adapters side by side on your images, classes and templates",
        description="Serves a page on this machine until Ctrl-C. It needs Gradio: pip install 'peft-vlm[app]'.",
        examples=EXAMPLES,
    )
    command.add_argument("adapters", nargs="+", help="folders or Hub ids of adapters")
    command.add_argument("--base_model", help="base model; by default the one that each adapter records")
    command.add_argument(
        "--test", help="folder, CSV file or Hub id of labelled images: gallery, calibration, confusion"
    )
    command.add_argument("--split", default="test", help="part of --test (default: test)")
    command.add_argument("--models", nargs="+", default=[], help="further multimodal models for TVP prompts")
    command.add_argument("--question", default="What is this?", help="asked about images in the TVP tab")
    command.add_argument("--examples", nargs="+", default=[], help="image files offered in the TVP tab")
    command.add_argument("--device", help="device of the models; by default a GPU if there is one")
    command.add_argument("--host", default="127.0.0.1", help="address to listen on; it has no log-in")
    command.add_argument("--port", type=int, help="port (default: the first free one from 7860)")


def run(arguments: argparse.Namespace) -> None:
    """Load the adapters and serve the page until it is interrupted.

    Args:
        arguments: Parsed words.

    Raises:
        PeftVLMError: If Gradio is not installed, or for a wrong word.
    """
    if find_spec("gradio") is None:
        raise PeftVLMError("The app needs Gradio, which is not installed. Install it: pip install 'peft-vlm[app]'.")
    tell = (lambda name: None) if arguments.json or arguments.quiet else (lambda name: print_line(f"Loading {name}"))
    from peft_vlm.app.compare import TestImages
    from peft_vlm.app.page import build, launch, load

    with calm():
        test = None if arguments.test is None else TestImages.load(arguments.test, split=arguments.split)
        options: dict[str, Any] = {name: getattr(arguments, name) for name in ("base_model", "device")}
        adapters = list(dict.fromkeys(arguments.adapters))
        comparison, prompted = load(adapters, arguments.models, tell=tell, **options)
    page = build(comparison, prompted, test, question=arguments.question, examples=arguments.examples)
    serving = {"quiet": True, "prevent_thread_lock": True}
    _, url, _ = launch(page, host=arguments.host, port=arguments.port, **serving)
    if arguments.json:
        print_json({"url": url})
    else:
        print_line(f"The app is at {url} (Ctrl-C ends it)")
    try:
        threading.Event().wait()
    finally:
        page.close(verbose=False)
