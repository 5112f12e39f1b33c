"""The command `plan`."""

from inspect import signature
from typing import Any

from lightning_moe.allocation.methods.presets import MethodArgs
from lightning_moe.commands._budgeting import plan_from_statistics
from lightning_moe.commands._sizing import answer_from_config
from lightning_moe.models.loading import DtypeName
from lightning_moe.quantization.size import Bits
from lightning_moe.training.optim import OptimizerName

_TRAINING = (
    "sequence_length",
    "batch_size",
    "optimizer",
    "gradient_checkpointing",
    "router_rank",
    "attention_rank",
)


def plan(
    *,
    statistics: str | None = None,
    out: str | None = None,
    prune_ratio: float | None = None,
    keep_ratio: float | None = None,
    budget: str | int | None = None,
    stored_params: str | int | None = None,
    active: float | None = None,
    model: str | None = None,
    bits: Bits = 4,
    dtype: DtypeName = "auto",
    method: str = "exact_global",
    method_args: MethodArgs | None = None,
    corpora: list[str] | None = None,
    config_json: str | None = None,
    ratio: float | None = None,
    fit: str | int | None = None,
    align: int | None = None,
    json: str | None = None,
    fit_training: str | int | None = None,
    sequence_length: int = 1024,
    batch_size: int = 1,
    optimizer: OptimizerName = "paged_adamw8bit",
    gradient_checkpointing: bool = True,
    router_rank: int = 4,
    attention_rank: int = 0,
) -> None:
    """Decide which channels stay, from statistics; or count what a model takes, from its config alone. No weights.

    With `statistics` and `out` it writes a plan (JSON) for `prune`: at least one of `prune_ratio` or `keep_ratio`,
    `budget`, `stored_params` and `active`; several hold together. With `config_json` it says what the model takes,
    dense and cut: one of `ratio`, `keep_ratio` and `fit`.

    Args:
        statistics: File written by `calibrate`.
        out: Plan to write.
        prune_ratio: Share of routed-expert channels to remove, in [0, 1).
        keep_ratio: Share that stays, in (0, 1]: 1 - `prune_ratio`.
        budget: Bytes of the folder that `prune` will write, such as 11.5GB (KB, MB, GB: powers of 1000; KiB, MiB, GiB:
            of 1024; a whole number alone is bytes). Tensors and configs as they are stored, the tokenizer left out.
            Needs `model`.
        stored_params: Parameters of the whole model that stay, such as 3.2M or 16B. Needs `model`.
        active: Share of the routed-expert parameters a token uses on average that stays, in (0, 1].
        model: Folder, `asset:small_moe` or hub name of the calibrated model; only its `config.json` is read.
        bits: How `prune` will store it: 4 (`quantize: nf4`) or 16 (`quantize: none`).
        dtype: Type of the weights that stay unpacked, as for `prune`.
        method: `exact_global` or `channel_coverage` (ours), `paper_a`, `tb_coverage` (paper B); whole experts:
            `random`, `frequency`, `router_weight`, `router_probability`, `reap`, `man`, `msan`, `mone`, `aimer`,
            `expert_sparsity`; channels: `uniform`, `wanda`, `magnitude`, `camera`, `snip`, `taylor`, `u_shaped`,
            `loss_proportional`.
        method_args: Settings of the method, for example `{align: 64}`.
        corpora: Corpora that count; all of the file if not given.
        config_json: A `config.json`, or a folder, asset or hub name that has one. Every expert keeps the same width.
        ratio: Another name for `prune_ratio`.
        fit: With `config_json`, instead of a ratio: bytes of the folder, such as 10GB. Gives the smallest ratio.
        align: With `config_json`: widths are multiples of this (16 if not given).
        json: With `config_json`: file for the numbers.
        fit_training: With `config_json`: memory of a GPU, such as 24GB. Says which adapters a recovery run on the
            pruned model can have there, and what takes what; the six that follow belong to it.
        sequence_length: Tokens of a sequence.
        batch_size: Sequences of a micro-batch.
        optimizer: `adamw`, `adamw8bit` or `paged_adamw8bit`.
        gradient_checkpointing: Recompute each decoder layer in backward.
        router_rank: Rank of the router's adapters.
        attention_rank: Rank of the attention's, 0 for none.
    """
    asked, defaults = dict(locals()), {name: known.default for name, known in signature(plan).parameters.items()}
    given = {name: value for name, value in asked.items() if value != defaults[name]}
    if ratio is not None and prune_ratio is not None:
        raise ValueError(f"`ratio` and `prune_ratio` are one thing, got {ratio} and {prune_ratio}. Give one.")
    if ratio is not None:
        given["prune_ratio"] = given.pop("ratio")
    if config_json is not None:
        training = {name: asked[name] for name in _TRAINING} if fit_training is not None else {}
        known = {*signature(answer_from_config).parameters, *training}
        _check(given, known=known, mode="`config_json`")
        answer_from_config(**given | training)
        return
    _check(given, known=set(signature(plan_from_statistics).parameters), mode="`statistics`")
    if statistics is None or out is None:
        raise ValueError(
            "To make a plan name `statistics` (the file that `calibrate` wrote) and `out`; to count what a model takes "
            f"name its `config_json`. Got {', '.join(f'`{name}`' for name in given) or 'none of them'}."
        )
    plan_from_statistics(**given)


def _check(given: dict[str, Any], *, known: set[str], mode: str) -> None:
    """Refuses settings of the other mode."""
    foreign = [f"`{name}`" for name in given if name not in known]
    if foreign:
        raise ValueError(
            f"{', '.join(foreign)} cannot be had with {mode}: a plan is made from `statistics`, sizes are counted from "
            "a `config_json` alone, and the settings of a run need `fit_training` there. Leave out the others."
        )
