"""`export [nf4]` of a stock folder: shard by shard, compared with its source, and with what memory would hold."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from tiny_models import tiny_model

from lightning_moe.commands.exporting import export
from lightning_moe.export import streamed
from lightning_moe.export.deploy import export_model
from lightning_moe.export.manifest import read_manifest
from lightning_moe.export.streamed import export_streamed
from lightning_moe.export.streaming import prune_folder


@pytest.fixture
def stock(tmp_path):
    tiny_model("deepseek_v3").save_pretrained(tmp_path / "stock")
    return str(tmp_path / "stock")


def stored(folder):
    return {name: value for file in Path(folder).glob("*.safetensors") for name, value in load_file(file).items()}


def test_it_is_the_export_of_the_whole_model(stock, tmp_path):
    export(model=stock, out=str(tmp_path / "streamed"), formats=["nf4"])
    export_model(tiny_model("deepseek_v3"), folder=tmp_path / "whole", formats=["nf4"], source=stock)
    found, expected = stored(tmp_path / "streamed" / "nf4"), stored(tmp_path / "whole" / "nf4")
    assert found.keys() == expected.keys()
    assert all(torch.equal(found[name], expected[name]) for name in expected)
    row = json.loads((tmp_path / "streamed" / "exports.json").read_text())
    assert row[0]["max_logit_diff"] == row[0]["rerouted"] == 0
    assert "every tensor bit for bit, with a decoder layer or the embeddings in memory" in row[0]["notes"][0]
    assert "GB; and the logits, with the packed model in memory" in row[0]["notes"][0]
    one, other = [read_manifest(tmp_path / name / "nf4") for name in ("streamed", "whole")]
    assert one is not None
    assert other is not None
    assert (one.stored_params, one.active_params, one.bits) == (other.stored_params, other.active_params, other.bits)
    assert one.source == one.base_model == stock
    assert row[0]["bytes"] == one.bytes == sum(one.files.values())
    assert "bit for bit" in (tmp_path / "streamed" / "nf4" / "README.md").read_text()


def test_a_model_that_does_not_fit_is_compared_without_logits(stock, tmp_path, monkeypatch):
    monkeypatch.setattr(streamed, "available_memory", lambda: 10_000)
    result = export_streamed(stock, folder=tmp_path)
    assert result.max_logit_diff is result.median_logit_diff is result.rerouted is None
    assert "not its logits, which would take the packed model in memory" in result.notes[0]
    assert "logit difference" not in result.describe()
    manifest = read_manifest(tmp_path / "nf4")
    assert manifest is not None
    assert manifest.max_logit_diff is None
    assert "Loaded again after writing" not in (tmp_path / "nf4" / "README.md").read_text()


@pytest.mark.parametrize(
    ("edit", "match"),
    [
        (
            lambda name, value: value ^ 1 if "experts.down_proj" in name and value.dtype == torch.uint8 else value,
            r"'model\.layers\.1\.mlp\.experts\.down_proj\..*' differs from the packed source",
        ),
        (lambda name, value: value + 1 if name == "model.norm.weight" else value, r"'model\.norm\.weight' differs"),
    ],
)
def test_a_bit_that_is_not_the_sources_is_found(edit, match, stock, tmp_path, monkeypatch):
    def sabotaged(*args, out, **settings):
        prune_folder(*args, out=out, **settings)
        for file in Path(out).glob("*.safetensors"):
            tensors = {name: edit(name, value) for name, value in load_file(file).items()}
            save_file(tensors, file, metadata={"format": "pt"})

    monkeypatch.setattr(streamed, "prune_folder", sabotaged)
    with pytest.raises(ValueError, match=match):
        export_streamed(stock, folder=tmp_path)


def test_a_tensor_too_many_is_found(stock, tmp_path, monkeypatch):
    def sabotaged(*args, out, **settings):
        prune_folder(*args, out=out, **settings)
        file = Path(out) / "model-00001-of-00004.safetensors"
        save_file(load_file(file) | {"extra": torch.zeros(1)}, file, metadata={"format": "pt"})

    monkeypatch.setattr(streamed, "prune_folder", sabotaged)
    with pytest.raises(ValueError, match=r"extra"):
        export_streamed(stock, folder=tmp_path)


def test_something_else_is_not_replaced(stock, tmp_path):
    (tmp_path / "nf4").mkdir()
    (tmp_path / "nf4" / "thesis.tex").write_text("years of work")
    with pytest.raises(ValueError, match="holds something other than a model and would be replaced"):
        export_streamed(stock, folder=tmp_path)
