"""A finished export goes to the hub as it lies on disk."""

from pathlib import Path

from huggingface_hub import HfApi, get_token
from huggingface_hub.errors import (
    HFValidationError,
    HTTPError,  # pyright: ignore[reportPrivateImportUsage]: of the HTTP library that this version of it uses
)
from huggingface_hub.utils import validate_repo_id


def check_hub_name(name: str) -> None:
    """Refuses an upload that cannot work, before anything is made.

    Raises:
        ValueError: it is not `owner/name`, or there is no access token.
    """
    try:
        validate_repo_id(name)
    except HFValidationError as error:
        raise ValueError(f"`push_to_hub` must be `owner/name`, got '{name}': {_first_line(error)}") from error
    if name.count("/") != 1:
        raise ValueError(f"`push_to_hub` must be `owner/name`, got '{name}'.")
    if get_token() is None:
        raise ValueError(
            "`push_to_hub` needs an access token of the hub, and there is none. Run `hf auth login`, or set HF_TOKEN."
        )


def push_folder(folder: str | Path, *, name: str, private: bool) -> str:
    """Makes the repository if it is not there and uploads all files of the folder in one commit; where it is now.

    Raises:
        ValueError: the hub cannot be reached, or refuses; the folder stays.
    """
    api = HfApi()
    try:
        api.create_repo(name, private=private, exist_ok=True)
        commit = api.upload_folder(repo_id=name, folder_path=folder, commit_message="Upload of lightning_moe")
    except (HTTPError, OSError) as error:
        raise ValueError(
            f"The export is finished and lies in '{folder}', but it could not be uploaded to '{name}': "
            f"{_first_line(error)} Check the name, the token's rights and the network, then export again or upload "
            "the folder."
        ) from error
    return commit.commit_url


def _first_line(error: Exception) -> str:
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return (lines[0] if lines else type(error).__name__).rstrip(".") + "."
