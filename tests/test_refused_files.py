"""Configs, checkpoints and tokenizers that are refused, each by the reason that is told."""

import json
import shutil
import zipfile

import pytest
import torch
from transformers import Qwen2MoeForCausalLM

from lightning_moe.assets import asset_path
from lightning_moe.cli import main
from lightning_moe.training.checkpoint_files import read_checkpoint
from lightning_moe.training.tokenization import load_tokenizer


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("[1, 2]\n", "it is no mapping of settings"),
        ("model:\n", "its only key has no value"),
        ("grid: evil.Evil\n", r"line 1: `grid` takes fields as a mapping, got 'evil.Evil'"),
    ],
)
def test_a_config_that_is_none(tmp_path, capsys, text, reason):
    (tmp_path / "config.yaml").write_text(text)
    with pytest.raises(SystemExit) as stop:
        main(["compare", "--config", str(tmp_path / "config.yaml")])
    assert stop.value.code == 2
    assert f"config.yaml' cannot be read: {reason}. " in capsys.readouterr().err


def test_an_archive_that_pytorch_did_not_write(tmp_path):
    path = tmp_path / "packed.ckpt"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("archive/data.pkl", bytes(10**6))
    assert path.stat().st_size < 10**4
    with pytest.raises(ValueError, match="it has compressed members, which PyTorch never writes") as refused:
        read_checkpoint(path)
    assert "packed.ckpt'" in str(refused.value)


def test_an_archive_whose_members_share_bytes(tmp_path):
    path = tmp_path / "shared.ckpt"
    torch.save({"pytorch-lightning_version": "2.6.0", "state_dict": {"weight": torch.zeros(4096)}}, path)
    with zipfile.ZipFile(path, "a") as archive:
        largest = max(archive.infolist(), key=lambda member: member.file_size)
        archive.filelist += [largest] * 3
        archive.writestr("archive/last", b"")  # makes it write the list of members anew
    with pytest.raises(ValueError, match="its members are larger than the file") as refused:
        read_checkpoint(path)
    assert "shared.ckpt'" in str(refused.value)


@pytest.mark.parametrize("file", ["tokenizer_config.json", "config.json"])
def test_a_tokenizer_class_that_is_a_model_s_is_not_loaded(tmp_path, monkeypatch, file):
    folder = shutil.copytree(asset_path("small_moe"), tmp_path / "own")
    for name in ("tokenizer_config.json", "config.json"):
        config = json.loads((folder / name).read_text())
        config.pop("tokenizer_class", None)
        config |= {"tokenizer_class": "Qwen2MoeForCausalLM"} if name == file else {}
        (folder / name).write_text(json.dumps(config))
    monkeypatch.setattr(Qwen2MoeForCausalLM, "from_pretrained", lambda *_, **__: pytest.fail("a model was loaded"))
    reason = "`tokenizer_class` is Qwen2MoeForCausalLM, which is no tokenizer"
    with pytest.raises(ValueError, match=rf"No tokenizer found at .*own' \({reason}\)"):
        load_tokenizer(str(folder))
