"""Push a converted folder to the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from ..error_text import reason
from .companions import reachable
from .conversion_error import ConversionError

_REPOSITORY = re.compile(r"([\w.-]+/)?[\w.-]+")


def check_repository(repository: str) -> None:
    """Check, before a conversion starts, that its result can be pushed.

    Args:
        repository: "user/name", or "name" for the user who is logged in.

    Raises:
        ConversionError: The Hub cannot be reached, or the name is malformed.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ConversionError(f"--push-to-hub {repository!r} is not the name of a repository; write user/name.")
    if not reachable(repository):
        raise ConversionError(
            f"--push-to-hub {repository} needs the Hub, which cannot be reached; go online, or omit it and push "
            "the folder later."
        )


def push(folder: Path, repository: str) -> str:
    """Upload a folder, creating the repository if it does not exist.

    Args:
        folder: The folder to upload.
        repository: "user/name", or "name" for the user who is logged in.

    Returns:
        The web address of the upload.

    Raises:
        ConversionError: The Hub refuses the upload.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        name = api.create_repo(repository, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Convert with gdino-hf"))
    # The Hub's client has no common base class for its errors and those of the network.
    except Exception as error:
        raise ConversionError(
            f"The Hub refuses {repository} ({reason(error)}); log in with `hf auth login` as a user with write access."
        ) from error
