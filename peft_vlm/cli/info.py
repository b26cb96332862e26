"""`peft-vlm info`: installed versions, settings of a method, facts about an adapter or an exported classifier."""

import argparse
import inspect
from collections.abc import Callable, Mapping
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_vlm.cli.command import add_command, print_json, print_line
from peft_vlm.errors import PeftVLMError
from peft_vlm.files import BASELINE_NAME, REPORT_NAME, WEIGHTS_NAME, file_inside, read_summary

if TYPE_CHECKING:
    from peft_vlm.objective import Paper
    from peft_vlm.registry import TrainingMethod

EXAMPLES = """
  peft-vlm info                                    versions and methods
  peft-vlm info skip_tuning                        settings of a method with their defaults, for `peft-vlm train`
  peft-vlm info outputs/readme                     an adapter: method, base model, classes, settings, results
  peft-vlm info exported/classifier.safetensors    an exported classifier
"""


def register(commands: Any) -> None:
    """Add the command to the program."""
    summary = "what is installed, the settings of a method, what an adapter is"
    command = add_command(commands, "info", run, summary=summary, examples=EXAMPLES)
    command.add_argument(
        "what", nargs="?", help="method; folder or Hub id of an adapter; exported classifier; none: what is installed"
    )


def run(arguments: argparse.Namespace) -> None:
    """Print facts."""
    from peft_vlm.registry import METHODS

    what = arguments.what
    if what is None:
        facts = _installed()
    elif what in METHODS:
        facts = _method(METHODS[what])
    elif what.endswith(".safetensors") and Path(what).is_file():
        from peft_vlm.serving.plain import load_exported

        facts = {"exported classifier": what, **asdict(load_exported(what).card)}
    else:
        facts = _adapter(what)
    if arguments.json:
        print_json(facts)
    else:
        _print(facts)


def _installed() -> dict[str, Any]:
    """Versions, and the tensors that each method trains."""
    from peft_vlm.registry import METHODS
    from peft_vlm.training.reports import environment

    trained = {name: METHODS[name].adapter_type.trained for name in sorted(METHODS)}
    return {"versions": environment(), "methods": trained}


def _method(method: "TrainingMethod") -> dict[str, Any]:
    """Settings of a method with their defaults, its presets, and what is recommended without one."""
    from peft_vlm.registry import RunSize

    facts = {"method": method.name, "adapter": method.adapter, "trained": method.adapter_type.trained}
    facts |= {"paper": _cited(method.paper), "config": {**_defaults(method.adapter_type.config), **method.defaults}}
    targets = (("objective", method.objective), ("objective on text models", method.answer_objective))
    facts |= {key: _defaults(target) for key, target in targets if target is not None}
    facts["presets"] = ", ".join(method.presets) or "none"
    if method.recommended is not None:
        for kind, is_small in (("models as large as ViT-B/16", False), ("smaller models", True)):
            size = RunSize(num_images=1600, num_classes=100, fewest=16, is_small=is_small)
            preset = method.recommended(size)
            values = preset.config | preset.objective | preset.training
            facts[f"recommended for {kind}, 16 images of 100 classes"] = values
    return facts | {"page": f"docs/methods/{method.name}.md"}


def _cited(paper: "Paper") -> str:
    """Title and address of a paper."""
    return f"{paper.title}, {paper.url}"


def _shared_fields() -> frozenset[str]:
    """Fields of every method's configuration."""
    from peft_vlm.adapters.config import VLMConfig

    return frozenset(inspect.signature(VLMConfig).parameters)


def _defaults(target: Callable[..., Any]) -> dict[str, Any]:
    """Default of each setting; "needed" where there is none."""
    parameters = [p for p in inspect.signature(target).parameters.values() if p.kind is not p.POSITIONAL_ONLY]
    own = [p for p in parameters if p.name not in _shared_fields() | {"prompts", "candidates"}]
    known = {p.name: "needed" if p.default is p.empty else p.default for p in own}
    return known | dict.fromkeys(getattr(target, "fits_model", ()), "fits the model")


def _adapter(adapter: str) -> dict[str, Any]:
    """Facts of an adapter's configuration, and of its folder if it is local."""
    from peft_vlm.adapters.adapter_files import AdapterSource
    from peft_vlm.adapters.config import adapter_settings, config_of, facts_of
    from peft_vlm.registry import adapter_type_of

    try:
        source = AdapterSource.find(adapter)
        config = config_of(source)
        values = facts_of(source, config).to_dict()
    except (OSError, ValueError) as error:
        raise PeftVLMError(f"{adapter!r} is no method and no adapter that can be read: {error}") from error
    kind = adapter_type_of(config)
    facts: dict[str, Any] = {"adapter": adapter, "method": kind.name, "trained": kind.trained}
    facts |= {"paper": _cited(kind.paper), "base model": config.base_model_name_or_path}
    facts |= {"classes": values["class_names"], "template": values["template"]}
    facts["images"] = {name: values[f"image_{name}"] for name in ("size", "mean", "std")}
    facts["settings"] = adapter_settings(config)
    facts |= {"format version": values["format_version"], "peft_vlm version": values["peft_vlm_version"]}
    return facts | _folder(Path(adapter))


def _folder(folder: Path) -> dict[str, Any]:
    """Size of the weights, training and results of a local adapter folder."""
    from peft_vlm.evaluation.report import EvalReport

    facts: dict[str, Any] = {}
    if (folder / WEIGHTS_NAME).is_file():
        facts["weights"] = f"{(folder / WEIGHTS_NAME).stat().st_size / 1e6:.2f} MB"
    summary = read_summary(folder)
    if summary is not None:
        facts |= {"data": summary.get("data"), "steps": summary.get("steps"), "objective": summary.get("objective")}
    for key, name in (("results", REPORT_NAME), ("results of the base model", BASELINE_NAME)):
        path = file_inside(folder, name)
        if path is not None:
            report = EvalReport.load(path)
            facts[key] = {"dataset": report.dataset, "protocol": report.protocol, **report.scores}
    return facts


def _print(facts: Mapping[str, Any], indent: str = "") -> None:
    """Print names and values in two columns; nested values are indented below their name."""
    for name, value in facts.items():
        if isinstance(value, Mapping):
            print_line(f"{indent}{name}")
            _print(value, indent + "  ")
            continue
        if isinstance(value, list | tuple) and len(value) > 8:
            value = f"{len(value)}: {', '.join(map(str, value[:6]))}, ..."
        elif isinstance(value, float):
            value = f"{value:.6g}"
        print_line(f"{indent + name:30}{value}")
