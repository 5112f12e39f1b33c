"""What `summary.json` of a run says, checked once and typed, for tables and figures."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any, Self

from lightning_moe.reporting.checks import check_count, check_known, check_mapping, check_number, check_rows

UNPRUNED, OURS, OURS_NF4, RECOVERED = "unpruned", "ours, 16 bit", "ours, NF4", "ours, NF4, recovered"
CONTROL, PAPER_A, BASELINES = "control", "paper A", "other baselines"
GROUPS = (UNPRUNED, OURS, OURS_NF4, RECOVERED, CONTROL, PAPER_A, BASELINES)

# The first beginning that fits decides; a stage of any other name is somebody's baseline.
_GROUP_OF_PREFIX = {"recovered": RECOVERED, "cut": OURS, "paper_a": PAPER_A, "dense": UNPRUNED}


@dataclass(frozen=True, kw_only=True)
class Result:
    """One evaluated model.

    Args:
        name: Of the stage.
        group: One of `GROUPS`.
        prune_ratio: Share of routed-expert channels that is gone, in [0, 1).
        nll: Mean negative log-likelihood in nats per token; NaN or infinite where the model broke.
        nll_per_corpus: The same per corpus.
        bytes: Of the files on disk that were evaluated.
        stored_params: Parameters of those files.
        active_params: Parameters that one token uses.
        seconds: That the stage took.
    """

    name: str
    group: str
    prune_ratio: float
    nll: float
    nll_per_corpus: Mapping[str, float]
    bytes: int | None
    stored_params: int | None
    active_params: int | None
    seconds: float | None


@dataclass(frozen=True, kw_only=True)
class Export:
    """One exported folder or file: where, in which format, how many bytes, and how far its logits are off.

    The largest difference is often that of one token which goes to other experts: see the median and `rerouted`, the
    share of such tokens.
    """

    path: str
    format: str
    bytes: int | None
    max_logit_diff: float | None
    median_logit_diff: float | None = None
    rerouted: float | None = None


@dataclass(frozen=True, kw_only=True)
class Summary:
    """All results of one run.

    Args:
        dense: The model as it came.
        others: Further results, in the order of the tables: other unpruned models, stages, and the control at the end.
        exports: What was written and loaded again.
        gap_closed: Recovered stage -> percent of its one-shot loss gap to the control that recovery closed.
        versions: Package -> version.
    """

    dense: Result
    others: tuple[Result, ...] = ()
    exports: tuple[Export, ...] = ()
    gap_closed: Mapping[str, float] = field(default_factory=dict)
    versions: Mapping[str, str] = field(default_factory=dict)

    @property
    def results(self) -> tuple[Result, ...]:
        """All results, the dense one first."""
        return (self.dense, *self.others)

    def loss(self, result: Result) -> float:
        """Loss above dense in nats per token."""
        return result.nll - self.dense.nll

    def smaller(self, num_bytes: int | None) -> float | None:
        """How many times fewer bytes than the dense model; nothing where either is not known."""
        return self.dense.bytes / num_bytes if num_bytes and self.dense.bytes else None

    def find(self, name: str) -> Result | None:
        """The result of that name, if there is one."""
        return next((result for result in self.results if result.name == name), None)

    @classmethod
    def from_dict(cls, content: object) -> Self:
        """Reads the dictionary of `summary.json`; unknown keys are left alone, other unpruned results are taken along.

        Args:
            content: `{"dense": {"nll", ...}, "stages": [{"name", "prune_ratio", "nll", ...}], "control": {"nll"},
                "exports": [{"path", "format", "bytes", "max_logit_diff"}], "recovery": {"gap_closed_percent"},
                "versions": {}}`; only `dense` is needed, and of each result only `nll` (and a stage's `name` and
                `prune_ratio`).

        Raises:
            ValueError: something is missing or is no number; the message names the place.
        """
        whole = check_mapping(content, where="The summary")
        if whole.get("dense") is None:
            raise ValueError(
                "The report compares with a row named `dense`, and there is none: run `evaluate --name dense` on the "
                "unpruned model."
            )
        named = {key: value for key, value in whole.items() if isinstance(value, Mapping) and "nll" in value}
        control = {"control": named.pop("control")} if "control" in named else {}
        named.pop("dense", None)
        stages = [_stage(row, index=index) for index, row in enumerate(check_rows(whole, key="stages"))]
        others = [
            *(_result(row, name=name, group=UNPRUNED) for name, row in named.items()),
            *stages,
            *(_result(row, name=name, group=CONTROL) for name, row in control.items()),
        ]
        summary = cls(
            dense=_result(whole["dense"], name="dense", group=UNPRUNED),
            others=tuple(others),
            exports=tuple(_export(row, index=index) for index, row in enumerate(check_rows(whole, key="exports"))),
            gap_closed=_gap_closed(whole),
            versions={
                str(key): str(value)
                for key, value in check_mapping(whole.get("versions", {}), where="'versions' of the summary").items()
            },
        )
        summary._check_names()
        return summary

    def _check_names(self) -> None:
        names = [result.name for result in self.results]
        twice = sorted({name for name in names if names.count(name) > 1})
        if twice:
            raise ValueError(f"Every result of a summary needs its own name, got {twice} more than once.")


def _result(content: object, *, name: str, group: str) -> Result:
    where = repr(name)
    row = check_mapping(content, where=where)
    corpora_where = f"'nll_per_corpus' of {where}"
    corpora = check_mapping(row.get("nll_per_corpus", {}), where=corpora_where)
    prune_ratio = check_known(row, key="prune_ratio", where=where) or 0.0
    if prune_ratio >= 1:
        raise ValueError(f"'prune_ratio' of {where} must be in [0, 1), got {prune_ratio}.")
    return Result(
        name=name,
        group=group,
        prune_ratio=prune_ratio,
        nll=check_number(row, key="nll", where=where),
        nll_per_corpus={str(corpus): check_number(corpora, key=corpus, where=corpora_where) for corpus in corpora},
        bytes=check_count(row, key="bytes", where=where),
        stored_params=check_count(row, key="stored_params", where=where),
        active_params=check_count(row, key="active_params", where=where),
        seconds=check_known(row, key="seconds", where=where),
    )


def _stage(content: object, *, index: int) -> Result:
    row = check_mapping(content, where=f"Stage {index}")
    name = row.get("name")
    if not isinstance(name, str) or not name:
        raise ValueError(f"Stage {index} of the summary needs a 'name', got {name!r}.")
    check_number(row, key="prune_ratio", where=repr(name))
    return _result(row, name=name, group=_group(name))


def _group(name: str) -> str:
    group = next((group for prefix, group in _GROUP_OF_PREFIX.items() if name.startswith(prefix)), BASELINES)
    return OURS_NF4 if group == OURS and "nf4" in name else group


def _export(content: object, *, index: int) -> Export:
    where = f"export {index}"
    row = check_mapping(content, where=where.capitalize())
    return Export(
        path=str(row.get("path", "-")),
        format=str(row.get("format", "-")),
        bytes=check_count(row, key="bytes", where=where),
        max_logit_diff=check_known(row, key="max_logit_diff", where=where),
        median_logit_diff=check_known(row, key="median_logit_diff", where=where),
        rerouted=check_known(row, key="rerouted", where=where),
    )


def _gap_closed(whole: Mapping[str, Any]) -> dict[str, float]:
    recovery = check_mapping(whole.get("recovery", {}), where="'recovery' of the summary")
    closed = recovery.get("gap_closed_percent", {})
    by_stage = closed if isinstance(closed, Mapping) else {"recovery": closed}
    return {str(stage): check_number(by_stage, key=stage, where="'gap_closed_percent'") for stage in by_stage}
