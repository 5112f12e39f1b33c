"""Rows kept on disk and found again by what decided them."""

import logging
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from lightning_moe.evaluation.compare.rows import Row
from lightning_moe.evaluation.stages import load_row, save_stage, stage_files

log = logging.getLogger(__name__)


class RowBook:
    """Rows as `<folder>/stages/<name>.json`, each with the digest of what decided it and of the dense model.

    Args:
        folder: of results.
        model: digest of the dense model.

    Raises:
        ValueError: the folder holds rows of another model.
    """

    def __init__(self, folder: Path, *, model: str) -> None:
        self.folder = folder
        self.model = model
        self._rows: dict[str, Row] = {}
        for file in stage_files(folder):
            self._remember(load_row(file))

    def _remember(self, row: Row) -> None:
        if "model" in row and row["model"] != self.model:
            raise ValueError(
                f"'{self.folder}' holds rows of another model: '{row['name']}' is of {row['model']}, this is "
                f"{self.model}. Give another `out`, or delete that folder."
            )
        if "digest" in row:
            self._rows.setdefault(row["digest"], row)

    def find(self, columns: Mapping[str, Any], *, digest: str) -> Row | None:
        """A row that the same things decided, written again under the name in `columns`; None if there is none."""
        row = self._rows.get(digest)
        return None if row is None else self._write(columns, row, digest=digest)

    def add(self, columns: Mapping[str, Any], measured: Row, *, digest: str) -> Row:
        """A new row.

        Args:
            columns: what the row says about itself; it wins over what was measured.
            measured: see `evaluate_stage`.
            digest: of everything that decides the row but its name.
        """
        row = self._write(columns, measured, digest=digest)
        self._rows[digest] = row
        seconds = row["seconds"] + row["seconds_evaluation"]
        log.info("%s: %.4f nats per token, %.1f s.", row["name"], row["nll"], seconds)
        return row

    def _write(self, columns: Mapping[str, Any], row: Row, *, digest: str) -> Row:
        rest = {key: value for key, value in row.items() if key not in columns}
        signed = {**columns, **rest, "model": self.model, "digest": digest}
        save_stage(self.folder, stage=signed)
        return signed
