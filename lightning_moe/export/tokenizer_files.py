"""The tokenizer beside an exported model."""

from contextlib import AbstractContextManager
from pathlib import Path

from transformers import PreTrainedTokenizerBase
from typing_extensions import override


class _Written(AbstractContextManager[None]):
    """A failure to write becomes an OSError that names the folder.

    The library in Rust raises a plain `Exception`, which no `except` can tell from all others.
    """

    def __init__(self, folder: str | Path) -> None:
        self.folder = folder

    @override
    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        if type(error) is Exception:
            raise OSError(f"The tokenizer cannot be written to '{self.folder}': {error}") from error


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, *, folder: str | Path) -> None:
    """Writes a tokenizer's files.

    Raises:
        OSError: they cannot be written, for lack of space perhaps.
    """
    with _Written(folder):
        tokenizer.save_pretrained(folder)
