"""`nf4` of a checkpoint that need not fit in memory: written, then compared, one decoder layer at a time."""

from collections.abc import Iterator
from contextlib import AbstractContextManager
from pathlib import Path

from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedTokenizerBase

from lightning_moe.export.apart import check_apart
from lightning_moe.export.comparing import Comparison, Probe
from lightning_moe.export.folders import open_folder
from lightning_moe.export.huggingface import check_replaceable
from lightning_moe.export.manifest import write_manifest
from lightning_moe.export.model_card import Rows, carry_card, write_card
from lightning_moe.export.place import NotReproducedError, made_beside
from lightning_moe.export.result import ExportResult
from lightning_moe.export.streaming import prune_folder
from lightning_moe.export.tokenizer_files import save_tokenizer
from lightning_moe.files import folder_bytes
from lightning_moe.machine import available_memory
from lightning_moe.models.folders import LayerFolder
from lightning_moe.models.loading import DtypeName, load_model
from lightning_moe.models.sources import open_source
from lightning_moe.models.stored_tensors import LazyTensor, Part
from lightning_moe.progress import hidden
from lightning_moe.surgery.folder_cut import FolderCut
from lightning_moe.surgery.streaming import quantize_folder

# What running the packed model takes beside its weights, generously.
_ROOM = 1.5
_BLOCK_BYTES = 2**26
_GENERATION = "generation_config.json"


def export_streamed(
    source: str,
    *,
    folder: str | Path,
    dtype: DtypeName = "auto",
    tokenizer: PreTrainedTokenizerBase | None = None,
    results: Rows = (),
    progress: bool = True,
) -> ExportResult:
    """Packs a stock checkpoint into `<folder>/nf4`, shard by shard, and compares what is stored with the source.

    Every stored tensor is compared, bit for bit, with the source's packed once more; that takes the memory of a decoder
    layer, or of the embeddings. Where the packed model fits into memory, its logits are compared too.

    Args:
        source: folder, `asset:small_moe` or hub name of a stock model.
        folder: where the format goes, as a subfolder.
        dtype: type of the weights that stay unpacked.
        tokenizer: written beside the model, if given.
        results: rows of `evaluate` for the table in the model card.
        progress: show bars.

    Returns:
        The result; its logit differences are None where the packed model does not fit.

    Raises:
        ValueError: see `prune_folder`; or what is stored is not the packed source.
    """
    target, opened = Path(folder) / "nf4", open_folder(source, dtype=dtype)
    check_apart(target, inputs=[source], name="folder", within=False)
    check_replaceable(target)
    beside = None if tokenizer is None else lambda made: save_tokenizer(tokenizer, folder=made)
    with made_beside(target, goes_on=True) as made:
        prune_folder(opened, plan=None, out=made, quantize=True, progress=progress, beside=beside)
        cut = FolderCut(folder=opened, plan=None, quantize=True, novices=None, device="cpu")
        check_packed(cut, folder=made, progress=progress)
        comparison = _compare_logits(source, dtype=dtype, folder=made)
        notes = (_told(comparison, part_bytes=_largest_part(opened), packed_bytes=folder_bytes(made)),)
        manifest = write_manifest(
            made,
            format="nf4",
            source=source,
            model=open_folder(str(made)).model,
            dropped=opened.dropped,
            max_logit_diff=None if comparison is None else comparison.max_logit_diff,
        )
        kept = carry_card(target, made)
        write_card(made, manifest=manifest, results=results, notes=notes)
    return ExportResult(
        format="nf4",
        base=str(target),
        adapter=None,
        bytes=sum(size for name, size in manifest.files.items() if _is_model(name)),
        max_logit_diff=None if comparison is None else comparison.max_logit_diff,
        median_logit_diff=None if comparison is None else comparison.median_logit_diff,
        rerouted=None if comparison is None else comparison.rerouted,
        notes=(*notes, *kept),
    )


def _is_model(name: str) -> bool:
    """Whether a file is one of weights or their config: not a tokenizer's."""
    return name.endswith((".safetensors", ".safetensors.index.json")) or name in ("config.json", _GENERATION)


def check_packed(cut: FolderCut, *, folder: Path, progress: bool = True) -> None:
    """Compares the tensors of a folder with those that a cut of its source gives, one decoder layer at a time.

    Raises:
        NotReproducedError: one is missing, is too many, or differs in a bit; the message names it.
    """
    stored, _ = open_source(str(folder))
    unknown, total = set(stored), len(cut.folder.decoder_names) + 1
    for part in tqdm(_parts(cut), desc="Comparing", total=total, disable=hidden(progress=progress)):
        with part as tensors:
            for name, tensor in tensors.items():
                unknown.discard(name)
                if name not in stored or not _same(tensor, stored[name]):
                    raise NotReproducedError(
                        f"The export '{folder}' does not reproduce the model: '{name}' differs from the packed source. "
                        "It is left there for inspection; do not ship it."
                    )
    if unknown:
        raise NotReproducedError(
            f"The export '{folder}' does not reproduce the model: '{min(unknown)}' is no tensor of it. It is left "
            "there for inspection; do not ship it."
        )


def _parts(cut: FolderCut) -> Iterator[AbstractContextManager[dict[str, Tensor]]]:
    for name in cut.folder.decoder_names:
        yield cut.decoder(name)
    yield cut.outside()


def _same(tensor: Tensor, stored: LazyTensor) -> bool:
    """Compared in blocks of rows, so that next to nothing is held twice."""
    if tensor.dtype != stored.dtype or tuple(tensor.shape) != stored.shape:
        return False
    rows, num_rows = tensor.cpu().reshape(stored.num_rows, -1), stored.num_rows
    step = max(1, _BLOCK_BYTES // max(1, rows.shape[1] * rows.element_size()))
    for first in range(0, num_rows, step):
        last = min(first + step, num_rows)
        block = Part(tensor=stored, dtype=stored.dtype, first=first, last=last, masks=True)[...]
        if not rows[first:last].equal(block.reshape(last - first, -1)):
            return False
    return True


def _compare_logits(source: str, *, dtype: DtypeName, folder: Path) -> Comparison | None:
    """Of the source packed in memory and of the reload, one after the other; None where that is too large."""
    if _ROOM * folder_bytes(folder) > available_memory():
        return None
    before = Probe.of(quantize_folder(source, dtype=dtype))
    comparison = Comparison.of(before, Probe.of(load_model(str(folder), dtype=dtype)))
    comparison.check(folder, before=before, rounded=False)
    return comparison


def _largest_part(folder: LayerFolder) -> int:
    """Bytes of the largest of what is in memory at a time: a decoder layer, or everything outside of them."""
    inside = tuple(f"{name}." for name in folder.decoder_names)
    outside = [value for name, value in folder.model.state_dict().items() if not name.startswith(inside)]
    return max(sum(value.nbytes for value in outside), *map(folder.decoder_bytes, folder.decoder_names))


def _told(comparison: Comparison | None, *, part_bytes: int, packed_bytes: int) -> str:
    whole = f"the packed model in memory, {packed_bytes / 1e9:.2f} GB"
    logits = f"not its logits, which would take {whole}" if comparison is None else f"and the logits, with {whole}"
    return (
        "compared with the source packed once more: every tensor bit for bit, with a decoder layer or the embeddings "
        f"in memory, {part_bytes / 1e9:.2f} GB; {logits}"
    )
