"""The tokenizer beside an exported model."""

from pathlib import Path

from transformers import PreTrainedTokenizerBase

from lightning_moe.files import NativeErrors


def save_tokenizer(tokenizer: PreTrainedTokenizerBase, *, folder: str | Path) -> None:
    """Writes a tokenizer's files.

    Raises:
        OSError: they cannot be written, for lack of space perhaps.
    """
    try:
        with NativeErrors():
            tokenizer.save_pretrained(folder)
    except OSError as error:
        raise OSError(f"The tokenizer cannot be written to '{folder}': {error}") from error
