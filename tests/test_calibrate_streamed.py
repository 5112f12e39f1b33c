"""Calibration layer by layer gives what the whole model in memory gives, bit for bit."""

from functools import partial
from pathlib import Path

import pytest
import torch
from family_cases import CASES, Case
from tiny_models import random_tokens, tiny_model

from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.streamed import collect_streamed
from lightning_moe.models.loading import load_model
from lightning_moe.models.streaming import StockFolder
from lightning_moe.records import CalibrationStatistics
from lightning_moe.surgery.cut import convert_experts


@pytest.fixture(params=CASES, ids=lambda case: case.name)
def case(request) -> Case:
    return request.param


def padded(*, batch: int, length: int, seed: int, left: int = 0) -> dict[str, torch.Tensor]:
    ids = random_tokens(batch=batch, length=length, seed=seed)
    mask = torch.ones_like(ids)
    mask[0, length - 4 :] = 0
    mask[-1, :left] = 0
    return {"input_ids": ids, "attention_mask": mask}


def text() -> dict[str, list[dict[str, torch.Tensor]]]:
    """Two corpora, batches of unequal shape, padding on both sides, one batch without a mask."""
    code = [padded(batch=2, length=12, seed=1), padded(batch=3, length=9, seed=2, left=2)]
    return {"code": code, "prose": [{"input_ids": random_tokens(batch=1, length=20, seed=3)}]}


def whole(source: str, *, loaders=None, dtype="auto", stock: bool = False, **options) -> CalibrationStatistics:
    model = load_model(source, dtype=dtype)
    if not stock:
        convert_experts(model)
    return collect_statistics(model, loaders=loaders or text(), progress=False, **options)


def streamed(source: str, workspace: Path, *, loaders=None, dtype="auto", **options) -> CalibrationStatistics:
    folder = StockFolder(source, dtype=dtype)
    return collect_streamed(folder, loaders=loaders or text(), workspace=workspace, progress=False, **options)


def assert_equal(found: CalibrationStatistics, expected: CalibrationStatistics) -> None:
    assert found.shape == expected.shape
    assert list(found.corpora) == list(expected.corpora)
    pairs = [(found.corpora[corpus], layers) for corpus, layers in expected.corpora.items()]
    for layers, others in [*pairs, (found.weights, expected.weights)]:
        for index, (mine, theirs) in enumerate(zip(layers, others, strict=True)):
            assert set(mine) == set(theirs)
            for name in theirs:
                assert torch.equal(mine[name], theirs[name]), (index, name)


def assert_close(found: CalibrationStatistics, expected: CalibrationStatistics, *, rtol: float) -> None:
    for corpus, layers in expected.corpora.items():
        for mine, theirs in zip(found.corpora[corpus], layers, strict=True):
            for name in theirs:
                scale = float(theirs[name].abs().max())
                named = partial("{}: {}".format, name)
                torch.testing.assert_close(mine[name], theirs[name], rtol=rtol, atol=rtol * scale, msg=named)


def test_every_family_bit_for_bit(case, tmp_path) -> None:
    case.model().save_pretrained(tmp_path / "model", max_shard_size="60KB")
    source = str(tmp_path / "model")
    found = streamed(source, tmp_path / "work")
    assert_equal(found, whole(source))
    assert_close(found, whole(source, stock=True), rtol=1e-6)
    assert found.digest == whole(source).digest


@pytest.mark.parametrize("moments", [False, True])
def test_bfloat16_without_moments(moments, tmp_path) -> None:
    tiny_model("deepseek_v2", dtype=torch.bfloat16).save_pretrained(tmp_path / "model")
    source = str(tmp_path / "model")
    assert_equal(streamed(source, tmp_path / "work", moments=moments), whole(source, moments=moments))


def test_dense_layers_between_the_others(tmp_path) -> None:
    tiny_model(num_hidden_layers=4, mlp_only_layers=[0, 2]).save_pretrained(tmp_path / "model")
    source = str(tmp_path / "model")
    assert_equal(streamed(source, tmp_path / "work"), whole(source))


def test_another_type_than_the_stored_one(tmp_path) -> None:
    tiny_model().save_pretrained(tmp_path / "model")
    source = str(tmp_path / "model")
    assert_equal(streamed(source, tmp_path / "work", dtype="bfloat16"), whole(source, dtype="bfloat16"))
