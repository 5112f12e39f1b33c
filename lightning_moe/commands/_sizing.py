"""`plan` from a config alone: what a model takes, dense and cut, and which ratio fits a size."""

import logging
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from transformers import AutoConfig, PretrainedConfig

from lightning_moe.allocation.budget import resolve_prune_ratio
from lightning_moe.allocation.uniform import kept_width
from lightning_moe.allocation.uniform_sizes import Sizes, UniformSizes
from lightning_moe.allocation.units import format_bytes, format_params, parse_bytes
from lightning_moe.commands._fit_training import TrainingQuestion
from lightning_moe.commands._shared import check_writable, files_of
from lightning_moe.export.apart import check_apart
from lightning_moe.files import read_json, write_json
from lightning_moe.models.config_text import check_config_text
from lightning_moe.models.config_values import check_values
from lightning_moe.models.loading import DtypeName, config_errors, read_config
from lightning_moe.models.sources import clear_errors, find_file
from lightning_moe.quantization.size import Bits, generation_bytes
from lightning_moe.reporting.table import Column, format_table

log = logging.getLogger(__name__)

_COLUMNS = (
    Column(key="what", header="", left=True),
    Column(key="stored_params", header="stored params", text=format_params),
    Column(key="active_params", header="active params", text=format_params),
    Column(key="bytes", header="folder", text=format_bytes),
    Column(key="compression", header="x smaller", text="{:.2f}".format),
    Column(key="nominal_bytes", header="nominal", text=format_bytes),
    Column(key="nominal_compression", header="x nominal", text="{:.2f}".format),
)


@dataclass(frozen=True, kw_only=True)
class SizeQuestion:
    """What the user asks of a config.

    Args:
        config_json: File, folder, asset or hub name.
        prune_ratio: Share of routed-expert channels that goes.
        keep_ratio: The same in the other word.
        fit: Bytes of the folder, instead of a ratio.
        align: Kept widths are multiples of this.
        bits: Of the pruned model.
        dtype: Type of the weights that stay unpacked.

    Raises:
        ValueError: none or several of the ratios and `fit` are given.
    """

    config_json: str
    prune_ratio: float | None
    keep_ratio: float | None
    fit: str | int | None
    align: int
    bits: Bits
    dtype: DtypeName

    def __post_init__(self) -> None:
        given = [name for name in ("prune_ratio", "keep_ratio", "fit") if getattr(self, name) is not None]
        if len(given) != 1:
            raise ValueError(
                "From a config, say how much to cut by one of `ratio` (or `prune_ratio`), `keep_ratio` and `fit` "
                f"(bytes of the folder), got {' and '.join(f'`{name}`' for name in given) or 'none'}."
            )

    def answer(self) -> "SizeAnswer":
        """Counts.

        Raises:
            ValueError: the config cannot be read or counted, a setting is out of range, or `fit` cannot be met.
        """
        model = _read(self.config_json, dtype=self.dtype)
        with config_errors(self.config_json):
            model.unpacked  # noqa: B018  (makes the model, without memory for its weights)
        if self.fit is not None:
            width = model.widest_within(parse_bytes(self.fit), bits=self.bits, align=self.align)
            ratio = 1 - width / model.width
        else:
            ratio = resolve_prune_ratio(prune_ratio=self.prune_ratio, keep_ratio=self.keep_ratio)
            width = kept_width(model.width, prune_ratio=ratio, align=self.align)
        return SizeAnswer(question=self, model=model, ratio=ratio, width=width)


@dataclass(frozen=True, kw_only=True, eq=False)
class SizeAnswer:
    """What the model takes.

    Args:
        question: What was asked.
        model: The sizes of what its config describes.
        ratio: As asked, or as `fit` needs it.
        width: Channels that each expert keeps.
    """

    question: SizeQuestion
    model: UniformSizes
    ratio: float
    width: int

    @property
    def pruned(self) -> Sizes:
        """The cut model in the bits that were asked for."""
        return self.model.cut(self.width, bits=self.question.bits)

    def record(self) -> dict[str, Any]:
        """Plain types for a file."""
        asked, dense, pruned = self.question, self.model.original, self.pruned
        return {
            "config": asked.config_json,
            "model_type": self.model.config.get_text_config().model_type,
            "ratio": self.ratio,
            "prune_ratio": self.prune_ratio,
            "keep_ratio": 1 - self.prune_ratio,
            "align": asked.align,
            "bits": asked.bits,
            "dtype": str(self.model.dtype).removeprefix("torch."),
            "dense_width": self.model.width,
            "width": self.width,
            "dense": asdict(dense),
            "pruned": asdict(pruned),
            **_compression(dense, pruned),
        } | ({} if asked.fit is None else {"fit": {"bytes": parse_bytes(asked.fit), "ratio": self.ratio}})

    @property
    def prune_ratio(self) -> float:
        """What the widths really remove."""
        return 1 - self.width / self.model.width

    def text(self) -> str:
        """For people."""
        lines = [self._cut_in_words(), "", format_table(self._rows(), columns=_COLUMNS), ""]
        lines.append(
            "folder: what `prune` writes, scales, embeddings, routers, norms and configs included (dense: the stock "
            "model). nominal: every parameter at 16 or 4 bit, as papers count. active: experts used equally often."
        )
        return "\n".join(lines)

    def _cut_in_words(self) -> str:
        asked = self.question
        widths = f"{self.width} of {self.model.width} channels in each expert"
        if asked.fit is None:
            rounded = "" if abs(self.ratio - self.prune_ratio) < 1e-9 else f" ({self.ratio:g} rounded to `align`)"
            return f"Prune ratio {self.prune_ratio:.4g}{rounded}: {widths}."
        if self.width == self.model.width:
            return f"The whole model fits {asked.fit} in {asked.bits} bit: {format_bytes(self.pruned.bytes)}, ratio 0."
        return (
            f"To fit {asked.fit} in {asked.bits} bit, prune {self.prune_ratio:.2%} (`prune_ratio` "
            f"{self.prune_ratio:.6g}): {widths}, {format_bytes(self.pruned.bytes)}."
        )

    def _rows(self) -> list[dict[str, Any]]:
        model, dtype = self.model, str(self.model.dtype).removeprefix("torch.")
        rows = {f"dense, {dtype}": model.original, f"pruned, {dtype}": model.cut(self.width, bits=16)}
        if self.question.bits == 4:
            rows |= {"dense, 4 bit": model.cut(model.width, bits=4), "pruned, 4 bit": self.pruned}
        return [{"what": name} | asdict(sizes) | _compression(model.original, sizes) for name, sizes in rows.items()]


def answer_from_config(
    *,
    config_json: str,
    prune_ratio: float | None = None,
    keep_ratio: float | None = None,
    fit: str | int | None = None,
    align: int = 16,
    bits: Bits = 4,
    dtype: DtypeName = "auto",
    json: str | None = None,
    fit_training: str | int | None = None,
    **training: Any,
) -> None:
    """Logs what a model takes and writes it to the file `json`; the arguments are those of `plan`.

    Raises:
        ValueError: see `SizeQuestion` and `TrainingQuestion`.
    """
    if fit_training is not None and prune_ratio is keep_ratio is fit is None:
        prune_ratio = 0.0
    question = SizeQuestion(
        config_json=config_json,
        prune_ratio=prune_ratio,
        keep_ratio=keep_ratio,
        fit=fit,
        align=align,
        bits=bits,
        dtype=dtype,
    )
    if json is not None:
        check_apart(json, inputs=[config_json, *files_of(config_json)], name="json", within=False)
        check_writable(json, name="json")
    answer = question.answer()
    log.info("%s", answer.text())
    _warn_of_rounding(answer)
    record = answer.record()
    if fit_training is not None:
        trained = TrainingQuestion(fit_training=fit_training, **training).answer(
            answer.model, width=answer.width, bits=bits
        )
        log.info("\n%s", trained.text())
        record["training"] = trained.record()
    if json is not None:
        write_json(json, record)
        log.info("Written to %s.", json)


def _warn_of_rounding(answer: SizeAnswer) -> None:
    if answer.ratio > 0 and answer.width == answer.model.width:
        log.warning(
            "Nothing is cut: `align` %d rounds the ratio %g to 0. Take a larger ratio or a smaller `align`.",
            answer.question.align,
            answer.ratio,
        )


def _compression(dense: Sizes, other: Sizes) -> dict[str, Any]:
    return {
        "compression": dense.bytes / other.bytes,
        "nominal_compression": dense.nominal_bytes / other.nominal_bytes,
    }


def _read(source: str, *, dtype: DtypeName) -> UniformSizes:
    """The sizes of a source; of a cut or quantised one those of the model it came from."""
    is_file = source.endswith(".json")
    config = _read_file(source) if is_file else read_config(source)
    if vars(config).pop("quantization_config", None) is not None:
        log.info("'%s' is cut or quantised already; the model it came from is counted.", source)
    own = config.dtype if isinstance(config.dtype, torch.dtype) else torch.bfloat16
    alone = is_file and Path(source).name != "config.json"
    return UniformSizes(
        config=config,
        dtype=own if dtype == "auto" else getattr(torch, dtype),
        rest_bytes=None if alone else generation_bytes(_folder(source)),
        index=None if alone else _index(_folder(source)),
    )


def _index(source: str) -> Path | None:
    """Of the shards, where the model is in several; no weights are fetched from the hub for that."""
    index = find_file(source, "model.safetensors.index.json")
    return None if index is None or index.with_name("model.safetensors").is_file() else index


def _folder(source: str) -> str:
    return str(Path(source).parent.resolve()) if source.endswith(".json") else source


def _read_file(source: str) -> PretrainedConfig:
    path = Path(source).expanduser()
    content = read_json(path, what="model config")
    if not isinstance(content, dict) or "model_type" not in content:
        raise ValueError(f"'{source}' is no config.json of a model: it has no `model_type`.")
    check_config_text(content, path=source)
    with clear_errors(source), config_errors(source):
        config = AutoConfig.from_pretrained(path, trust_remote_code=False)
    check_values(config, source=source)
    return config
