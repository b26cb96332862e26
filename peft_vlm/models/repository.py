"""The source of a model or an adapter: a folder, or a repository of a Hub that answers in time."""

import logging
import re
from pathlib import Path
from typing import Any

from huggingface_hub import HfApi, constants
from huggingface_hub.errors import HfHubHTTPError, HTTPError

from peft_vlm.errors import HubError, explain

logger = logging.getLogger(__name__)

HUB_ID = re.compile(r"\w[\w.-]*(/\w[\w.-]*)?", re.ASCII)
"""`name` or `owner/name`; everything else can only be a path."""

PATIENCE = 5.0
"""Seconds that a Hub may take for its first answer. Its own client asks six times, for every file again."""


def is_local(name: str | Path) -> bool:
    """Return whether a name is read from disk and must never become a request: it exists here, or is no Hub id.

    Args:
        name: Folder or Hub id.
    """
    return Path(name).exists() or HUB_ID.fullmatch(str(name)) is None


def hub_answers(repo_id: str, *, revision: str | None = None, token: str | None = None) -> bool:
    """Ask the Hub once whether it has a repository, before anything asks it with a client of much patience.

    Args:
        repo_id: Repository.
        revision: Branch, tag or commit; None for the main branch.
        token: Token of the Hub; None for the one of `hf auth login`.

    Returns:
        False where only the cache can answer: in offline mode, or when the Hub cannot be reached.

    Raises:
        HubError: If the Hub answers that there is no such repository or revision, or that it may not be read.
    """
    if constants.HF_HUB_OFFLINE:
        return False
    try:
        HfApi(token=token).model_info(repo_id, revision=revision, timeout=PATIENCE)
    except HfHubHTTPError as error:
        raise HubError(f"{repo_id!r} is no folder here, and on the Hub: {explain(error)}") from error
    except HTTPError as error:
        logger.warning("%s cannot be reached (%s); only the cache is used", constants.ENDPOINT, type(error).__name__)
        return False
    return True


def hub_options(name: str | Path, *, token: str | None = None, revision: str | None = None) -> dict[str, Any]:
    """Arguments of `from_pretrained`: no request for a folder, or where no Hub answers; no code of a repository runs.

    Args:
        name: Folder or Hub id.
        token: Token of the Hub.
        revision: Branch, tag or commit on the Hub; of no meaning for a folder.
    """
    options: dict[str, Any] = {"trust_remote_code": False}
    if is_local(name):
        return options | {"local_files_only": True}
    cache_only = not hub_answers(str(name), revision=revision, token=token)
    return options | {"token": token, "revision": revision, "local_files_only": cache_only}


def why_cache_only() -> str:
    """Say why the cache alone was looked into, and what to do about it."""
    if constants.HF_HUB_OFFLINE:
        return "offline mode is on (HF_HUB_OFFLINE), and it is not in the cache. Unset HF_HUB_OFFLINE to download it"
    return (
        f"the Hub at {constants.ENDPOINT} did not answer within {PATIENCE:.0f} s, and it is not in the cache. "
        "Check the connection (or HF_ENDPOINT)"
    )
