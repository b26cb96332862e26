"""`peft-vlm convert`: official checkpoints to adapters and back, CLIPs of OpenAI and open_clip to base models."""

import argparse
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from peft_vlm.cli.command import add_command, print_json, print_line
from peft_vlm.errors import PeftVLMError
from peft_vlm.files import CONVERSION_NAME, read_class_names_file

if TYPE_CHECKING:
    from peft_vlm.conversion.official_file import OfficialFile

#: Kinds of official checkpoints, as `peft_vlm.conversion.formats` has them.
KINDS = (
    "ATPrompt",
    "Bayesian prompts",
    "CLIP-LoRA",
    "CoCoOp",
    "CoOp",
    "KgCoOp",
    "MaPLe",
    "POMP",
    "PRE",
    "PromptKD",
    "PromptSRC or IVLP",
    "Skip Tuning",
    "TVP",
)

EXAMPLES = """
  peft-vlm convert prompt_learner/model.pth.tar-50 --base_model clip-vit-base-patch16 --class_position end \\
      --output_dir coop
  peft-vlm convert VLPromptLearner_large/model.pth.tar-20 --base_model clip-vit-large-patch14 \\
      --context_init "a photo of a" --output_dir teacher
  peft-vlm convert VLPromptLearner/model-best.pth.tar --base_model clip-vit-base-patch16 --teacher teacher \\
      --class_names classes.txt --output_dir promptkd
  peft-vlm convert learnable_params/model.pth.tar-20 --base_model clip-vit-base-patch16 \\
      --template "a photo of a {}." --class_names cat dog --output_dir skip_tuning
  peft-vlm convert checkpoint_best.pth --output_dir tvp
  peft-vlm convert ViT-B-16.pt --tokenizer clip-vit-base-patch16 --output_dir my-clip
  peft-vlm convert skip_tuning --official_file learnable_params/model.pth.tar-20
"""
DESCRIPTION = """Writes an adapter folder from an official checkpoint (kinds: {kinds}),
a base model from a CLIP of OpenAI or open_clip, or, with --official_file, the checkpoint of the official code from an
adapter. What the file is shows in its tensors; what it does not hold is asked for. Files are read without running
anything in them; conversion.json in the folder lists what became of every tensor."""
ADAPTER_FLAGS = {
    "base_model": "folder or id of the CLIP of the training",
    "template": "Skip Tuning, PromptKD, VPT: text around a class name, with one {}",
    "class_position": "CoOp, POMP: end, middle or front (official CLASS_TOKEN_POSITION)",
    "context_init": "CoOp, PromptSRC: words that the context started from (official CTX_INIT)",
    "shape": "TVP: border, full or patch, where the prompt does not show it",
    "shrink": "TVP: who shrinks the image: model, processor or none",
}
CLIP_FLAGS = {
    "hidden_act": "CLIP: quick_gelu or gelu, where the file does not say",
    "tokenizer": "CLIP: folder or id with a tokenizer to put beside the model",
}
NUMBERS = {
    "num_samples": "Bayesian prompts: contexts that predictions are averaged over (official L), 20 by default",
    "start_layer": "Skip Tuning: official START_LAYER; by default read off the file",
    "border": "TVP: width of the border, where the prompt does not show it",
    "patch_size": "TVP: side of the square of --shape patch",
    "vision_head_width": "CLIP: width of the vision tower's attention heads, 64 by default",
    "text_heads": "CLIP: attention heads of the text tower, width / 64 by default",
}
OF_A_CLIP = (*CLIP_FLAGS, "vision_head_width", "text_heads")


def register(commands: Any) -> None:
    """Add the command to the program."""
    command = add_command(
        commands,
        "convert",
        run,
        summary="official checkpoints to adapters and back, OpenAI and open_clip weights to base models",
        description=DESCRIPTION.format(kinds=", ".join(KINDS)),
        examples=EXAMPLES,
    )
    command.add_argument(
        "source", help="official checkpoint or weights; with --official_file: an adapter folder or id"
    )
    target = command.add_mutually_exclusive_group(required=True)
    target.add_argument("--output_dir", help="new folder")
    target.add_argument("--official_file", help="write SOURCE as a checkpoint of its method's official code")
    command.add_argument("--class_names", nargs="+", help="names in label order, or a .txt file with one per line")
    command.add_argument("--teacher", help="PromptKD: adapter folder or id of the teacher, or a plain CLIP")
    for name, text in (ADAPTER_FLAGS | CLIP_FLAGS).items():
        command.add_argument(f"--{name}", help=text)
    for name, text in NUMBERS.items():
        command.add_argument(f"--{name}", type=int, help=text)


def run(arguments: argparse.Namespace) -> None:
    """Convert one file or folder."""
    names = ("class_names", "teacher", *ADAPTER_FLAGS, *CLIP_FLAGS, *NUMBERS)
    given = {name: value for name in names if (value := getattr(arguments, name)) is not None}
    if arguments.official_file is not None:
        facts = _to_official(arguments.source, arguments.official_file, given)
    else:
        from peft_vlm.conversion.clip import is_clip
        from peft_vlm.conversion.official_file import OfficialFile

        file = OfficialFile.open(arguments.source)
        to_folder = _to_clip if is_clip(file.tensors) else _to_adapter
        facts = to_folder(file, arguments.output_dir, given)
    if arguments.json:
        print_json(facts)
    elif "used" in facts:
        _print_report(facts)
    else:
        for name, value in facts.items():
            print_line(f"{name:20}{value}")


def _to_official(adapter: str, path: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Write an adapter as an official checkpoint."""
    from peft_vlm.conversion.formats import export
    from peft_vlm.evaluation.run import load_model

    _check_flags(given, ("base_model",), "an export")
    loaded = load_model(adapter, base_model=given.get("base_model"))
    settings = export(loaded.model, path, tokenizer=loaded.tokenizer)
    return {"source": adapter, "written": path, "official settings": settings}


def _to_clip(file: "OfficialFile", folder: str, given: Mapping[str, Any]) -> dict[str, Any]:
    """Make a base model from weights of OpenAI or open_clip."""
    from peft_vlm.conversion.clip import convert_clip

    _check_flags(given, OF_A_CLIP, "a complete CLIP")
    model = convert_clip(file, folder, **given)
    facts = {"kind": "CLIP", "source": file.path.name, "written": folder, "parameters": model.num_parameters()}
    if "tokenizer" not in given:
        facts["note"] = "There is no tokenizer in it: convert with --tokenizer, or put one there."
    return facts


def _to_adapter(file: "OfficialFile", folder: str, given: dict[str, Any]) -> dict[str, Any]:
    """Make an adapter from an official checkpoint."""
    from peft_vlm.conversion.formats import convert, recognise

    if "class_names" in given:
        given["class_names"] = _listed(given["class_names"])
    if "class_vectors" in recognise(file).settings():
        given |= _from_teacher(given)
    given.pop("teacher", None)
    return {"written": folder, **convert(file, folder, **given).to_dict()}


def _from_teacher(given: Mapping[str, Any]) -> dict[str, Any]:
    """Class vectors of a PromptKD student, by its teacher."""
    from peft_vlm.evaluation.run import load_model
    from peft_vlm.models.towers import towers_of
    from peft_vlm.text.class_features import encode_classes
    from peft_vlm.text.prompts import tokenize_for_model

    if "teacher" not in given:
        raise PeftVLMError(
            "Expected `--teacher` for a PromptKD student: its class vectors are the teacher's, and no file holds "
            "them. Convert the teacher's checkpoint first (VLPromptLearner_large/...), and pass its folder."
        )
    name = given["teacher"]
    is_base = (Path(name) / "config.json").is_file() and not (Path(name) / "adapter_config.json").is_file()
    loaded = load_model(None if is_base else name, base_model=name if is_base else None)
    names, template = given.get("class_names") or loaded.class_names, given.get("template") or loaded.template
    if names is None or template is None:
        raise PeftVLMError(
            f"Expected `--class_names` and `--template`, which the teacher {name!r} does not record, got "
            f"{given.get('class_names')!r} and {given.get('template')!r}."
        )
    prompts = tokenize_for_model(loaded.model, loaded.tokenizer, names, template=template)
    scale = towers_of(loaded.model).logit_scale
    settings = {"class_names": list(names), "template": template, "teacher_name": name, "teacher_logit_scale": scale}
    return settings | {"class_vectors": encode_classes(loaded.model, prompts)}


def _listed(names: list[str]) -> list[str]:
    """Class names, from a text file where one is named."""
    if len(names) != 1 or not names[0].endswith(".txt"):
        return names
    try:
        lines = read_class_names_file(Path(names[0]))
    except OSError as error:
        raise PeftVLMError(f"Expected a file with class names, got {names[0]!r}: {error.strerror}.") from error
    return [line.strip() for line in lines if line.strip()]


def _check_flags(given: Mapping[str, Any], known: tuple[str, ...], what: str) -> None:
    """Refuse flags that do not apply to the kind of file."""
    unknown = [f"--{name}" for name in given if name not in known]
    if unknown:
        taken = ", ".join(f"--{name}" for name in known)
        raise PeftVLMError(f"Expected no {', '.join(unknown)} for {what}, which takes {taken}.")


def _print_report(report: dict[str, Any]) -> None:
    """Print the report, tensors with the same result on one line."""
    classes = report["class_names"]
    print_line(f"{report['source']} ({report['kind']}) -> {report['written']} (method {report['method']})")
    print_line(f"  classes: {'none recorded' if classes is None else f'{len(classes)} ({_some(classes)})'}")
    print_line(f"  used: {len(report['used'])} ({_some(report['used'])})")
    for part in ("unused", "missing"):
        fates: dict[str, list[str]] = {}
        for name, fate in report[part].items():
            fates.setdefault(fate, []).append(name)
        for fate, names in fates.items():
            print_line(f"  {part}: {len(names)}, {fate} ({_some(names)})")
    for note in report["notes"]:
        print_line(f"  {note}")
    print_line(f"  Every tensor by name: {Path(report['written']) / CONVERSION_NAME}")


def _some(names: Sequence[str]) -> str:
    """The first few names."""
    return ", ".join(names[:3]) + (", ..." if len(names) > 3 else "")
