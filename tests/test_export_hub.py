"""Uploads: checked before the work, made after it, and clear where they fail; nothing here leaves the machine."""

import logging
from pathlib import Path
from types import SimpleNamespace

import pytest
from huggingface_hub import HfApi
from huggingface_hub.errors import HTTPError
from random_plans import uniform_plan
from tiny_models import tiny_model

from lightning_moe.commands.exporting import export
from lightning_moe.export.hub import check_hub_name
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.surgery.cut import apply_plan


@pytest.fixture
def pruned(tmp_path):
    model = tiny_model()
    apply_plan(model, plan=uniform_plan(model, width=16))
    save_ragged(model, tmp_path / "pruned")
    return str(tmp_path / "pruned")


@pytest.fixture
def calls(monkeypatch):
    """What would have been sent."""
    made = []
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    monkeypatch.setattr(HfApi, "create_repo", lambda self, name, **settings: made.append((name, settings)))

    def upload(self, *, repo_id, folder_path, commit_message):
        made.append((repo_id, sorted(path.name for path in files_of(folder_path))))
        return SimpleNamespace(commit_url="where it is")

    monkeypatch.setattr(HfApi, "upload_folder", upload)
    return made


def files_of(folder):
    return Path(folder).iterdir()


def test_the_finished_folder_is_uploaded(pruned, calls, tmp_path, caplog):
    caplog.set_level(logging.INFO, logger="lightning_moe")
    export(model=pruned, out=str(tmp_path / "out"), formats=["uniform"], push_to_hub="owner/small", private=True)
    (created, settings), (uploaded, files) = calls
    assert created == uploaded == "owner/small"
    assert settings == {"private": True, "exist_ok": True}
    assert {"README.md", "manifest.json", "config.json", "model.safetensors.index.json"} <= set(files)
    assert "Uploaded: where it is" in caplog.text


def test_a_refusal_of_the_hub_is_one_line_and_the_files_stay(pruned, calls, tmp_path, monkeypatch):
    def refuse(self, name, **settings):
        raise HTTPError("403 Forbidden: no rights here.\n\nmore lines")

    monkeypatch.setattr(HfApi, "create_repo", refuse)
    with pytest.raises(ValueError, match=r"lies in '.*uniform', .* to 'owner/small': 403 .* here\. Check"):
        export(model=pruned, out=str(tmp_path / "out"), formats=["uniform"], push_to_hub="owner/small")
    assert (tmp_path / "out" / "uniform" / "README.md").is_file()


def test_no_network_is_said(pruned, calls, tmp_path, monkeypatch):
    def unreachable(self, name, **settings):
        raise ConnectionError

    monkeypatch.setattr(HfApi, "create_repo", unreachable)
    with pytest.raises(ValueError, match=r"could not be uploaded to 'owner/small': ConnectionError\. Check the name"):
        export(model=pruned, out=str(tmp_path / "out"), formats=["ragged"], push_to_hub="owner/small")


@pytest.mark.parametrize("name", ["small", "a/b/c", "owner/bad name", "-/x"])
def test_a_name_that_is_none_is_refused_before_the_work(name, pruned, calls, tmp_path):
    with pytest.raises(ValueError, match=f"`push_to_hub` must be `owner/name`, got '{name}'"):
        export(model=pruned, out=str(tmp_path / "out"), formats=["uniform"], push_to_hub=name)
    assert not (tmp_path / "out").exists()


def test_a_missing_token_is_refused_before_the_work(monkeypatch):
    monkeypatch.setattr("lightning_moe.export.hub.get_token", lambda: None)
    with pytest.raises(ValueError, match="needs an access token of the hub, and there is none"):
        check_hub_name("owner/small")


def test_one_format_at_a_time(pruned, calls, tmp_path):
    with pytest.raises(ValueError, match=r"uploads one format, got \['uniform', 'nf4'\]"):
        export(model=pruned, out=str(tmp_path / "out"), formats=["uniform", "nf4"], push_to_hub="owner/small")
    assert not calls
