"""Pushing a converted folder to the Hub."""

from __future__ import annotations

import re
from pathlib import Path

from ..error_text import reason
from .companions import reachable
from .conversion_error import ConversionError

_REPOSITORY = re.compile(r"([\w.-]+/)?[\w.-]+")


def check_repository(repository: str) -> None:
    """Find out before the work, not after it, whether the Hub can be reached.

    Args:
        repository: "user/name".

    Raises:
        ConversionError: It cannot, or the name is none.
    """
    if not _REPOSITORY.fullmatch(repository):
        raise ConversionError(f"--push-to-hub {repository!r} is no name of a repository; write user/name.")
    if not reachable(repository):
        raise ConversionError(
            f"--push-to-hub {repository} needs the Hub, which cannot be reached; go online, or leave it out and push "
            "the folder later."
        )


def push(folder: Path, repository: str) -> str:
    """Upload a folder, making the repository if there is none.

    Args:
        folder: What to upload.
        repository: "user/name".

    Returns:
        The address of the upload.

    Raises:
        ConversionError: The Hub refuses it.
    """
    from huggingface_hub import HfApi

    api = HfApi()
    try:
        name = api.create_repo(repository, exist_ok=True).repo_id
        return str(api.upload_folder(repo_id=name, folder_path=folder, commit_message="Convert with gdino-hf"))
    # The Hub's client raises whatever a connection can fail with.
    except Exception as error:
        raise ConversionError(
            f"The Hub refuses {repository} ({reason(error)}); log in with `hf auth login` as one who may write."
        ) from error
