"""The part of `compare` that calibrates on one corpus and evaluates on the others."""

import logging
from pathlib import Path

from lightning_moe.commands._shared import Device, held_out, resolve_device
from lightning_moe.evaluation.matrix import Matrix, MatrixRun, matrix_tables, write_matrix
from lightning_moe.models.loading import DtypeName
from lightning_moe.progress import quiet
from lightning_moe.training.data import TextDataModule

log = logging.getLogger(__name__)


def run_matrix(
    matrix: Matrix | bool,
    *,
    model: str,
    out: Path,
    data: TextDataModule,
    reuse: bool,
    dtype: DtypeName,
    device: Device,
) -> None:
    """Makes a matrix (True: the default one) of the data's calibration and validation corpora, writes and logs it.

    Raises:
        ValueError: there are no corpora, or see `MatrixRun.run`.
    """
    rows = data.rows("calibration")
    if not rows:
        raise ValueError("`matrix` needs `data.calibration` corpora, got none: name the texts to calibrate on.")
    run = MatrixRun(
        source=model,
        matrix=matrix if isinstance(matrix, Matrix) else Matrix(),
        rows=rows,
        held_out=held_out(data),
        out=out,
        batch_size=data.calibration_batch_size,
        dtype=dtype,
        device=resolve_device(device),
        reuse=reuse,
    )
    with quiet("lightning_moe.surgery", "lightning_moe.calibration"):
        made = run.run()
    write_matrix(out, made)
    log.info("%s\n\nRows: %s", matrix_tables(made), out / "matrix.json")
