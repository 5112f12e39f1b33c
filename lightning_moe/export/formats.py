"""The formats of an export, and what they ask for before anything is written."""

from collections.abc import Sequence
from pathlib import Path
from typing import Literal, get_args

from lightning_moe.export.huggingface import check_replaceable
from lightning_moe.export.manifest import CARD_NAME, MANIFEST_NAME

ExportFormat = Literal[
    "adapter", "merged", "merged_nf4", "ragged", "nf4", "padded", "uniform", "expert_dropped", "stock"
]
# Layouts of transformers itself: they load without this package.
STOCK_FORMATS: frozenset[str] = frozenset({"padded", "uniform", "expert_dropped", "stock"})


def check_formats(formats: Sequence[str]) -> list[ExportFormat]:
    """The formats, validated.

    Raises:
        ValueError: none, an unknown one, or `nf4` (which packs the model in place) before another.
    """
    if not formats:
        raise ValueError(f"Name at least one export format of {', '.join(get_args(ExportFormat))}.")
    if "nf4" in formats[:-1]:
        raise ValueError(f"Export format 'nf4' packs the model in place and must be the last, got {list(formats)}.")
    unknown = [name for name in formats if name not in get_args(ExportFormat)]
    if unknown:
        raise ValueError(f"Unknown export format '{unknown[0]}'. Known: {', '.join(get_args(ExportFormat))}.")
    return list(formats)  # pyright: ignore[reportReturnType]


def check_targets(folder: str | Path, *, formats: Sequence[ExportFormat]) -> None:
    """Refuses formats whose model would replace something else below `folder`.

    Raises:
        ValueError: see `check_replaceable`; or there is something else beside a base and its adapter.
    """
    for name in formats:
        target = Path(folder) / name
        check_replaceable(base_of(target))
        if name == "adapter" and target.is_dir():
            _check_pair(target)


def _check_pair(target: Path) -> None:
    """An export of adapters is replaced as a whole."""
    own = {"base", "adapter", MANIFEST_NAME, CARD_NAME}
    strange = [file.name for file in target.iterdir() if file.name not in own and not file.name.startswith(".")]
    if strange:
        raise ValueError(
            f"'{target}' holds '{min(strange)}' too, which would be lost. Move it, or name another folder."
        )


def base_of(target: Path) -> Path:
    """Where the model of an export is: an adapter's lies beside it."""
    return target / "base" if target.name == "adapter" else target


def needs_adapters(formats: Sequence[ExportFormat]) -> list[ExportFormat]:
    """Those of the formats that are made of a model and its adapters."""
    return [name for name in formats if name in ("adapter", "merged", "merged_nf4")]
