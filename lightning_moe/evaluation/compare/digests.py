"""Fingerprints of what decides a row: the model's files, the text, the settings.  S tokens."""

import hashlib
import json
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from torch import Tensor

from lightning_moe.models.loading import read_config
from lightning_moe.models.sources import weight_files

Loaders = Mapping[str, Iterable[Mapping[str, Tensor]]]
_PART = 2**24
_LENGTH = 16
# What transformers writes into a config without meaning anything by it.
_UNIMPORTANT = ("_name_or_path", "transformers_version")


def model_digest(source: str) -> str:
    """Of a model's config and of every byte of its weights.

    Raises:
        ValueError: there is no such model (see `read_config`), or none of its files is of weights.
    """
    config = {key: value for key, value in read_config(source).to_dict().items() if key not in _UNIMPORTANT}
    digest = hashlib.sha256(json.dumps(config, sort_keys=True, default=str).encode())
    files = weight_files(source)
    if not files:
        raise ValueError(f"'{source}' has no weights in safetensors files. Save the model again.")
    for file in files:
        _add_file(digest, file)
    return digest.hexdigest()[:_LENGTH]


def _add_file(digest: Any, file: Path) -> None:
    with file.open("rb") as stream:
        while part := stream.read(_PART):
            digest.update(part)


def text_digest(loaders: Loaders) -> str:
    """Of the tokens, masks and labels of all corpora; how the rows are batched does not matter."""
    digest = hashlib.sha256()
    for name, loader in loaders.items():
        digest.update(f"|{name}|".encode())
        for batch in loader:
            values = [batch[key] for key in sorted(batch)]
            for row in zip(*values, strict=True):
                for value_S in row:
                    digest.update(value_S.contiguous().numpy().tobytes())
    return digest.hexdigest()[:_LENGTH]


def settings_digest(settings: Mapping[str, Any]) -> str:
    """Of plain settings, whatever their order."""
    return hashlib.sha256(json.dumps(settings, sort_keys=True).encode()).hexdigest()[:_LENGTH]
