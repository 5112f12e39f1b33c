"""Which stored tensors become which weights of a model, and whether they can."""

import logging
import math
import re
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from lightning_moe.models.stored_tensors import LazyTensor, Part, examples

log = logging.getLogger(__name__)

StoredKeys = Mapping[str, Mapping[str, Sequence[str]]]


def keys_by_name(
    model: PreTrainedModel, *, keys: Iterable[str], conversions: Sequence[Any]
) -> dict[str, dict[str, list[str]]]:
    """Which stored tensors become which weight.

    Args:
        model: the model, on any device.
        keys: names of the stored tensors.
        conversions: transformers' conversion mapping of the model.

    Returns:
        Name of each weight (also of those that the model does not have) -> pattern of the conversion (or the key
        itself) -> stored keys.
    """
    renamings = [entry for entry in conversions if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in conversions if isinstance(entry, WeightConverter)]
    state, prefix = model.state_dict(), model.base_model_prefix
    found: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for key in keys:
        name, pattern = rename_source_key(key, renamings, converters, prefix, state)
        if name not in state and key in state:  # transformers' own rule for keys that should keep their name
            name, pattern = rename_source_key(key, [], [], prefix, state)
        found[name][key if pattern is None else pattern].append(key)
    return {name: dict(patterns) for name, patterns in found.items()}


def stored_keys(keys: StoredKeys, name: str) -> list[str]:
    """All stored tensors that become one weight."""
    return [key for stored in keys.get(name, {}).values() for key in stored]


def dropped_keys(keys: StoredKeys, *, names: Iterable[str]) -> tuple[str, ...]:
    """Stored tensors that are no part of a model with weights of these names, sorted."""
    return tuple(sorted(key for name in keys.keys() - set(names) for key in stored_keys(keys, name)))


def warn_of_dropped(dropped: Sequence[str], *, source: str) -> None:
    """One line in the log, if there is anything to say."""
    if not dropped:
        return
    groups: dict[str, list[str]] = defaultdict(list)
    for key in dropped:
        groups[re.sub(r"^(.*?layers?\.\d+|[^.]+)\..*$", r"\1", key)].append(key)
    listed = "; ".join(f"{len(keys)} of `{prefix}`: {examples(keys, number=2)}" for prefix, keys in groups.items())
    log.warning(
        "'%s' stores %d tensors that are no part of the model (multi-token prediction, say) and are dropped: %s.",
        source,
        len(dropped),
        listed,
    )


def check_complete(report: Mapping[str, Any], *, source: str, files: Mapping[str, Path]) -> None:
    """Refuses what transformers only warns of before it fills the gaps with random numbers.

    Args:
        report: from `from_pretrained(..., output_loading_info=True)`.
        source: named in the message.
        files: file of each weight, as far as known.

    Raises:
        ValueError: weights are missing or of another shape.
    """
    missing = sorted(map(str, report["missing_keys"]))
    if missing:
        tied = "lm_head.weight" in missing
        hint = " If its output matrix is that of the embeddings, `tie_word_embeddings` must be true in config.json."
        raise ValueError(
            f"'{source}' lacks {len(missing)} weights of its model, such as {missing[:3]}. Write or download it again."
            + hint * tied
        )
    mismatched = sorted(str(key) for key, *_ in report["mismatched_keys"])
    if mismatched:
        raise ValueError(
            f"{len(mismatched)} weights of '{source}' have another shape than its config.json says, "
            f"such as {mismatched[:3]} in '{files.get(mismatched[0], source)}'."
        )


def check_parts(keys: StoredKeys, *, tensors: Mapping[str, LazyTensor]) -> None:
    """Refuses weights that are made of unequal numbers of tensors, of 8 gate and 7 up projections, or of unequal ones.

    Raises:
        ValueError: see above.
    """
    for name, patterns in keys.items():
        counts = {pattern: len(stored) for pattern, stored in patterns.items()}
        fewest, most = min(counts, key=counts.__getitem__), max(counts, key=counts.__getitem__)
        if counts[fewest] < counts[most]:
            file = tensors[patterns[fewest][0]].file
            raise ValueError(
                f"'{name}' is made of {counts[most]} tensors `{most}` and {counts[fewest]} `{fewest}`, so that some "
                f"are missing in '{file}' or its shards. Write or download them again."
            )
        for stored in patterns.values():
            _check_alike(stored, tensors=tensors)


def _check_alike(stored: Sequence[str], *, tensors: Mapping[str, LazyTensor]) -> None:
    """Refuses a matrix of one expert that has another shape than those of most experts."""
    shapes = Counter(tensors[key].shape for key in stored)
    if len(shapes) > 1:
        usual = shapes.most_common(1)[0][0]
        odd = next(key for key in stored if tensors[key].shape != usual)
        raise ValueError(
            f"'{odd}' in '{tensors[odd].file}' has shape {tensors[odd].shape}, most like it, such as "
            f"'{next(key for key in stored if tensors[key].shape == usual)}', have {usual}. "
            "Write or download it again."
        )


def check_joined(keys: StoredKeys, *, tensors: Mapping[str, LazyTensor], state: Mapping[str, Tensor]) -> None:
    """After transformers could not join tensors to a weight: names the weight, and the files.

    Args:
        keys: see `keys_by_name`.
        tensors: what the files hold.
        state: the model's weights, on any device.

    Raises:
        ValueError: tensors of several kinds that make one weight have different shapes.
    """
    for name in keys.keys() & state.keys():
        shapes = {pattern: tensors[stored[0]].shape for pattern, stored in keys[name].items()}
        if len(set(shapes.values())) > 1:
            told = " and ".join(f"`{pattern}` of shape {shape}" for pattern, shape in shapes.items())
            files = sorted({str(tensors[key].file) for key in stored_keys(keys, name)})
            raise ValueError(
                f"'{name}' should have shape {tuple(state[name].shape)}, which cannot be made of {told} in "
                f"{examples(files)}. Write or download them again."
            )


def check_layers(num_layers: int, *, tensors: Mapping[str, LazyTensor], source: str) -> None:
    """Refuses a config of more layers than there are tensors, before memory is taken for them.

    Raises:
        ValueError: see above.
    """
    if num_layers > len(tensors):
        raise ValueError(
            f"config.json of '{source}' says `num_hidden_layers: {num_layers}`, but its files hold {len(tensors)} "
            "tensors in all. Write or download it again."
        )


def check_sizes(
    keys: StoredKeys, *, tensors: Mapping[str, LazyTensor], state: Mapping[str, Tensor], source: str
) -> None:
    """Refuses a config of so much larger a model that what the files lack would take more memory than they have bytes.

    A weight that is missing or has another shape is told after loading, for which transformers makes it.

    Args:
        keys: see `keys_by_name`.
        tensors: what the files hold.
        state: the model's weights, on any device; tied ones once.
        source: named in the message.

    Raises:
        ValueError: see above.
    """
    held = {name: sum(math.prod(tensors[key].shape) for key in stored_keys(keys, name)) for name in state}
    lacking = {name: weight for name, weight in state.items() if held[name] != weight.numel()}
    total = sum(math.prod(tensor.shape) for tensor in tensors.values())
    if sum(weight.numel() for weight in lacking.values()) > total:
        name = max(lacking, key=lambda name: lacking[name].numel())
        raise ValueError(
            f"config.json of '{source}' is of a larger model than its files: '{name}' has shape "
            f"{tuple(lacking[name].shape)} there, and the files hold {held[name]} numbers for it. Write or download it "
            "again."
        )


def files_by_name(keys: StoredKeys, *, tensors: Mapping[str, LazyTensor]) -> dict[str, Path]:
    """File of each weight (of the first tensor that it is made of)."""
    return {name: tensors[stored_keys(keys, name)[0]].file for name in keys}


def check_types(keys: StoredKeys, *, tensors: Mapping[str, LazyTensor], state: Mapping[str, Tensor]) -> None:
    """Refuses numbers of another kind than the weight's, which transformers would cast without a word.

    Args:
        keys: see `keys_by_name`.
        tensors: what the files hold.
        state: the model's weights, on any device.

    Raises:
        ValueError: a weight is stored as integers, or in 8-bit floating point without the config that explains it.
    """
    for name, weight in state.items():
        for key in stored_keys(keys, name):
            stored = tensors[key].dtype
            packed = not weight.is_floating_point()  # codes, and the floating-point statistics beside them
            if packed or (stored.is_floating_point and stored.itemsize > 1):
                continue
            advice = "Write it in 16 bit."
            if stored.is_floating_point:
                advice = (
                    "Its config.json lacks the `quantization_config` with `quant_method: fp8` that tells its scales."
                )
            raise ValueError(
                f"'{key}' in '{tensors[key].file}' is stored as {tensors[key].type_name}, but it is a weight in "
                f"floating point. {advice}"
            )


def check_range(keys: StoredKeys, *, tensors: Mapping[str, LazyTensor], state: Mapping[str, Tensor]) -> None:
    """Refuses weights that became infinite because their type is narrower than the stored one; see `Part`.

    Args:
        keys: see `keys_by_name`.
        tensors: what the files hold.
        state: the loaded weights.

    Raises:
        ValueError: see above; the message names file and tensor.
    """
    for name, weight in state.items():
        wider = [key for key in stored_keys(keys, name) if tensors[key].dtype.itemsize > weight.dtype.itemsize]
        if wider and weight.is_floating_point() and weight.isinf().any():
            for key in wider:
                Part(tensor=tensors[key], dtype=weight.dtype, masks=True)[...]


def check_tied(keys: StoredKeys, *, tensors: Mapping[str, LazyTensor], tied: Mapping[str, str]) -> None:
    """Refuses weights that the config ties and the files hold with different values.

    Raises:
        ValueError: see above.
    """
    for target, source in tied.items():
        own, other = stored_keys(keys, target), stored_keys(keys, source)
        if own and other and not _same_content(tensors[own[0]], tensors[other[0]]):
            raise ValueError(
                f"config.json ties '{target}' to '{source}' (`tie_word_embeddings`), but "
                f"'{tensors[own[0]].file}' stores another '{own[0]}'. Set `tie_word_embeddings` to false in it."
            )


def _same_content(one: LazyTensor, other: LazyTensor) -> bool:
    if one.shape != other.shape or one.dtype != other.dtype:
        return False
    step = 1024
    for first in range(0, one.num_rows, step):
        last = min(first + step, one.num_rows)
        parts = (Part(tensor=tensor, dtype=tensor.dtype, first=first, last=last) for tensor in (one, other))
        if not torch.equal(*(part[...] for part in parts)):
            return False
    return True
