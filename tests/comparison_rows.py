"""Rows as `compare` writes them, for tests of reports."""

from typing import Any

DENSE_NLL = 2.0


def dense_row(**fields: Any) -> dict[str, Any]:
    """The unpruned model: 2 nats per token, 10 MB, 2 million active parameters."""
    row = {"name": "dense", "method": "dense", "ratio": 0.0, "bits": 16, "repair": False, "sample": 0}
    row |= {"nll": DENSE_NLL, "nll_per_corpus": {"code": DENSE_NLL}, "stored_params": 5_000_000}
    return row | {"active_params": 2_000_000, "bytes": 10_000_000, "seconds": 0.0} | fields


def make_row(method: str, loss: float, *, sample: int = 0, **fields: Any) -> dict[str, Any]:
    """A row that loses `loss` nats per token above dense: ratio 0.5, 16 bit, not repaired, 5 MB, unless said."""
    row = dense_row() | {"method": method, "sample": sample, "nll": DENSE_NLL + loss, "ratio": 0.5}
    row |= {"name": f"{method}_{sample}_{len(fields)}", "nll_per_corpus": {"code": DENSE_NLL + loss}}
    return row | {"stored_params": 2_500_000, "active_params": 1_200_000, "bytes": 5_000_000} | fields
