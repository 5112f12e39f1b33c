"""What is said of a finished export."""

from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, Self

from lightning_moe.export.comparing import Comparison
from lightning_moe.export.formats import ExportFormat
from lightning_moe.quantization.added_error import AddedError


@dataclass(frozen=True, kw_only=True)
class ExportResult:
    """One finished export.

    Args:
        format: which one.
        base: folder of the model.
        adapter: folder of the adapter, for `adapter`.
        bytes: bytes of its weights and configs; tokenizer, manifest and model card are left out.
        max_logit_diff: largest difference between the logits before and after the reload; None where the model is too
            large to compute them.
        median_logit_diff: the median over tokens of each token's largest difference.
        rerouted: share of tokens that go to other experts after the reload; None where experts are counted anew.
        engines: serving engines whose loaders' tensors and config fields are met; empty for our own formats.
        notes: what else there is to know.
        added_error: what 4 bit changed in the merged model, for `merged_nf4`.
    """

    format: ExportFormat
    base: str
    adapter: str | None
    bytes: int
    max_logit_diff: float | None
    median_logit_diff: float | None
    rerouted: float | None
    engines: tuple[str, ...] = ()
    notes: tuple[str, ...] = ()
    added_error: AddedError | None = None

    @property
    def path(self) -> str:
        """The folder of the whole export."""
        return str(Path(self.base).parent) if self.adapter else self.base

    def at(self, folder: Path) -> Self:
        """The same export after it was renamed to `folder`."""
        if self.adapter is None:
            return replace(self, base=str(folder))
        return replace(self, base=str(folder / "base"), adapter=str(folder / "adapter"))

    def to_dict(self) -> dict[str, Any]:
        """Plain types; `path` is the folder of the whole export."""
        return {"path": self.path} | asdict(self)

    def describe(self) -> str:
        """One line, and one for each note."""
        compared = ""
        if self.max_logit_diff is not None and self.median_logit_diff is not None:
            known = Comparison(
                max_logit_diff=self.max_logit_diff, median_logit_diff=self.median_logit_diff, rerouted=self.rerouted
            )
            compared = f", {known.describe()}"
        checked = f"; names and shapes as {' and '.join(self.engines)} look for them" if self.engines else ""
        added = () if self.added_error is None else (self.added_error.describe(),)
        lines = [f"{self.path}, {self.bytes / 1e6:.2f} MB{compared}{checked}", *added, *self.notes]
        return "\n  ".join(lines)
