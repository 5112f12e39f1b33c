"""What an exported folder is and where it comes from: `manifest.json`, written last and read back with validation."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, fields
from importlib.metadata import version
from pathlib import Path
from typing import Any, Self

import torch
from transformers import PreTrainedModel

import lightning_moe
from lightning_moe.assets import resolve_asset
from lightning_moe.files import read_json, write_json
from lightning_moe.quantization.added_error import AddedError
from lightning_moe.quantization.footprint import measure_footprint
from lightning_moe.records import PrunePlan

MANIFEST_NAME = "manifest.json"
CARD_NAME = "README.md"
_KIND = "export manifest"
_VERSION = 1
_LARGEST = 2**63
_BITS = {"experts", "linears", "embeddings"}
# Fields that manifests of earlier versions of this package lack.
_LATER: Mapping[str, Any] = {"through_4_bit": False, "added_error": None}
THROUGH_4_BIT = "the weights went through 4 bit, and what that rounded away is gone"
_LIBRARIES = ("torch", "transformers", "bitsandbytes", "peft")


@dataclass(frozen=True, kw_only=True)
class PlanOrigin:
    """What a manifest keeps of a plan.

    Args:
        digest: SHA-256 of what the plan keeps (`PrunePlan.digest`).
        method: Name of the method that made it.
        prune_ratio: Share of routed-expert channels that it really removes.
        corpora: Calibration corpora that it was made from, names with commas; empty where it does not say.
        statistics: SHA-256 of the calibration statistics that it was made from; empty where it does not say.
    """

    digest: str
    method: str
    prune_ratio: float
    corpora: str
    statistics: str

    @classmethod
    def of(cls, plan: PrunePlan) -> Self:
        """The plan's own words, without its masks."""
        return cls(
            digest=plan.digest,
            method=plan.method,
            prune_ratio=plan.achieved_prune_ratio,
            corpora=plan.provenance.get("corpora", ""),
            statistics=plan.provenance.get("statistics", ""),
        )


@dataclass(frozen=True, kw_only=True)
class Manifest:
    """An exported folder.

    Args:
        format: One of the export formats.
        source: Folder, asset or hub name that it was made of.
        base_model: The same of the first model in the chain of manifests: the dense one, as a rule.
        plans: The plans that were applied since, oldest first.
        versions: Version of each library that wrote it.
        stored_params: Logical parameters: a 4-bit weight counts as one, constants of the quantisation and adapters do
            not count.
        active_params: Parameters of a token if it uses every expert equally often.
        bits: Bits of a stored weight in `experts`, `linears` around them, and `embeddings`.
        files: Bytes of each file by its path in the folder, without manifest and model card.
        bytes: Of these files together.
        dropped: Tensors of the source that are no part of the model, and so not of the export.
        max_logit_diff: Largest difference between the logits before and after the reload; None: not compared.
        through_4_bit: Whether experts that are stored in more bits were made of packed ones.
        added_error: What packing changed in a merged model (`AddedError`); None for other formats.
    """

    format: str
    source: str
    base_model: str
    plans: tuple[PlanOrigin, ...]
    versions: Mapping[str, str]
    stored_params: int
    active_params: float
    bits: Mapping[str, int]
    files: Mapping[str, int]
    bytes: int
    dropped: tuple[str, ...]
    max_logit_diff: float | None
    through_4_bit: bool = False
    added_error: Mapping[str, Any] | None = None

    def to_dict(self) -> dict[str, Any]:
        """Plain types."""
        return {"kind": _KIND, "version": _VERSION} | asdict(self)


def write_manifest(
    folder: str | Path,
    *,
    format: str,
    source: str,
    model: PreTrainedModel,
    plans: Sequence[PrunePlan] = (),
    dropped: Sequence[str] = (),
    max_logit_diff: float | None = None,
    added_error: AddedError | None = None,
    unpacked: bool = False,
) -> Manifest:
    """Writes `manifest.json` of a folder whose other files are all there; what a source's manifest says is carried on.

    Args:
        folder: The export, with a `config.json` in it or, for an adapter, in its `base`.
        format: One of the export formats.
        source: Folder, asset or hub name that it was made of.
        model: The exported model; its structure is counted, no weight is read (they may be on the meta device).
        plans: What was cut on the way from `source` to the export, oldest first.
        dropped: Stored tensors of `source` that are no part of the model.
        max_logit_diff: Of the reload; None where none was compared.
        added_error: What 4 bit changed in a merged model.
        unpacked: Whether what was exported is packed, which the export need not be.

    Returns:
        What was written.

    Raises:
        ValueError: a manifest of `source`, or the export's `config.json`, cannot be read.
    """
    earlier, footprint = read_manifest(resolve_asset(source)), measure_footprint(model)
    files, bits = _file_bytes(Path(folder)), _bits(Path(folder))
    packed_before = unpacked or (earlier is not None and (earlier.through_4_bit or earlier.bits["experts"] == 4))
    manifest = Manifest(
        format=format,
        source=source,
        base_model=source if earlier is None else earlier.base_model,
        plans=(() if earlier is None else earlier.plans) + tuple(map(PlanOrigin.of, plans)),
        versions={"lightning_moe": lightning_moe.__version__} | {name: version(name) for name in _LIBRARIES},
        stored_params=footprint.stored_params,
        active_params=footprint.active_params,
        bits=bits,
        files=files,
        bytes=sum(files.values()),
        dropped=tuple(dict.fromkeys([*(() if earlier is None else earlier.dropped), *dropped])),
        max_logit_diff=max_logit_diff,
        through_4_bit=packed_before and bits["experts"] != 4,
        added_error=None if added_error is None else asdict(added_error),
    )
    write_json(Path(folder) / MANIFEST_NAME, manifest.to_dict())
    return manifest


def read_manifest(folder: str | Path) -> Manifest | None:
    """The manifest of a folder; None where there is none (a hub name, say, or a stock checkpoint).

    Raises:
        ValueError: it is damaged or of another version, or the weights beside it are not those that it describes.
    """
    path = Path(folder) / MANIFEST_NAME
    if not path.is_file():
        return None
    content = read_json(path, what=_KIND)
    if not isinstance(content, dict) or (content.get("kind"), content.get("version")) != (_KIND, _VERSION):
        came = {key: content.get(key) for key in ("kind", "version")} if isinstance(content, dict) else content
        raise ValueError(f"'{path}' must hold an {_KIND} of version {_VERSION}, got {came!r}. Export again.")
    manifest = _checked({key: value for key, value in content.items() if key not in ("kind", "version")}, path=path)
    _check_weights(manifest, folder=Path(folder))
    return manifest


def _checked(content: dict[str, Any], *, path: Path) -> Manifest:
    """The manifest, each field of its type."""
    names, content = {field.name for field in fields(Manifest)}, {**_LATER, **content}
    if content.keys() != names:
        raise ValueError(f"'{path}': fields {sorted(content.keys() ^ names)} are missing or unknown. Export again.")
    right = {
        "format": isinstance(content["format"], str),
        "source": isinstance(content["source"], str),
        "base_model": isinstance(content["base_model"], str),
        "plans": isinstance(content["plans"], list) and all(map(_is_plan, content["plans"])),
        "versions": _maps(content["versions"], lambda value: isinstance(value, str)),
        "stored_params": _is_count(content["stored_params"]),
        "active_params": _is_number(content["active_params"]),
        "bits": _maps(content["bits"], _is_count) and content["bits"].keys() == _BITS,
        "files": _maps(content["files"], _is_count),
        "bytes": _is_count(content["bytes"]),
        "dropped": isinstance(content["dropped"], list) and all(isinstance(name, str) for name in content["dropped"]),
        "max_logit_diff": content["max_logit_diff"] is None or _is_number(content["max_logit_diff"]),
        "through_4_bit": isinstance(content["through_4_bit"], bool),
        "added_error": content["added_error"] is None or _is_error(content["added_error"]),
    }
    wrong = [name for name, is_right in right.items() if not is_right]
    if wrong:
        raise ValueError(f"'{path}': `{wrong[0]}` cannot be {content[wrong[0]]!r:.200}. Export again.")
    if content["bytes"] != sum(content["files"].values()):
        raise ValueError(f"'{path}': `bytes` is {content['bytes']}, and its files do not add up to that. Export again.")
    plans = tuple(PlanOrigin(**plan) for plan in content["plans"])
    return Manifest(**(content | {"plans": plans, "dropped": tuple(content["dropped"])}))


def _is_count(value: object) -> bool:
    return isinstance(value, int) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _is_number(value: object) -> bool:
    return isinstance(value, int | float) and not isinstance(value, bool) and 0 <= value < _LARGEST


def _maps(value: object, test: Any) -> bool:
    return isinstance(value, dict) and all(isinstance(key, str) and test(item) for key, item in value.items())


def _is_plan(value: object) -> bool:
    types = {field.name: (int, float) if field.name == "prune_ratio" else str for field in fields(PlanOrigin)}
    if not isinstance(value, dict) or value.keys() != types.keys():
        return False
    share = value["prune_ratio"]
    return all(isinstance(value[name], type) for name, type in types.items()) and _is_number(share) and share <= 1


def _is_error(value: object) -> bool:
    """Whether `AddedError` can be made of it again."""
    if not isinstance(value, dict) or value.keys() != {field.name for field in fields(AddedError)}:
        return False
    numbers = all(map(_is_number, (value["kl"], value["max_logit_diff"]))) and _is_count(value["num_tokens"])
    return numbers and isinstance(value["random_text"], bool) and _maps(value["weights"], _is_number)


def _check_weights(manifest: Manifest, *, folder: Path) -> None:
    """Refuses weights that were written after the manifest."""
    found = _file_bytes(folder)
    for name in sorted({name for name in found.keys() | manifest.files.keys() if name.endswith(".safetensors")}):
        stated, stored = manifest.files.get(name), found.get(name)
        if stated != stored:
            raise ValueError(
                f"'{folder}/{MANIFEST_NAME}' describes other weights: '{name}' has {stored} bytes, it says {stated}. "
                f"Copy the folder again, or delete {MANIFEST_NAME} where you changed the model yourself."
            )


def _file_bytes(folder: Path) -> dict[str, int]:
    """Bytes by path in the folder; not of the manifest and of the card, nor of hidden files (temporary ones, say)."""
    sizes = {
        file.relative_to(folder).as_posix(): file.stat().st_size
        for file in sorted(folder.rglob("*"))
        if file.is_file() and file.name not in (MANIFEST_NAME, CARD_NAME)
    }
    return {name: size for name, size in sizes.items() if not any(part.startswith(".") for part in name.split("/"))}


def _bits(folder: Path) -> dict[str, int]:
    """Bits per stored weight, as `config.json` declares them."""
    base = folder if (folder / "config.json").is_file() else folder / "base"
    config = read_json(base / "config.json", what="model config")
    quantized = config.get("quantization_config") or {}
    plain = 8 * getattr(torch, str(config.get("dtype", "float32"))).itemsize
    return {
        "experts": 4 if quantized.get("packed_experts") else plain,
        "linears": 4 if quantized.get("packed_linears") else plain,
        "embeddings": plain,
    }
