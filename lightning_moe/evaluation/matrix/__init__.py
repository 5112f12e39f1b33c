"""Calibrate on one text, evaluate on every other: what a calibration corpus, its size and a method's settings decide.

`Matrix` says which cells, `MatrixRun` makes them, `write_matrix` and `matrix_tables` show them.
"""

from lightning_moe.evaluation.matrix.run import MatrixRun
from lightning_moe.evaluation.matrix.spec import Matrix, MatrixMethod
from lightning_moe.evaluation.matrix.tables import matrix_tables, write_matrix

__all__ = ["Matrix", "MatrixMethod", "MatrixRun", "matrix_tables", "write_matrix"]
