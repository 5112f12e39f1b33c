"""Model cards: what they say, for the hub and for people, and whose they are."""

import pytest
from huggingface_hub.repocard import metadata_load
from random_plans import uniform_plan
from tiny_models import tiny_model

from lightning_moe.export.deploy import export_model
from lightning_moe.export.manifest import read_manifest
from lightning_moe.export.model_card import write_card
from lightning_moe.models.loading import load_model
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import apply_plan

ROWS = [
    {"name": "dense", "prune_ratio": 0.0, "nll": 3.0, "nll_per_corpus": {"code": 2.5, "math": 3.5}, "bytes": 2_000_000},
    {"name": "half", "prune_ratio": 0.5, "nll": 3.25, "nll_per_corpus": {"code": 2.75}, "stored_params": 140_000},
]


def cut_model():
    model = tiny_model()
    found = uniform_plan(model, width=16)
    plan = PrunePlan(
        shape=found.shape,
        method="uniform",
        prune_ratio=0.5,
        align=16,
        keep=found.keep,
        provenance={"corpora": "code, math"},
    )
    apply_plan(model, plan=plan)
    return model, plan


def card_of(tmp_path, format, *, source="owner/dense", rows=()):
    model, plan = cut_model()
    export_model(model, folder=tmp_path, formats=[format], source=source, plans=[plan], results=rows)
    return tmp_path / format / "README.md"


def test_a_stock_export_says_so_and_shows_the_results(tmp_path):
    card = card_of(tmp_path, "uniform", rows=ROWS)
    assert metadata_load(card) == {
        "base_model": "owner/dense",
        "library_name": "transformers",
        "pipeline_tag": "text-generation",
        "tags": ["mixture-of-experts", "lightning_moe", "pruned"],
    }
    text = card.read_text()
    assert "\n# dense, uniform\n" in text
    assert "- 50.0% of the routed experts' channels went, chosen by `uniform`, calibrated on code, math" in text
    assert "loads with transformers alone" in text
    assert "import lightning_moe" not in text
    assert "| dense |        0.00 |           3.0000 | 2.00 |             - |             - | 2.5000 | 3.5000 |" in text
    assert "| half  |        0.50 |           3.2500 |    - |       140,000 |             - | 2.7500 |      - |" in text
    manifest = read_manifest(card.parent)
    assert manifest is not None
    assert f"{manifest.bytes:,} bytes" in text
    assert "README.md" not in manifest.files


def test_a_ragged_export_says_what_it_needs(tmp_path):
    text = card_of(tmp_path, "nf4", source="asset:small_moe").read_text()
    assert "loads after `import lightning_moe` and not without" in text
    assert "```python\nimport lightning_moe\nfrom transformers import" in text
    assert "experts 4, linears 4, embeddings 32" in text
    metadata = metadata_load(tmp_path / "nf4" / "README.md")
    assert metadata is not None
    assert "base_model" not in metadata  # no name on the hub
    assert metadata["tags"][-1] == "nf4"
    assert "## Results" not in text


def test_the_snippet_of_a_card_runs(tmp_path, monkeypatch):
    text = card_of(tmp_path, "ragged").read_text()
    code = text.split("```python\n")[1].split("```")[0]
    lines = [line for line in code.splitlines() if not line.startswith("tokenizer")]  # this export has none
    monkeypatch.chdir(tmp_path / "ragged")
    found = {}
    exec("\n".join(lines), found)
    assert sum(p.numel() for p in found["model"].parameters()) == read_manifest(tmp_path / "ragged").stored_params


def test_the_licence_comes_from_the_sources_own_card(tmp_path):
    (tmp_path / "dense").mkdir()
    (tmp_path / "dense" / "README.md").write_text("---\nlicense: apache-2.0\n---\n# Dense\n")
    card = card_of(tmp_path, "ragged", source=str(tmp_path / "dense"))
    metadata = metadata_load(card)
    assert metadata is not None
    assert metadata["license"] == "apache-2.0"
    (tmp_path / "dense" / "README.md").write_text("# Dense\n")
    metadata = metadata_load(card_of(tmp_path, "uniform", source=str(tmp_path / "dense")))
    assert metadata is not None
    assert "license" not in metadata


def test_a_card_of_ours_is_written_again_and_one_of_a_person_stays(tmp_path):
    card = card_of(tmp_path, "ragged")
    assert "## Results" not in card.read_text()
    card = card_of(tmp_path, "ragged", rows=ROWS)
    assert "## Results" in card.read_text()
    edited = card.read_text().replace("## Results", "## My results")
    card.write_text(edited)
    model, plan = cut_model()
    (result,) = export_model(model, folder=tmp_path, formats=["ragged"], plans=[plan])
    assert card.read_text() == edited
    assert result.notes == (f"{card} was written or edited by a person and stays as it was",)
    assert result.notes[0] in result.describe()


def test_a_persons_card_survives_an_export_that_fails(tmp_path, monkeypatch):
    card = card_of(tmp_path, "ragged")
    card.write_text("mine")
    model, _ = cut_model()
    model.get_output_embeddings().weight.data[7] = float("nan")
    with pytest.raises(ValueError, match="logits differ by nan"):
        export_model(model, folder=tmp_path, formats=["ragged"])
    assert card.read_text() == "mine"


def test_an_uncut_model_and_dropped_tensors_are_said(tmp_path):
    export_model(tiny_model(), folder=tmp_path, formats=["stock"], source="owner/dense")
    manifest = read_manifest(tmp_path / "stock")
    assert manifest is not None
    changed = type(manifest)(**(vars(manifest) | {"dropped": ("mtp.0",), "max_logit_diff": None}))
    write_card(tmp_path / "stock", manifest=changed, notes=["it is small"])
    text = (tmp_path / "stock" / "README.md").read_text()
    assert "Nothing: all channels of all experts are here." in text
    assert "\nLeft out, as no part of the model: 1 tensors. Written with" in text
    assert "Note: it is small." in text


def test_a_cut_that_no_plan_records_is_said_all_the_same(tmp_path):
    """Through the Python API without plans; and from a folder that `save_pretrained` wrote, without a manifest."""
    for format in ("ragged", "uniform"):
        model, _ = cut_model()
        export_model(model, folder=tmp_path, formats=[format], source="owner/dense")
        text = (tmp_path / format / "README.md").read_text()
        assert "Channels or experts are gone: cut, by a plan that is not recorded." in text
        assert "Nothing: all channels" not in text
        assert "pruned" in metadata_load(tmp_path / format / "README.md")["tags"]
    load_model(str(tmp_path / "ragged")).save_pretrained(tmp_path / "tuned")
    again = load_model(str(tmp_path / "tuned"))
    export_model(again, folder=tmp_path / "again", formats=["nf4"], source=str(tmp_path / "tuned"))
    assert "by a plan that is not recorded" in (tmp_path / "again" / "nf4" / "README.md").read_text()
    export_model(tiny_model(), folder=tmp_path / "whole", formats=["nf4"])
    metadata = metadata_load(tmp_path / "whole" / "nf4" / "README.md")
    assert "pruned" not in metadata["tags"]
