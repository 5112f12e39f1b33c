"""`fit --ckpt_path`: Lightning's command line reads the file before the trainer does, and takes a class from it."""

import sys

import pytest
import torch
from tiny_runs import save_model

from lightning_moe import cli

CONTENT = {"pytorch-lightning_version": "2.6.6", "state_dict": {}, "callbacks": {}, "loops": {}}


class Run:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return open, (str(self.path), "w")


def told(folder, capsys, *flags):
    """The line in which `fit` ends, its only one."""
    flags = ["--model", "LanguageModelModule", "--model.source", save_model(folder / "model"), *flags]
    corpora = ["--data.tokenizer", "asset:small_moe", "--data.sequence_length", "32"]
    with pytest.raises(SystemExit) as ended:
        cli.main(["fit", *flags, *corpora, "--ckpt_path", str(folder / "a.ckpt")])
    error = capsys.readouterr().err.strip().splitlines()
    assert ended.value.code == 1
    assert error[-1].startswith("python -m lightning_moe: fit: ")
    assert not [line for line in error if "Traceback" in line]
    return error[-1]


def whole(path):
    torch.save(CONTENT | {"state_dict": {"weight": torch.zeros(1000)}}, path)
    return path.read_bytes()


@pytest.mark.parametrize(
    ("damage", "match"),
    [
        (lambda whole: b"", "it is no checkpoint of PyTorch"),
        (lambda whole: whole[: len(whole) // 2], "it is no checkpoint of PyTorch"),
        (lambda whole: b"\x80\x04N.", "it is no checkpoint of PyTorch"),
    ],
    ids=["empty", "half", "pickle"],
)
def test_a_damaged_file_is_one_line(tmp_path, capsys, damage, match):
    (tmp_path / "a.ckpt").write_bytes(damage(whole(tmp_path / "a.ckpt")))
    line = told(tmp_path, capsys)
    assert f"a.ckpt' cannot be read: {match}" in line
    assert "Resume from an older one." in line


@pytest.mark.parametrize("content", [[1, 2], {"state_dict": {}}, CONTENT | {"hyper_parameters": [1]}])
def test_a_file_that_is_no_checkpoint_is_one_line(tmp_path, capsys, content):
    torch.save(content, tmp_path / "a.ckpt")
    line = told(tmp_path, capsys)
    assert "is no checkpoint: Lightning did not write it" in line or "`hyper_parameters` in it is no mapping" in line


def test_code_in_it_is_not_run(tmp_path, capsys):
    torch.save(CONTENT | {"hyper_parameters": {"source": Run(tmp_path / "ran")}}, tmp_path / "a.ckpt")
    assert "a.ckpt' cannot be read as data" in told(tmp_path, capsys)
    assert not (tmp_path / "ran").exists()


def test_a_class_that_it_names_is_not_imported(tmp_path, capsys, monkeypatch):
    (tmp_path / "planted_module.py").write_text("raise SystemExit('ran')")
    monkeypatch.syspath_prepend(tmp_path)
    settings = {"_class_path": "planted_module.Evil", "_instantiator": "lightning.pytorch.cli.instantiate_module"}
    torch.save(CONTENT | {"hyper_parameters": settings}, tmp_path / "a.ckpt")
    line = told(tmp_path, capsys)
    assert "names the class 'planted_module.Evil', and `model` is 'lightning_moe.training.module.Lang" in line
    assert "A checkpoint does not choose the code that runs" in line
    assert "planted_module" not in sys.modules
