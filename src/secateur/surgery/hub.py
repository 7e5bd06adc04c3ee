"""Upload a directory to the Hugging Face Hub."""

from __future__ import annotations

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import HfHubHTTPError, HFValidationError, HTTPError  # type: ignore[attr-defined]
from huggingface_hub.utils import validate_repo_id  # type: ignore[attr-defined]

from secateur.errors import OutputError


def check_hub(repo: str) -> None:
    """Refuse an upload that cannot work, before anything is written.

    Raises
    ------
    OutputError: the name is no Hub id, or there is no token.
    """
    try:
        validate_repo_id(repo)
    except HFValidationError as error:
        raise OutputError(f"'{repo}' is not a Hub id; write it as owner/name.") from error
    if "/" not in repo:
        raise OutputError(f"'{repo}' names no owner; write it as owner/name.")
    if get_token() is None:
        raise OutputError("There is no Hub token; run 'hf auth login' or set HF_TOKEN, then give --push-to-hub again.")


def push(directory: Path, repo: str) -> str:
    """Upload everything in a directory; the repository is made, private, where it does not exist.

    Returns
    -------
    The address of the repository.

    Raises
    ------
    OutputError: the Hub refuses or does not answer; the directory stays.
    """
    api = HfApi()
    try:
        address = api.create_repo(repo, private=True, exist_ok=True)
        api.upload_folder(repo_id=repo, folder_path=directory)
    except (HfHubHTTPError, HTTPError, OSError, ValueError) as error:
        reason = " ".join(str(error).split())[:200]
        raise OutputError(f"The Hub did not take '{repo}' ({reason}); the files are in '{directory}'.") from error
    return str(address)
