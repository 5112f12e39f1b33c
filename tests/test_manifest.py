"""The manifest of an export: what it states, how it is carried on, and damage that is refused."""

import json

import pytest
import torch
from random_plans import random_plan, uniform_plan
from tiny_models import tiny_model

import lightning_moe
from lightning_moe.export.deploy import export_model
from lightning_moe.export.manifest import MANIFEST_NAME, PlanOrigin, read_manifest, write_manifest
from lightning_moe.models.loading import load_model
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import apply_plan


@pytest.fixture
def exported(tmp_path):
    """A ragged export and its plan."""
    model = tiny_model()
    found = random_plan(model)
    provenance = {"corpora": "code, glosses", "statistics": "5" * 64}
    plan = PrunePlan(
        shape=found.shape, method="random", prune_ratio=0.5, align=1, keep=found.keep, provenance=provenance
    )
    apply_plan(model, plan=plan)
    export_model(model, folder=tmp_path, formats=["ragged"], source="asset:small_moe", plans=[plan])
    return tmp_path / "ragged", plan


def test_it_states_what_the_folder_is(exported):
    folder, plan = exported
    manifest = read_manifest(folder)
    assert manifest is not None
    assert (manifest.format, manifest.source, manifest.base_model) == ("ragged", "asset:small_moe", "asset:small_moe")
    assert manifest.plans == (
        PlanOrigin(
            digest=plan.digest,
            method="random",
            prune_ratio=plan.achieved_prune_ratio,
            corpora="code, glosses",
            statistics="5" * 64,
        ),
    )
    assert manifest.versions["lightning_moe"] == lightning_moe.__version__
    assert set(manifest.versions) == {"lightning_moe", "torch", "transformers", "bitsandbytes", "peft"}
    assert manifest.files == {
        file.name: file.stat().st_size for file in folder.iterdir() if file.name not in (MANIFEST_NAME, "README.md")
    }
    assert manifest.bytes == sum(manifest.files.values())
    model = load_model(str(folder))
    assert manifest.stored_params == sum(parameter.numel() for parameter in model.parameters())
    # Two of eight experts per token: a quarter of what all experts hold is used on average.
    experts = sum(parameter.numel() for name, parameter in model.named_parameters() if ".experts." in name)
    assert manifest.active_params == pytest.approx(manifest.stored_params - 0.75 * experts)
    assert manifest.bits == {"experts": 32, "linears": 32, "embeddings": 32}
    assert manifest.max_logit_diff == 0


def test_a_pruned_folder_is_the_source_of_what_is_made_of_it(exported, tmp_path):
    folder, first = exported
    model = load_model(str(folder))
    second = uniform_plan(model, width=1)
    apply_plan(model, plan=second)
    export_model(model, folder=tmp_path / "again", formats=["nf4"], source=str(folder), plans=[second])
    manifest = read_manifest(tmp_path / "again" / "nf4")
    assert manifest is not None
    assert (manifest.source, manifest.base_model) == (str(folder), "asset:small_moe")
    assert [plan.digest for plan in manifest.plans] == [first.digest, second.digest]
    assert manifest.plans[1].corpora == manifest.plans[1].statistics == ""
    assert manifest.bits == {"experts": 4, "linears": 4, "embeddings": 32}


def test_dropped_tensors_are_listed_once_and_carried_on(exported, tmp_path):
    folder, _ = exported
    model = load_model(str(folder))
    write_manifest(folder, format="ragged", source="asset:small_moe", model=model, dropped=["mtp.0", "mtp.1"])
    model.save_pretrained(tmp_path / "next")
    made = write_manifest(tmp_path / "next", format="ragged", source=str(folder), model=model, dropped=["mtp.1", "x"])
    assert made.dropped == ("mtp.0", "mtp.1", "x")
    assert made.max_logit_diff is None
    assert read_manifest(tmp_path / "next") == made


def test_only_the_structure_is_counted(tmp_path):
    tiny_model().save_pretrained(tmp_path)
    whole = write_manifest(tmp_path, format="stock", source="asset:small_moe", model=tiny_model())
    with torch.device("meta"):
        model = type(tiny_model())(tiny_model().config)
    assert write_manifest(tmp_path, format="stock", source="asset:small_moe", model=model) == whole


def test_a_folder_without_one_has_none(tmp_path):
    assert read_manifest(tmp_path) is None
    assert read_manifest("somebody/model") is None


@pytest.mark.parametrize(
    ("change", "match"),
    [
        ({"kind": "shopping list"}, "must hold an export manifest of version 1, got {'kind': 'shopping list'"),
        ({"version": 9}, "'version': 9}. Export again"),
        ({"colour": "red"}, r"fields \['colour'\] are missing or unknown"),
        ({"format": 3}, "`format` cannot be 3"),
        ({"files": {"a": -1}}, "`files` cannot be {'a': -1}"),
        ({"files": []}, r"`files` cannot be \[\]"),
        ({"plans": [{"digest": "x"}]}, "`plans` cannot be"),
        ({"max_logit_diff": True}, "`max_logit_diff` cannot be True"),
        ({"dropped": [1]}, r"`dropped` cannot be \[1\]"),
        ({"bytes": 5}, "`bytes` is 5, and its files do not add up to that"),
    ],
)
def test_damage_is_refused_by_name(change, match, exported):
    folder, _ = exported
    file = folder / MANIFEST_NAME
    file.write_text(json.dumps(json.loads(file.read_text()) | change))
    with pytest.raises(ValueError, match=match):
        read_manifest(folder)


def test_a_manifest_that_is_no_json_or_no_mapping_is_refused(exported):
    folder, _ = exported
    (folder / MANIFEST_NAME).write_text("{")
    with pytest.raises(ValueError, match="not a readable export manifest"):
        read_manifest(folder)
    (folder / MANIFEST_NAME).write_text("[]")
    with pytest.raises(ValueError, match=r"must hold an export manifest of version 1, got \[\]"):
        read_manifest(folder)


def test_weights_that_it_does_not_describe_are_refused(exported, tmp_path):
    folder, _ = exported
    (folder / "notes.txt").write_text("may be added")
    assert read_manifest(folder) is not None
    with (folder / "model.safetensors").open("ab") as file:
        file.write(b" ")
    with pytest.raises(ValueError, match=r"'model.safetensors' has \d+ bytes, it says \d+. .* delete manifest.json"):
        read_manifest(folder)
    (folder / "model.safetensors").unlink()
    with pytest.raises(ValueError, match=r"'model\.safetensors' has None bytes"):
        write_manifest(folder, format="nf4", source=str(folder), model=tiny_model())
