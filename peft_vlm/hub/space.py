"""A Space of the Hub that runs the app on a published adapter: three files, made from its name alone."""

import tempfile
from pathlib import Path

import yaml
from huggingface_hub import HfApi

from peft_vlm.errors import HubError, check_list, explained
from peft_vlm.files import CARD_NAME, write_bytes
from peft_vlm.hub.adapter_folder import HUB_ID
from peft_vlm.hub.publish import Published
from peft_vlm.serving.escape import markdown, one_line, python_string

#: Version of Gradio that the Space runs, the one of constraints.txt.
SDK_VERSION = "6.31.0"
#: What a Space installs where nothing else is given.
PACKAGE = "peft-vlm[app,plots]"

APP = '''"""Adapters side by side, on images, classes and templates of your own."""

from peft_vlm.app.page import build, launch, load

comparison, prompted = load([{adapters}])
launch(build(comparison, prompted), host="0.0.0.0", port=7860)
'''


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
