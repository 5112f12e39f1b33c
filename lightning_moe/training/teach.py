"""Run a teacher over training rows and write its likeliest next tokens; see `teacher_logits` for what reads them.

B sequences, S positions, V vocabulary, P = B * S positions, n of them at once, k tokens.
"""

import logging
from collections.abc import Mapping
from dataclasses import asdict, replace
from pathlib import Path

import torch
from torch import Tensor
from tqdm.auto import tqdm
from transformers import PreTrainedModel

from lightning_moe.calibration.observer import evaluating
from lightning_moe.files import write_json, write_tensors
from lightning_moe.progress import hidden
from lightning_moe.training.losses import CHUNK_NUMBERS
from lightning_moe.training.packing import Rows
from lightning_moe.training.teacher_logits import (
    LogProbDtype,
    TeacherManifest,
    log_prob_name,
    open_shard,
    rows_digest,
    token_name,
)

log = logging.getLogger(__name__)

_SHARD_BYTES = 64 * 2**20


def top_k_log_probabilities(logits_BSV: Tensor, *, k: int) -> tuple[Tensor, Tensor]:
    """The k likeliest tokens of each position and their fp32 log-probabilities, both `[B, S, k]`, likeliest first."""
    logits_PV = logits_BSV.flatten(0, 1)
    tokens, log_probs = [], []
    for logits_nV in logits_PV.split(max(1, CHUNK_NUMBERS // logits_PV.shape[-1])):
        top = logits_nV.float().topk(k, dim=-1)
        tokens.append(top.indices)
        log_probs.append(top.values - logits_nV.float().logsumexp(-1, keepdim=True))
    shape = (*logits_BSV.shape[:2], k)
    return torch.cat(tokens).view(shape), torch.cat(log_probs).view(shape)


def make_manifest(
    rows: Mapping[str, Rows],
    *,
    teacher: str,
    quantize: str,
    vocab_size: int,
    k: int,
    log_prob_dtype: LogProbDtype = "float16",
    shard_rows: int | None = None,
) -> TeacherManifest:
    """What a folder for these rows will hold; shards of about 64 MiB unless `shard_rows` says otherwise.

    Raises:
        ValueError: there are no rows, k is not in 1 ... V, or shards of no rows.
    """
    if not rows:
        raise ValueError("There are no training corpora: a teacher needs rows. Name them in `data.train`.")
    if not 1 <= k <= vocab_size:
        raise ValueError(f"`k` must be between 1 and the vocabulary's size, {vocab_size}, got {k}.")
    if shard_rows is not None and shard_rows < 1:
        raise ValueError(f"`shard_rows` must be at least 1, got {shard_rows}.")
    manifest = TeacherManifest(
        teacher=teacher,
        quantize=quantize,
        k=k,
        vocab_size=vocab_size,
        sequence_length=next(iter(rows.values())).input_ids_NS.shape[1],
        log_prob_dtype=log_prob_dtype,
        shard_rows=1,
        corpora={name: rows_digest(of_corpus) for name, of_corpus in rows.items()},
        num_rows={name: len(of_corpus) for name, of_corpus in rows.items()},
    )
    per_shard = shard_rows or max(1, _SHARD_BYTES // manifest.row_bytes)
    return replace(manifest, shard_rows=per_shard)


def prepare_folder(folder: str | Path, *, manifest: TeacherManifest) -> None:
    """Writes the manifest, or finds the same one there: a run that was interrupted goes on.

    Raises:
        ValueError: the folder holds other logits.
    """
    if not (Path(folder) / "manifest.json").exists():
        write_json(Path(folder) / "manifest.json", asdict(manifest))
        return
    there, wanted = asdict(TeacherManifest.load(folder)), asdict(manifest)
    odd = [name for name, value in wanted.items() if there[name] != value]
    if odd:
        raise ValueError(
            f"'{folder}' holds other teacher logits: `{odd[0]}` is {there[odd[0]]} there and {wanted[odd[0]]} here. "
            "Name another folder, or delete this one."
        )


def write_teacher_logits(
    model: PreTrainedModel,
    *,
    rows: Mapping[str, Rows],
    manifest: TeacherManifest,
    folder: str | Path,
    batch_size: int,
    progress: bool = True,
) -> None:
    """Runs the teacher over the rows of every corpus; shards that are there already are left as they are.

    Args:
        model: the teacher, on the device where it runs.
        rows: training rows by corpus, those of the manifest.
        manifest: from `make_manifest`; the folder was prepared with it.
        folder: where the shards go, each under its name only when it is whole.
        batch_size: rows at once.
        progress: show a bar over the rows (on a terminal).

    Raises:
        ValueError: the teacher gives NaN; whole shards before that stay.
    """
    total, folder = sum(manifest.num_rows.values()), Path(folder)
    log.info("%d rows, %d tokens of each position: %.1f MB.", total, manifest.k, total * manifest.row_bytes / 1e6)
    with evaluating(model), tqdm(total=total, unit=" rows", desc="teach", disable=hidden(progress=progress)) as bar:
        for corpus in rows:
            for first, name in manifest.shards(corpus).items():
                indices = manifest.rows_of(corpus, first=first)
                if not _is_whole(folder / name, rows=indices):
                    shard = {}
                    for start in range(0, len(indices), batch_size):
                        some = indices[start : start + batch_size]
                        shard |= _targets(model, rows=rows[corpus], corpus=corpus, indices=some, manifest=manifest)
                        bar.update(len(some))
                    write_tensors(folder / name, shard, metadata={"first_row": first})
    log.info("Teacher logits of corpora %s written to %s.", list(rows), folder)


@torch.no_grad()
def _targets(
    model: PreTrainedModel, *, rows: Rows, corpus: str, indices: range, manifest: TeacherManifest
) -> dict[str, Tensor]:
    """Targets of some rows under their names in a shard."""
    batch = [rows[index] for index in indices]
    inputs = {key: torch.stack([row[key] for row in batch]).to(model.device) for key in ("input_ids", "attention_mask")}
    found = top_k_log_probabilities(model(**inputs, use_cache=False).logits, k=manifest.k)
    token_BSk, log_prob_BSk = (value.to("cpu", dtype) for value, dtype in zip(found, manifest.dtypes, strict=True))
    targets, broken_B = {}, log_prob_BSk.isnan().flatten(1).any(1)
    if bool(broken_B.any()):
        raise ValueError(
            f"The teacher gives NaN on row {indices[int(broken_B.long().argmax())]} of corpus '{corpus}'. Look at its "
            "weights, or run it in bfloat16 or float32 (`dtype`)."
        )
    for index, token_Sk, log_prob_Sk in zip(indices, token_BSk, log_prob_BSk, strict=True):
        targets |= {token_name(index): token_Sk, log_prob_name(index): log_prob_Sk}
    return targets


def _is_whole(path: Path, *, rows: range) -> bool:
    """Whether a shard is there and can be read; a damaged one is written again."""
    try:
        open_shard(path, rows=rows)
    except ValueError:
        return False
    return True
