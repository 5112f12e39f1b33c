"""Second pass: Gram matrices of every expert's channels, for the least-squares repair (method, sections 1 and 5).

E experts, m columns of a Gram.
"""

import logging
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import Protocol

import torch
from torch import Tensor
from transformers import PretrainedConfig, PreTrainedModel

from lightning_moe.calibration.gram_sums import (
    HIDDEN_CHANNELS,
    GramColumns,
    GramObserver,
    GramPart,
    LayerGram,
    RepeatedGramObserver,
    gram_bytes,
)
from lightning_moe.calibration.memory import give_back_freed
from lightning_moe.calibration.observer import evaluating, observed
from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.calibration.routed import sum_dtype
from lightning_moe.calibration.text import Batch, TextReader, vocab_size
from lightning_moe.models.discovery import MoeLayer, expert_widths, moe_layers

log = logging.getLogger(__name__)

_GB = 2**30


class RunsOneLayer(Protocol):
    """One decoder layer that runs over the text as often as it is asked to (`layer_walk.DecoderStep`)."""

    @property
    def moe(self) -> MoeLayer | None:
        """Its MoE layer; None in a dense one."""
        ...

    def run(self, *, batch: Callable[[str, Mapping[str, Tensor]], AbstractContextManager[None]], keep: bool) -> None:
        """Runs every batch of this process through the layer, each inside `batch(corpus, inputs)`."""
        ...


def iterate_grams(
    model: PreTrainedModel,
    *,
    loaders: Mapping[str, Iterable[Batch]],
    memory_gb: float = 4.0,
    experts: Sequence[Sequence[int]] | None = None,
    columns: GramColumns = HIDDEN_CHANNELS,
    progress: bool = True,
    processes: Processes = ALONE,
) -> Iterator[LayerGram]:
    """Grams of all MoE layers in order, a few layers at a time: each pass over the text fills what fits in memory.

    A layer that does not fit comes as several records, a few experts each. The model must stay uncut until the last
    record has been yielded: every Gram is one of the unpruned model. A pass ends at its last layer, so earlier layers
    cost less. Sums run over all corpora together.

    Args:
        model: a model of a known family.
        loaders: corpus name -> batches, as for `collect_statistics`; every loader is read once per pass.
        memory_gb: GiB that the Gram matrices of one pass may take.
        experts: per layer the experts whose Grams are wanted; all when not given.
        columns: what the Grams are of.
        progress: show a progress bar.
        processes: those that share the batches, as for `collect_statistics`. Grams are added up in their own type, so
            those of several processes differ from one's in the last digits.

    Raises:
        ValueError: one expert alone needs more than `memory_gb`, a corpus is empty, only padding, or can be read once
            only and several passes are needed, or activations hold NaN or infinity.
    """
    layers, dtype = moe_layers(model), sum_dtype(model.dtype)
    parts = [
        part
        for layer in layers
        for part in _parts(
            layer,
            experts=None if experts is None else experts[layer.index],
            columns=columns,
            memory_gb=memory_gb,
            dtype=dtype,
        )
    ]
    decoder, config = model.get_decoder(), model.config.get_text_config()
    groups = _plan_passes(parts, memory_gb=memory_gb, dtype=dtype)
    _check_repeatable(loaders, num_passes=len(groups))
    for group in groups:
        observer = GramObserver(config, parts=group, columns=columns, dtype=dtype, ends_pass=True)
        own = [part.layer for part in group]
        title = f"Gram matrices, layers {own[0].index}-{own[-1].index} of {len(layers)}"
        reader = TextReader(
            loaders,
            device=model.device,
            progress=progress,
            processes=processes,
            title=title,
            vocab_size=vocab_size(model),
        )
        with processes.together(), evaluating(model), observed(layers[: own[-1].index + 1], observer=observer):
            for corpus, inputs in reader:
                with observer.batch(corpus, inputs):
                    decoder(**inputs, use_cache=False)
        yield from observer.grams(num_tokens=reader.check_not_empty(), processes=processes)


def stream_grams(
    step: RunsOneLayer,
    *,
    config: PretrainedConfig,
    dtype: torch.dtype,
    num_tokens: int,
    memory_gb: float,
    experts: Sequence[int],
    columns: GramColumns = HIDDEN_CHANNELS,
    processes: Processes = ALONE,
) -> Iterator[LayerGram]:
    """Grams of one layer of a walk, as many experts at a time as fit in memory: `iterate_grams`, bit for bit.

    The layer runs over the text once for each record; its outputs are kept the first time, and later runs are of the
    record's own experts alone. It must stay uncut until the last record has been yielded, but the down rows of experts
    whose record was yielded may change.

    Args:
        step: the layer.
        config: of the model, or of its text part.
        dtype: type of the model's weights.
        num_tokens: tokens that count, of all processes together.
        memory_gb: GiB that the Gram matrices may take.
        experts: those whose Grams are wanted.
        columns: what the Grams are of.
        processes: those that share the batches.

    Raises:
        ValueError: one expert alone needs more than `memory_gb`.
    """
    layer, wide = step.moe, sum_dtype(dtype)
    assert layer is not None
    parts = _parts(layer, experts=experts, columns=columns, memory_gb=memory_gb, dtype=wide)
    energies: list[Tensor] = []
    for number, part in enumerate(parts):
        observer = RepeatedGramObserver(
            config.get_text_config(), part=part, columns=columns, dtype=wide, energies=energies
        )
        with observed([layer], observer=observer):
            step.run(batch=observer.batch, keep=number == 0)
        yield from observer.grams(num_tokens=num_tokens, processes=processes)
        give_back_freed()


def _check_repeatable(loaders: Mapping[str, Iterable[Batch]], *, num_passes: int) -> None:
    """Refuses what the first of several passes would use up."""
    for corpus, loader in loaders.items():
        if num_passes > 1 and isinstance(loader, Iterator):
            raise ValueError(
                f"Corpus '{corpus}' is a {type(loader).__name__}, which can be read only once, and the Gram matrices "
                f"take {num_passes} passes over the text. Give a DataLoader or a list, or raise `memory_gb`."
            )


def _parts(
    layer: MoeLayer, *, experts: Sequence[int] | None, columns: GramColumns, memory_gb: float, dtype: torch.dtype
) -> list[GramPart]:
    """A layer's experts in runs that fit in memory; one run, maybe of no expert, where all fit."""
    experts = range(len(expert_widths(layer.experts))) if experts is None else experts
    runs: list[dict[int, int]] = [{}]
    used = 0
    for expert in experts:
        num_columns = columns.count(layer, expert)
        size = gram_bytes(num_columns, dtype=dtype)
        if size > memory_gb * _GB:
            raise ValueError(
                f"`memory_gb` must be at least {size / _GB:.3g}: the Gram matrices of expert {expert} of "
                f"'{layer.name}' take that much, got {memory_gb}. Raise it, or do without repair."
            )
        if used + size > memory_gb * _GB:
            runs.append({})
            used = 0
        runs[-1][expert] = num_columns
        used += size
    return [GramPart(layer=layer, sizes=sizes) for sizes in runs]


def _plan_passes(parts: Sequence[GramPart], *, memory_gb: float, dtype: torch.dtype) -> list[list[GramPart]]:
    """Parts of each pass, never two of one layer; says what it will cost before anything runs."""
    groups: list[list[GramPart]] = []
    used = float("inf")
    memory = {id(part): part.num_bytes(dtype) for part in parts}
    for part in parts:
        again = bool(groups) and groups[-1][-1].layer is part.layer
        if again or used + memory[id(part)] > memory_gb * _GB:
            groups.append([])
            used = 0
        groups[-1].append(part)
        used += memory[id(part)]
    log.info(
        "Gram matrices: %d pass(es) over the text, layers per pass %s, %.2f GiB in all, %.2f at a time.",
        len(groups),
        [len(group) for group in groups],
        sum(memory.values()) / _GB,
        max(sum(memory[id(part)] for part in group) for group in groups) / _GB,
    )
    return groups
