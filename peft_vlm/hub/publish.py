"""Publish an adapter with everything its users need, in one commit; also by `model.push_to_hub("user/adapter")`. A
Space runs the app on published adapters: three files, made from their names alone.

PEFT's own `push_to_hub` uploads weights and configuration with a template card, "More Information Needed" throughout,
which it writes after every hook an adapter has, and keeps on the next upload. So the method itself is extended, for
models whose active adapter is of this package; all others get PEFT's.
"""

import io
import shutil
import tempfile
import warnings
from collections.abc import Mapping
from dataclasses import dataclass
from functools import wraps
from pathlib import Path
from typing import Any
from urllib.parse import quote

import yaml
from huggingface_hub import HfApi, ModelCardData
from peft import PeftModel
from torch import nn
from transformers.integrations.peft import PeftAdapterMixin

from peft_vlm.adapters.config import VLMConfig, write_facts
from peft_vlm.errors import AdapterError, HubError, PeftVLMWarning, check_list, explained, shown
from peft_vlm.files import (
    BASELINE_NAME,
    CARD_NAME,
    CLASSES_NAME,
    CURVE_NAME,
    METRICS_NAME,
    PROMPT_IMAGE_NAME,
    REPORT_NAME,
    SUMMARY_NAME,
    TRANSFER_NAME,
    WEIGHTS_NAME,
    file_inside,
    write_bytes,
    write_class_names,
)
from peft_vlm.hub.adapter_folder import HUB_ID, AdapterFolder
from peft_vlm.hub.card import render_card
from peft_vlm.serving.escape import markdown, one_line, python_string

#: Files copied as they are; configuration, class names, image of the prompt and card are written again.
REPORTS = (
    *(SUMMARY_NAME, METRICS_NAME, REPORT_NAME, BASELINE_NAME, TRANSFER_NAME),
    CURVE_NAME,
)
EVALUATIONS = (REPORT_NAME, BASELINE_NAME, TRANSFER_NAME)

#: Version of Gradio that the Space runs, the one of constraints.txt.
SDK_VERSION = "6.31.0"
#: What a Space installs where nothing else is given.
PACKAGE = "peft-vlm[app,plots]"

APP = '''"""Adapters side by side, on images, classes and templates of your own."""

from peft_vlm.app.page import build, launch, load

comparison, prompted = load([{adapters}])
launch(build(comparison, prompted), host="0.0.0.0", port=7860)
'''


@dataclass(frozen=True)
class Published:
    """Address of a published adapter.

    Args:
        repo_id: Repository.
        url: Address of the commit.
        commit: Its identifier.
        changed: False when the repository had the same files already; then there is no new commit.
    """

    repo_id: str
    url: str
    commit: str
    changed: bool


def saved_adapter(model: nn.Module, folder: str | Path) -> Path | None:
    """Path at which `save_pretrained` puts the active adapter of a model; None if it has none.

    Args:
        model: Any model.
        folder: Target of `save_pretrained`.
    """
    if not isinstance(model, PeftModel):
        return None
    (name,) = model.active_adapters
    return Path(folder) if name == "default" else Path(folder) / name


def write_folder(
    folder: AdapterFolder,
    target: Path,
    *,
    repo_id: str,
    license: str | None,
    base_model: str | None = None,
    subfolder: str | None = None,
    title: str | None = None,
    note: str = "",
) -> None:
    """Write the published files into a folder: weights, configuration, class names, reports, card.

    Args:
        folder: The adapter.
        target: Existing output folder; it may be that of the adapter.
        repo_id: Hub id or folder that it will be loaded from.
        license: Identifier of the licence, as the Hub spells it.
        base_model: Hub id that the configuration will name as base model; None for the one it names already.
        subfolder: Folder inside the repository.
        title: Heading of the card.
        note: Further paragraph of the card.
    """
    reports = [name for name in REPORTS if not folder.evaluated_others or name not in EVALUATIONS]
    for name in (WEIGHTS_NAME, *reports, *folder.plots):
        source = file_inside(folder.path, name)  # never what a link of a stranger's leads to
        if source is not None and source.resolve() != (target / name).resolve():
            shutil.copyfile(source, target / name)
    config = folder.config
    if base_model is not None and base_model != config.base_model_name_or_path:
        for one in (config, folder.peft_config):
            one.base_model_name_or_path, one.revision = base_model, None  # a revision of the other model
    folder.peft_config.save_pretrained(str(target))
    write_facts(config, folder.peft_config, target)
    if config.class_names:
        write_class_names(target / CLASSES_NAME, config.class_names)
    if folder.prompt_image is not None:
        content = io.BytesIO()
        folder.prompt_image.save(content, "PNG")
        write_bytes(target / PROMPT_IMAGE_NAME, content.getvalue())
    place = {"repo_id": repo_id, "base_model": base_model, "subfolder": subfolder}
    card = render_card(folder, license=license, title=title, note=note, **place)
    write_bytes(target / CARD_NAME, str(card).encode())


def publish(
    folder: str | Path,
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    title: str | None = None,
    note: str = "",
    subfolder: str | None = None,
    revision: str | None = None,
    private: bool | None = None,
    token: str | None = None,
    commit_message: str | None = None,
    incomplete: bool = False,
) -> Published:
    """Upload an adapter folder with a card made from it, in one commit.

    Everything is checked, and the card rendered, before the first request. The folder itself is left as it is; of what
    else lies in it (checkpoints, optimizer states) nothing is uploaded. A failure leaves no commit, at most an
    empty repository; calling again is safe.

    Args:
        folder: Adapter folder, with the reports of `peft-vlm evaluate --baseline` in it. A missing licence, evaluation
            or training summary draws a `PeftVLMWarning`, and the card mentions it.
        repo_id: `owner/name`; made if it does not exist.
        license: Identifier of the licence, as the Hub spells it: "apache-2.0", "mit", "cc-by-4.0", ...
        base_model: Hub id of the base model; needed when the adapter was trained on a local folder.
        title: Heading of the card.
        note: Further paragraph of the card, in Markdown.
        subfolder: Folder inside the repository, for several adapters in one.
        revision: Branch to commit to, made if it does not exist; None for the main one.
        private: Make the repository private when it is made.
        token: Token of the Hub; None for the one of `hf auth login`.
        commit_message: Summary of the commit.
        incomplete: Publish without these warnings, and also weights that are not finite or with a base model that
            others cannot load.

    Returns:
        Where it is.

    Raises:
        AdapterError: If the folder holds no adapter, or one that nobody could use.
        HubError: If the Hub refuses, fails or cannot be reached.
    """
    adapter = _checked(folder, repo_id, license=license, base_model=base_model, incomplete=incomplete)
    with tempfile.TemporaryDirectory() as staging:
        place = {"repo_id": repo_id, "base_model": base_model, "subfolder": subfolder}
        write_folder(adapter, Path(staging), license=license, title=title, note=note, **place)
        message = commit_message or f"{(subfolder or repo_id).rpartition('/')[2]}: {adapter.method} adapter"
        with explained(f"{repo_id!r} was not published"):
            return _upload(
                HfApi(token=token), staging, repo_id, subfolder, revision=revision, private=private, message=message
            )


def publish_collection(
    folders: Mapping[str, str | Path],
    repo_id: str,
    *,
    license: str | None = None,
    base_model: str | None = None,
    table: str = "",
    private: bool | None = None,
    token: str | None = None,
    incomplete: bool = False,
) -> Published:
    """Upload many adapters into one repository, each in a subfolder with its own card, in one commit.

    Args:
        folders: Adapter folders by the name of their subfolder.
        repo_id: `owner/name`; made if it does not exist.
        license: As in `publish`.
        base_model: As in `publish`, for all of them.
        table: Markdown for the repository's own card, for example the table that the adapters belong to.
        private: As in `publish`.
        token: As in `publish`.
        incomplete: As in `publish`.

    Returns:
        Where it is.

    Raises:
        AdapterError: If there is no adapter, or one that nobody could use; nothing is uploaded then.
        HubError: As `publish`.
    """
    if not folders:
        raise AdapterError(
            "Expected adapter folders to publish, got none. Pass folders that hold `adapter_config.json`."
        )
    options: dict[str, Any] = {"license": license, "base_model": base_model}
    with tempfile.TemporaryDirectory() as staging:
        for name, folder in folders.items():
            adapter = _checked(folder, repo_id, incomplete=incomplete, **options)
            target = Path(staging, name)
            target.mkdir(parents=True)
            write_folder(adapter, target, repo_id=repo_id, subfolder=name, **options)
        card = _collection_card(repo_id, folders, license=license, base_model=base_model, table=table)
        write_bytes(Path(staging, CARD_NAME), card.encode(errors="backslashreplace"))
        with explained(f"{repo_id!r} was not published"):
            message = f"{repo_id.rpartition('/')[2]}: {len(folders)} adapters"
            return _upload(HfApi(token=token), staging, repo_id, None, revision=None, private=private, message=message)


def _collection_card(
    repo_id: str, folders: Mapping[str, str | Path], *, license: str | None, base_model: str | None, table: str
) -> str:
    """Front matter, how to load one, the table, and a link to each adapter."""
    facts: dict[str, Any] = {"library_name": "peft", "tags": ["peft_vlm"]}
    facts |= {name: value for name, value in (("license", license), ("base_model", base_model)) if value}
    first = next(iter(folders))
    text = [f"---\n{ModelCardData(**facts)}\n---\n", f"# {markdown(repo_id.rpartition('/')[2])}\n"]
    text += [f"{len(folders)} adapters of peft_vlm, each in a folder with its card:\n"]
    load = f"model = PeftModel.from_pretrained(base, {python_string(repo_id)}, subfolder={python_string(first)})"
    text += [f"```python\nimport peft_vlm\nfrom peft import PeftModel\n\n{load}\n```\n"]
    text += [f"- [{markdown(name)}]({quote(name)}/README.md)" for name in folders]
    return "\n".join([*text, "", table])


def _checked(
    folder: str | Path, repo_id: str, *, license: str | None, base_model: str | None, incomplete: bool
) -> AdapterFolder:
    """An adapter that others can use; what it lacks draws a warning."""
    adapter = AdapterFolder.read(folder)
    check_repo_id(repo_id, what="repo_id")
    obstacles, gaps = adapter.obstacles(base_model=base_model), adapter.gaps(license=license)
    if obstacles and not incomplete:
        raise AdapterError(
            f"{str(folder)!r} cannot be used by others. Expected {'; expected '.join(obstacles)}. To publish it as it "
            "is pass `incomplete=True`."
        )
    if gaps and not incomplete:
        warnings.warn(f"Publishing without {'; without '.join(gaps)}.", PeftVLMWarning, stacklevel=3)
    return adapter


def _upload(
    api: HfApi,
    staging: str,
    repo_id: str,
    subfolder: str | None,
    *,
    revision: str | None,
    private: bool | None,
    message: str,
) -> Published:
    repo_id = api.create_repo(repo_id, private=private, exist_ok=True).repo_id
    if revision is not None:
        api.create_branch(repo_id, branch=revision, exist_ok=True)
    before = api.model_info(repo_id, revision=revision).sha
    commit = api.upload_folder(
        repo_id=repo_id, folder_path=staging, path_in_repo=subfolder, revision=revision, commit_message=message
    )
    return Published(repo_id, commit.commit_url, commit.oid, commit.oid != before)


def _push_model(
    model: PeftModel,
    repo_id: str,
    *,
    run_folder: str | Path | None = None,
    **options: object,
) -> Published:
    """Publish the active adapter of a model, for `model.push_to_hub(...)`.

    Args:
        model: Model with the adapter.
        repo_id: `owner/name`.
        run_folder: Folder of the training, whose reports go with the adapter; its weights must be those of the model.
        **options: Passed to `publish`.
    """
    with tempfile.TemporaryDirectory() as saved:
        model.save_pretrained(saved, selected_adapters=list(model.active_adapters))
        folder = saved_adapter(model, saved) or Path(saved)
        for report in REPORTS if run_folder is not None else ():
            source = file_inside(Path(run_folder), report)
            if source is not None:
                shutil.copyfile(source, folder / report)
        return publish(folder, repo_id, **options)


def extend_push_to_hub() -> None:
    """Extend `PeftModel.push_to_hub`, once."""
    original = PeftModel.push_to_hub
    if original.__module__ == __name__:
        return

    @wraps(original)
    def push_to_hub(self: PeftModel, repo_id: str, **options: Any) -> Any:
        if isinstance(self.active_peft_config, VLMConfig):
            return _push_model(self, repo_id, **options)
        return original(self, repo_id, **options)

    push_to_hub.__module__ = __name__
    PeftModel.push_to_hub = push_to_hub


def extend_load_adapter() -> None:
    """Extend transformers' own `load_adapter`, once: it prints a table where tensors of a file are missing or unknown.

    An adapter of this package is taken off again then, as PEFT's path refuses it; all others are as before.
    """
    original = PeftAdapterMixin.load_adapter
    if original.__module__ == __name__:
        return

    @wraps(original)
    def load_adapter(self: Any, *args: Any, **options: Any) -> Any:
        before = set(getattr(self, "peft_config", {}))
        found = original(self, *args, **options)
        new = [name for name in getattr(self, "peft_config", {}) if name not in before]
        if found is None or not new or not isinstance(self.peft_config[new[0]], VLMConfig):
            return found
        missing, unknown = sorted(found.missing_keys), sorted(found.unexpected_keys)
        if missing or unknown:
            self.delete_adapter(new[0])
            raise AdapterError(
                f"Expected the tensors of this adapter in its file: missing {shown(missing)}, unknown "
                f"{shown(unknown)}. The weights file does not belong to this adapter_config.json: get the folder "
                "again."
            )
        return found

    load_adapter.__module__ = __name__
    PeftAdapterMixin.load_adapter = load_adapter


def check_repo_id(repo_id: str, *, what: str) -> None:
    """Refuse a name that no repository can have.

    Args:
        repo_id: `owner/name`.
        what: Name of the argument, for the message.

    Raises:
        HubError: If it is none.
    """
    if "/" not in repo_id or not HUB_ID.fullmatch(repo_id):
        raise HubError(f"Expected `{what}` to be 'owner/name', got {repo_id!r}.")


def write_space(
    folder: str | Path,
    adapters: list[str],
    *,
    title: str,
    license: str | None = None,
    package: str = PACKAGE,
) -> None:
    """Write `app.py`, `requirements.txt` and `README.md` of a Space.

    Args:
        folder: Existing output folder.
        adapters: Hub ids of the adapters that it shows.
        title: Its title.
        license: Identifier of the licence, as the Hub spells it.
        package: Line of `requirements.txt` that installs this package with the extra `app`.

    Raises:
        HubError: If an adapter is no Hub id, or the line of the package is more than one.
    """
    check_list("adapters", adapters)
    for adapter in adapters:
        check_repo_id(adapter, what="adapters")
    if not package.isprintable() or not package.strip():
        raise HubError(f"Expected one line for requirements.txt as `package`, got {package!r}.")
    facts = {"title": one_line(title), "sdk": "gradio", "sdk_version": SDK_VERSION, "app_file": "app.py"}
    facts |= {"python_version": "3.11", "models": adapters, "tags": ["peft_vlm"]}
    facts |= {"license": license} if license else {}
    front = yaml.safe_dump(facts, sort_keys=False, allow_unicode=True)
    links = "\n".join(f"- [{markdown(adapter)}](https://huggingface.co/{adapter})" for adapter in adapters)
    card = (
        f"---\n{front}---\n\n# {markdown(title)}\n\nDrop an image, edit classes and template: the base model beside "
        f"adapters of peft_vlm.\n\n{links}\n"
    )
    app = APP.format(adapters=", ".join(map(python_string, adapters)))
    for name, text in {"app.py": app, "requirements.txt": f"{package}\n", CARD_NAME: card}.items():
        write_bytes(Path(folder, name), text.encode(errors="backslashreplace"))


def publish_space(
    space: str,
    adapters: list[str],
    *,
    title: str | None = None,
    license: str | None = None,
    package: str = PACKAGE,
    private: bool | None = None,
    token: str | None = None,
) -> Published:
    """Upload a Space that shows published adapters, in one commit.

    Args:
        space: `owner/name` of the Space; made if it does not exist.
        adapters: Hub ids of the adapters.
        title: Its title; None for the name of the Space.
        license: As for `write_space`.
        package: As for `write_space`.
        private: Make the Space private when it is made.
        token: Token of the Hub; None for the one of `hf auth login`.

    Returns:
        Where it is.

    Raises:
        HubError: If the name cannot be one, or the Hub refuses, fails or cannot be reached.
    """
    check_repo_id(space, what="space")
    api = HfApi(token=token)
    with tempfile.TemporaryDirectory() as staging:
        write_space(staging, adapters, title=title or space.rpartition("/")[2], license=license, package=package)
        with explained(f"The Space {space!r} was not published"):
            made = {"repo_type": "space", "space_sdk": "gradio", "private": private}
            name = api.create_repo(space, exist_ok=True, **made).repo_id
            before = api.space_info(name).sha
            commit = api.upload_folder(
                repo_id=name,
                repo_type="space",
                folder_path=staging,
                commit_message=f"{name.rpartition('/')[2]}: the app",
            )
    return Published(name, commit.commit_url, commit.oid, commit.oid != before)
