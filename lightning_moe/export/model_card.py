"""The model card of an exported folder: `README.md` with the hub's front matter, kept where a person wrote it."""

import hashlib
import logging
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from huggingface_hub import ModelCardData
from huggingface_hub.repocard import metadata_load
from yaml import YAMLError

from lightning_moe.assets import resolve_asset
from lightning_moe.export.formats import STOCK_FORMATS
from lightning_moe.export.manifest import CARD_NAME, MANIFEST_NAME, Manifest, PlanOrigin
from lightning_moe.export.stock_layouts import NOT_NATIVE
from lightning_moe.files import read_json, write_atomically
from lightning_moe.quantization.added_error import AddedError
from lightning_moe.reporting.table import RESULT_COLUMNS, Column, escape_markdown, format_markdown, one_line

log = logging.getLogger(__name__)

Rows = Sequence[Mapping[str, Any]]
_SEAL = "<!-- lightning_moe wrote this card; edit it and the next export keeps yours. {digest} -->\n"
_SEALED = re.compile(r"\A(.*)" + re.escape(_SEAL).replace(r"\{digest\}", "([0-9a-f]{64})") + r"\Z", re.DOTALL)
_HUB_NAME = re.compile(r"[A-Za-z0-9][\w.-]*/[A-Za-z0-9][\w.-]*")
_TABLE_KEYS = ("name", "prune_ratio", "nll", "bytes", "stored_params", "active_params")
_WHAT = {
    "adapter": "The pruned model (`base/`) and the adapters that recover it (`adapter/`, PEFT's format).",
    "merged": "The pruned model with its recovery adapters merged in, unpacked.",
    "merged_nf4": "The pruned model with its recovery adapters merged in, packed in 4 bit (NF4).",
    "ragged": "The pruned model; its experts have widths of their own.",
    "nf4": "The model packed in 4 bit (NF4); its experts have widths of their own where it was pruned.",
    "padded": (
        "The pruned model as a stock checkpoint: zero channels fill every expert up to the widest one, so that it "
        "computes what the pruned model computes and saves no memory beyond the widest expert."
    ),
    "uniform": "The pruned model as a smaller stock checkpoint: every expert has the same, smaller width.",
    "expert_dropped": "The pruned model as a smaller stock checkpoint: every layer has the same, smaller expert count.",
    "stock": "The model as a stock checkpoint.",
}


def carry_card(old: Path, new: Path) -> list[str]:
    """Copies a card that a person wrote or edited to the folder that will be renamed to `old`.

    Returns:
        One sentence about it, if there was such a card.
    """
    kept = told_of_card(old)
    if kept:
        with write_atomically(new / CARD_NAME) as temporary:
            temporary.write_bytes((old / CARD_NAME).read_bytes())
    return kept


def told_of_card(folder: Path) -> list[str]:
    """One sentence about the card in a folder, if a person wrote or edited it."""
    path = folder / CARD_NAME
    if not path.is_file() or _is_sealed(path.read_text(encoding="utf-8", errors="replace")):
        return []
    return [f"{path} was written or edited by a person and stays as it was"]


def write_card(
    folder: str | Path,
    *,
    manifest: Manifest,
    results: Rows = (),
    notes: Sequence[str] = (),
    cut: bool = False,
) -> None:
    """Writes the card of an export; one that a person wrote or edited stays.

    Args:
        folder: The export.
        manifest: What it is.
        results: Rows of `evaluate` for the table of results.
        notes: What else there is to know, in words.
        cut: Whether channels or experts are gone, also where no plan says which.
    """
    if told_of_card(Path(folder)):
        return
    family = _model_type(Path(folder))
    sections = [
        f"---\n{_front_matter(manifest, cut=cut)}\n---",
        f"# {escape_markdown(Path(manifest.base_model).name.removeprefix('asset:'))}, {manifest.format}",
        "\n\n".join([_WHAT[manifest.format], *(f"Note: {one_line(note)}." for note in notes)]),
        _cut(manifest.plans, cut=cut),
        _loading(manifest.format, family=family),
        _sizes(manifest),
        *([_results(results)] if results else []),
        _origin(manifest),
    ]
    text = "\n\n".join(section for section in sections if section) + "\n"
    with write_atomically(Path(folder) / CARD_NAME) as temporary:
        temporary.write_text(text + _SEAL.format(digest=_digest(text)), encoding="utf-8")


def _is_sealed(text: str) -> bool:
    """Whether a card is as this module wrote it, to the letter."""
    match = _SEALED.match(text)
    return match is not None and _digest(match[1]) == match[2]


def _digest(text: str) -> str:
    return hashlib.sha256(text.encode()).hexdigest()


def _model_type(folder: Path) -> str:
    base = folder if (folder / "config.json").is_file() else folder / "base"
    return str(read_json(base / "config.json", what="model config").get("model_type"))


def _front_matter(manifest: Manifest, *, cut: bool) -> str:
    """What the hub indexes: the base model where it has a name there, the licence where the source's card names one."""
    is_on_hub = _HUB_NAME.fullmatch(manifest.base_model) and not Path(manifest.base_model).exists()
    tags = ["mixture-of-experts", "lightning_moe"]
    tags += ["pruned"] if manifest.plans or cut else []
    tags += ["nf4"] if manifest.bits["experts"] == 4 else []
    data = ModelCardData(
        base_model=manifest.base_model if is_on_hub else None,
        library_name="peft" if manifest.format == "adapter" else "transformers",
        pipeline_tag="text-generation",
        tags=tags,
        license=_license_of(manifest.source),
    )
    return data.to_yaml()


def _license_of(source: str) -> str | None:
    """The licence in the front matter of a local source's own card; None where nothing says so, or not readably."""
    card = Path(resolve_asset(source)) / CARD_NAME
    try:
        metadata = metadata_load(card) if card.is_file() else None
    except (ValueError, YAMLError, RecursionError) as error:
        log.warning("The licence of '%s' is not carried over: %s", card, one_line(str(error)))
        return None
    license = metadata.get("license") if metadata else None
    return license if isinstance(license, str) else None


def _cut(plans: Sequence[PlanOrigin], *, cut: bool) -> str:
    if not plans and cut:
        return "## What was cut\n\nChannels or experts are gone: cut, by a plan that is not recorded."
    if not plans:
        return "## What was cut\n\nNothing: all channels of all experts are here."
    lines = [
        f"- {plan.prune_ratio:.1%} of the routed experts' channels went, chosen by `{_code(plan.method)}`"
        + (f", calibrated on {escape_markdown(plan.corpora)}" if plan.corpora else "")
        for plan in plans
    ]
    return "\n".join(["## What was cut", "", *lines])


def _code(text: str) -> str:
    """Between backticks."""
    return one_line(text).replace("`", "'")


def _loading(format: str, *, family: str) -> str:
    ours = format not in STOCK_FORMATS
    lines = ["```python", *(["import lightning_moe"] if ours or family in NOT_NATIVE else [])]
    lines += ["from transformers import AutoModelForCausalLM, AutoTokenizer", ""]
    if format == "adapter":
        lines[2:2] = ["from lightning_moe.adapters.storage import load_adapter"]
        lines += [
            'model = AutoModelForCausalLM.from_pretrained("base")',
            'load_adapter(model, folder="adapter")',
            'tokenizer = AutoTokenizer.from_pretrained("base")',
        ]
    else:
        lines += ['model = AutoModelForCausalLM.from_pretrained(".")', 'tokenizer = AutoTokenizer.from_pretrained(".")']
    if ours:
        why = "It loads after `import lightning_moe` and not without: no serving engine knows this format."
    elif family in NOT_NATIVE:
        why = f"Stock layout; {NOT_NATIVE[family]}."
    else:
        why = "Stock layout: loads with transformers alone, without `lightning_moe`."
    return "\n".join(["## How to load it", "", why, "", *lines, "```"])


def _sizes(manifest: Manifest) -> str:
    bits = ", ".join(f"{name} {value}" for name, value in manifest.bits.items())
    rows = [
        {"what": "Files", "value": f"{manifest.bytes:,} bytes"},
        {"what": "Stored parameters", "value": f"{manifest.stored_params:,}"},
        {"what": "Parameters per token, experts used equally often", "value": f"{manifest.active_params:,.0f}"},
        {"what": "Bits per weight", "value": bits},
    ]
    columns = (Column(key="what", header="", left=True), Column(key="value", header=""))
    return "## Sizes\n\n" + format_markdown(rows, columns=columns)


def _results(results: Rows) -> str:
    corpora = list(dict.fromkeys(corpus for row in results for corpus in row.get("nll_per_corpus", {})))
    columns = [column for column in RESULT_COLUMNS if column.key in _TABLE_KEYS]
    columns += [Column(key=f"nll of {corpus}", header=corpus, text="{:.4f}".format) for corpus in corpora]
    rows = [
        {**row, **{f"nll of {corpus}": value for corpus, value in row.get("nll_per_corpus", {}).items()}}
        for row in results
    ]
    told = "Mean negative log-likelihood in nats per token on held-out text, lower is better; then corpus by corpus."
    return f"## Results\n\n{told}\n\n{format_markdown(rows, columns=columns)}"


def _origin(manifest: Manifest) -> str:
    versions = ", ".join(f"{name} {version}" for name, version in manifest.versions.items())
    dropped = f"Left out, as no part of the model: {len(manifest.dropped)} tensors. " if manifest.dropped else ""
    compared = (
        ""
        if manifest.max_logit_diff is None
        else f"Loaded again after writing: largest difference of a logit {manifest.max_logit_diff:.1e}. "
    )
    added = "" if manifest.added_error is None else f"{AddedError(**manifest.added_error).describe()}. "
    return (
        f"## Where it comes from\n\n{compared}{added}{dropped}Written with {versions}; digests of plan and "
        f"statistics, and the bytes of each file, are in `{MANIFEST_NAME}`."
    )
