"""The page of `peft-vlm app`. Gradio is imported here alone; the browser is sent nowhere but to this server."""

import os
import tempfile
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # read when Gradio is imported

import gradio as gr
from PIL import Image

from peft_vlm.app.compare import (
    WRONG,
    Comparison,
    TestImages,
    cards_html,
    message_html,
    pairs_html,
    parse_classes,
)
from peft_vlm.app.prompts import PromptedModels, is_pixel_prompt
from peft_vlm.evaluation.plots import confusion_matrix_png, has_matplotlib, reliability_png
from peft_vlm.serving.escape import html, one_line, printable

CSS = """
.gradio-container { max-width: 1360px !important; margin: auto !important; }
.peft-cards { display: grid; grid-template-columns: repeat(auto-fill, minmax(260px, 1fr)); gap: 12px; }
.peft-card { border: 1px solid var(--border-color-primary); border-radius: 8px; padding: 10px 14px;
  background: var(--block-background-fill); min-width: 0; }
.peft-base { border-style: dashed; }
.peft-card h4 { margin: 0 0 2px 0; overflow-wrap: anywhere; }
.peft-note { opacity: 0.75; font-size: 0.8em; margin: 0 0 6px 0; overflow-wrap: anywhere; }
.peft-error { color: #b3261e; margin: 4px 0; overflow-wrap: anywhere; }
.dark .peft-error { color: #ff9d94; }
.peft-bar { display: grid; grid-template-columns: minmax(0, 1fr) auto; column-gap: 8px; margin: 5px 0;
  font-size: 0.9em; }
.peft-label { overflow: hidden; text-overflow: ellipsis; white-space: nowrap; }
.peft-value { font-variant-numeric: tabular-nums; }
.peft-track { grid-column: 1 / -1; height: 7px; border-radius: 4px; background: var(--border-color-primary);
  overflow: hidden; }
.peft-track > span { display: block; height: 100%; background: #4477aa; }
.peft-base .peft-track > span { background: #999999; }
.peft-answer { font-size: 1.1em; margin: 4px 0; }
.peft-pairs { grid-template-columns: repeat(2, minmax(0, 1fr)); }
.peft-table { border-collapse: collapse; border: none !important; }
.peft-table tr, .peft-table tbody { border: none !important; }
.peft-table th, .peft-table td { border: none !important; padding: 2px 18px 2px 0 !important; text-align: left; }
.peft-image img { width: 100% !important; height: 100% !important; object-fit: contain; }
#examples .grid-wrap { max-height: none !important; height: auto !important; min-height: 0 !important; }
#examples .grid-container { grid-template-columns: repeat(auto-fill, minmax(105px, 1fr)) !important; }
#examples .caption-label { position: static; max-width: 100%; white-space: normal; border: none; font-size: 0.75em;
  line-height: 1.2; padding: 2px 4px; }
#examples .thumbnail-item { height: auto !important; aspect-ratio: auto !important; }
#examples img { height: 92px !important; object-fit: contain; }
"""

#: One call of a model at a time, whoever asks; the rest waits.
ONE = {"concurrency_limit": 1, "concurrency_id": "models"}
#: While somebody types only the last state is computed.
LIVE = {**ONE, "trigger_mode": "always_last", "show_progress": "minimal"}
MAX_UPLOAD = "50mb"


def build(
    comparison: Comparison | None,
    prompted: Sequence[tuple[str, PromptedModels]] = (),
    test: TestImages | None = None,
    *,
    question: str = "What is this?",
    examples: Sequence[str] = (),
) -> gr.Blocks:
    """The page, ready to be launched.

    Args:
        comparison: Adapters of CLIP-like models; None without any.
        prompted: Pixel prompts by name, each on its multimodal models.
        test: Labelled images for the gallery and the test tab.
        question: Asked about images in the tab of pixel prompts at first.
        examples: Image files offered there.
    """
    with gr.Blocks(title="peft-vlm", analytics_enabled=False, fill_width=True, delete_cache=(3600, 3600)) as page:
        gr.Markdown("# peft-vlm\nImages, classes and templates of your own, by the base model and by adapters of it.")
        with gr.Tabs():
            if comparison is not None:
                with gr.Tab("Compare", id="compare"):
                    _compare_tab(page, comparison, test)
                if test is not None:
                    with gr.Tab("Test", id="test"):
                        _test_tab(comparison, test)
            for name, models in prompted:
                with gr.Tab(printable(f"Pixel prompt: {name}" if len(prompted) > 1 else "Pixel prompt")):
                    _prompt_tab(page, models, question, examples)
    return page


def _image_input(name: str, value: Any) -> gr.Image:
    """An image input that hands over the file as it was uploaded: what is no image gets our own message."""
    sources = ["upload", "clipboard", "webcam"]
    look = {"height": 240, "elem_id": name, "elem_classes": "peft-image", "buttons": ["fullscreen"]}
    image = gr.Image(value, label="Image: drop, paste or take one", sources=sources, type="filepath", **look)
    decode = image.preprocess

    def path_of(payload: Any) -> Any:
        """The file, which Gradio has checked to be one of its own uploads."""
        return payload.path if payload is not None and payload.path else decode(payload)

    image.preprocess = path_of  # a subclass of a component would write a file of stubs beside this one
    return image


def _live(page: gr.Blocks, function: Callable[..., Any], inputs: list[Any], outputs: Any, name: str) -> None:
    """Compute outputs when the page opens and whenever an input changes."""
    page.load(function, inputs, outputs, api_name=False, **ONE)
    for number, component in enumerate(inputs):
        component.change(function, inputs, outputs, api_name=False if number else name, **LIVE)


def _compare_tab(page: gr.Blocks, comparison: Comparison, test: TestImages | None) -> None:
    names = list(comparison.adapters)
    first = comparison.class_names or (tuple(test.dataset.class_names) if test is not None else ("cat", "dog"))
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            image = _image_input("image", None if test is None else test.image(0))
            classes = gr.Textbox(
                "\n".join(first), label="Classes, one per line", lines=6, max_lines=10, elem_id="classes"
            )
            template = gr.Textbox(
                label="Template, with {} for the class", placeholder="empty: each adapter's own", elem_id="template"
            )
            chosen = gr.CheckboxGroup(names, value=comparison.chosen_at_first(), label="Adapters", elem_id="adapters")
        with gr.Column(scale=3, min_width=300):
            result = gr.HTML(message_html("Choose an image."), elem_id="result", js_on_load=None)
            if test is not None:
                _gallery(page, comparison, test, image)
    _live(page, shown_answers(comparison), [image, classes, template, chosen], result, "compare")


def shown_answers(comparison: Comparison) -> Callable[..., str]:
    """The function behind the tab of comparisons: what a person entered in, HTML out, errors included.

    Args:
        comparison: Classifiers.
    """

    def show(image: str | None, classes: str, template: str, chosen: Sequence[str]) -> str:
        try:
            names = parse_classes(classes or "")
            if image is None:
                return message_html("Choose an image.")
            return cards_html(comparison.answers(image, names, template=template or "", names=chosen))
        except WRONG as error:
            return message_html(_without_folders(error, image), is_error=True)

    return show


def _without_folders(error: Exception, image: str | None) -> str:
    """A message without the place where an upload lies."""
    text = one_line(error)
    return text.replace(image, Path(image).name) if image else text


def _gallery(page: gr.Blocks, comparison: Comparison, test: TestImages, image: gr.Image) -> None:
    names = list(comparison.classifiers)
    judge = gr.Dropdown(names, value=(comparison.chosen_at_first() or names)[0], label="Test images, as seen by")
    gallery = gr.Gallery(
        show_label=False, columns=6, height="auto", allow_preview=False, elem_id="examples", buttons=[]
    )

    def marked(name: str) -> list[tuple[Image.Image, str]]:
        try:
            captions = test.captions(test.result(name, comparison.classifiers[name]))
        except (KeyError, *WRONG) as error:
            captions = [f"? {one_line(error)[:60]}"] * len(test.examples)
        return [(test.image(number), caption) for number, caption in enumerate(captions)]

    def taken(event: gr.SelectData) -> Image.Image:
        return test.image(int(event.index))

    judge.change(marked, judge, gallery, **ONE)
    page.load(marked, judge, gallery, **ONE)
    gallery.select(taken, None, image, **ONE)


def _test_tab(comparison: Comparison, test: TestImages) -> None:
    number, total = len(test.dataset), test.num_all
    drawn = f"{number} of {total}, drawn by seed 0" if number < total else str(number)
    gr.Markdown(f"Test images: {drawn}. Each adapter is asked with its own template, among the classes of the images.")
    with gr.Row():
        names = list(comparison.classifiers)
        first = (comparison.chosen_at_first() or names)[0]
        judge = gr.Dropdown(names, value=first, label="Classifier", min_width=240)
        button = gr.Button("Measure", variant="primary", elem_id="measure")
    scores = gr.HTML(elem_id="scores", js_on_load=None)
    with gr.Row():
        plot = {"show_label": False, "interactive": False, "min_width": 300, "buttons": ["download", "fullscreen"]}
        calibration = gr.Image(label="Calibration", elem_id="calibration", **plot)
        confusion = gr.Image(label="Confusion", elem_id="confusion", **plot)
    button.click(measured(comparison, test), judge, [scores, calibration, confusion], api_name="measure", **ONE)


def measured(comparison: Comparison, test: TestImages) -> Callable[[str], tuple[Any, ...]]:
    """The function behind the tab of test images: a classifier's name in, scores and two plots out.

    Args:
        comparison: Classifiers.
        test: Labelled images.
    """

    def measure(name: str) -> tuple[Any, ...]:
        try:
            if name not in comparison.classifiers:
                raise ValueError(f"Expected one of {list(comparison.classifiers)!r}, got {name!r}.")
            result = test.result(name, comparison.classifiers[name])
        except WRONG as error:
            return message_html(error, is_error=True), None, None
        rows = {"accuracy": f"{result.accuracy:.1f} %", "mean over classes": f"{result.mean_class_accuracy:.1f} %"}
        rows |= {"calibration error (ECE)": f"{100 * result.ece:.1f} %", "images": str(result.num_images)}
        body = "".join(f"<tr><th>{html(key)}</th><td>{value}</td></tr>" for key, value in rows.items())
        table = f'<table class="peft-table">{body}</table>'
        if not has_matplotlib():
            return table + message_html("Plots need matplotlib: pip install matplotlib"), None, None
        with tempfile.TemporaryDirectory() as folder:
            first, second = Path(folder, "calibration.png"), Path(folder, "confusion.png")
            reliability_png(result.confidence, result.predicted == result.labels, first, title=f"{name}: calibration")
            confusion_matrix_png(result.confusion, result.class_names, second, title=f"{name}: confusion")
            plots = [Image.open(path).convert("RGB") for path in (first, second)]
        return table, *plots

    return measure


def _prompt_tab(page: gr.Blocks, models: PromptedModels, question: str, examples: Sequence[str]) -> None:
    recorded = getattr(models.first.active_peft_config, "class_names", None) or ()
    with gr.Row():
        with gr.Column(scale=1, min_width=300):
            image = _image_input("prompt_image", examples[0] if examples else None)
            asked = gr.Textbox(question, label="Question", elem_id="question")
            classes = gr.Textbox(
                "\n".join(recorded), label="Answers to choose from; empty: the model writes one", lines=3, max_lines=8
            )
            strength = gr.Slider(0, 2, value=1, step=0.1, label="Strength of the prompt", elem_id="strength")
            if examples:
                gr.Examples([[path] for path in examples], [image], label="Examples", cache_examples=False)
        with gr.Column(scale=3, min_width=300):
            with gr.Row():
                labels = ("Clean image", "Prompted image", "Prompt (grey is zero)")
                shown = {"interactive": False, "height": 250, "min_width": 120, "buttons": ["fullscreen"]}
                names = (None, "prompted", None)
                views = [
                    gr.Image(label=label, elem_id=name, **shown) for label, name in zip(labels, names, strict=True)
                ]
            result = gr.HTML(message_html("Choose an image."), elem_id="prompt_result", js_on_load=None)
    _live(page, _shown_prompt(models), [image, asked, classes, strength], [*views, result], "prompt")


def _shown_prompt(models: PromptedModels) -> Callable[..., tuple[Any, ...]]:
    """The function behind the tab of pixel prompts: what a person entered in; three images and HTML out.

    Args:
        models: Models with the prompt.
    """

    def show(image: str | None, question: str, classes: str, strength: float) -> tuple[Any, ...]:
        if image is None:
            return None, None, None, message_html("Choose an image.")
        try:
            names = parse_classes(classes) if (classes or "").strip() else ()
            views = models.views(image, strength)
            pairs = models.answers(image, question or "", names, strength=strength)
        except WRONG as error:
            return None, None, None, message_html(_without_folders(error, image), is_error=True)
        return *views, pairs_html(pairs)

    return show


def load(adapters: Sequence[str], models: Sequence[str] = (), **options: Any) -> tuple[Any, list[Any]]:
    """Load adapters for `build`: those of CLIP-like models together, pixel prompts of multimodal ones each by itself.

    Args:
        adapters: Folders or Hub ids.
        models: Further multimodal models for the pixel prompts.
        **options: `base_model` of the former, `device` and `tell` of both.

    Returns:
        A `Comparison`, or None, and a list of names with `PromptedModels`.
    """
    prompts = [adapter for adapter in adapters if is_pixel_prompt(adapter)]
    others = [adapter for adapter in adapters if adapter not in prompts]
    comparison = Comparison.load(others, **options) if others else None
    options.pop("base_model", None)
    return comparison, [(Path(path).name, PromptedModels.load(path, models, **options)) for path in prompts]


def launch(page: gr.Blocks, *, host: str = "127.0.0.1", port: int | None = None, **options: Any) -> Any:
    """Serve the page: no share link, no analytics, and fonts of the system only.

    Args:
        page: What `build` made.
        host: Address to listen on.
        port: Port; None for the first free one from 7860.
        **options: Passed to `Blocks.launch`.
    """
    families = ["ui-sans-serif", "system-ui", "sans-serif"], ["ui-monospace", "Consolas", "monospace"]
    fonts = [[gr.themes.Font(name) for name in names] for names in families]
    theme = gr.themes.Default(font=fonts[0], font_mono=fonts[1], primary_hue="blue")
    page.queue(max_size=64, default_concurrency_limit=1)
    return page.launch(
        server_name=host,
        server_port=port,
        share=False,
        theme=theme,
        css=CSS,
        max_file_size=MAX_UPLOAD,
        footer_links=[],
        ssr_mode=False,
        **options,
    )
