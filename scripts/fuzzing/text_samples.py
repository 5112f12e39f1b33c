"""Valid samples of the files that hold text: plans, results, manifests, corpora, tokenizers, configs."""

import json
from pathlib import Path
from typing import Any

import torch
import yaml
from safetensors.torch import save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import PreTrainedTokenizerFast
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from lightning_moe.evaluation.routing import LayerRouting, RoutingTable
from lightning_moe.export.manifest import CARD_NAME, MANIFEST_NAME, Manifest, PlanOrigin
from lightning_moe.files import write_json
from lightning_moe.quantization.added_error import AddedError
from lightning_moe.records import ChannelScores, ExpertScores, LayerShape, ModelShape, PrunePlan
from lightning_moe.surgery.structure import LayerStructure, ModelStructure, Origin

NUM_EXPERTS, WIDTH = 4, 12
CORPORA = ("code", "math")
_TEMPLATE = (
    "{% for message in messages %}<{{ message['role'] }}>{{ message['content'] | trim }}</s>"
    "{% endfor %}{% if add_generation_prompt %}<assistant>{% endif %}"
)
_TEXT = "asset:text/code/heldout.jsonl"
_CARD = "---\nlicense: apache-2.0\ntags:\n- moe\n---\n\n# A model\n\nWhat it is.\n"


def _shape() -> ModelShape:
    widths = (WIDTH,) * NUM_EXPERTS
    names = [f"model.layers.{index}.mlp.experts" for index in range(2)]
    layers = tuple(LayerShape(name=name, widths=widths, top_k=2) for name in names)
    return ModelShape(model_type="qwen3_moe", hidden_size=64, layers=layers, router_digest="0" * 64)


def make_plan(folder: Path) -> None:
    """A plan that cuts one expert in half."""
    shape = _shape()
    keep_C = torch.arange(shape.layers[0].num_channels) >= WIDTH // 2
    plan = PrunePlan(
        shape=shape,
        method="exact_global",
        prune_ratio=0.1,
        align=1,
        keep=(keep_C, keep_C),
        provenance={"corpora": "code, math", "settings": "{}", "statistics": "0" * 64},
    )
    plan.save(folder / "plan.json")


def make_scores(folder: Path) -> None:
    """Scores of channels and of experts."""
    shape = _shape()
    channels = tuple(torch.rand(layer.num_channels, dtype=torch.float64) for layer in shape.layers)
    experts = tuple(torch.rand(layer.num_experts, dtype=torch.float64) for layer in shape.layers)
    ChannelScores(shape=shape, criterion="taylor", scores=channels).save(folder / "channels.safetensors")
    ExpertScores(shape=shape, criterion="reap", scores=experts).save(folder / "experts.safetensors")


def make_structure(folder: Path) -> None:
    """The structure of a cut model, as it is in a checkpoint."""
    shape = _shape()
    layers = tuple(
        LayerStructure(name=layer.name, origin=Origin.whole(layer.widths), packed=index == 1)
        for index, layer in enumerate(shape.layers)
    )
    structure = ModelStructure(hidden_size=64, layers=layers, linears=("lm_head",), adapter={"r": 4})
    write_json(folder / "structure.json", structure.to_dict())


def make_manifest(folder: Path) -> None:
    """An export's manifest, a card and weights of the size that it states."""
    save_file({"weight": torch.zeros(4)}, folder / "model.safetensors")
    size = (folder / "model.safetensors").stat().st_size
    manifest = Manifest(
        format="ragged",
        source="owner/model",
        base_model="owner/model",
        plans=(PlanOrigin(digest="0" * 64, method="reap", prune_ratio=0.5, corpora="code", statistics=""),),
        versions={"torch": "2.13.0"},
        stored_params=4,
        active_params=4.0,
        bits={"experts": 16, "linears": 16, "embeddings": 16},
        files={"model.safetensors": size},
        bytes=size,
        dropped=("extra",),
        max_logit_diff=1e-3,
        added_error=vars(AddedError(weights={"a": 0.1}, kl=0.1, max_logit_diff=0.2, num_tokens=8, random_text=True)),
    )
    write_json(folder / MANIFEST_NAME, manifest.to_dict())
    write_json(folder / "config.json", {"model_type": "qwen3_moe", "dtype": "bfloat16"})
    (folder / CARD_NAME).write_text(_CARD, encoding="utf-8")


def _row(name: str, method: str, *, loss: float, **fields: Any) -> dict[str, Any]:
    row = {"name": name, "method": method, "settings": {}, "bits": 16, "sample": 0, "repair": False, "recovered": False}
    row |= {"nll": 2 + loss, "nll_per_corpus": dict.fromkeys(CORPORA, 2 + loss), "stored_params": 5, "active_params": 3}
    row |= {"bytes": 50, "seconds": 0.5, "kl": abs(loss), "top1_agreement": 0.9, "seconds_evaluation": 0.1, "steps": 0}
    row |= {"tasks": {"piqa": {"acc": 0.6, "stderr": 0.1}}, "calibrations": 1, "novices": False, "export": None}
    return row | fields


def result_rows() -> list[dict[str, Any]]:
    """Rows of a comparison: the dense model, two methods, one of them repaired, and a budget without a ratio."""
    return [
        _row("dense", "dense", loss=0.0, ratio=0.0, prune_ratio=0.0, bytes=100),
        _row("cut_50", "exact_global", loss=0.1, ratio=0.5, prune_ratio=0.5),
        _row("cut_50_repaired", "exact_global", loss=0.05, ratio=0.5, prune_ratio=0.5, repair=True),
        _row("paper_a_50", "paper_a", loss=0.3, ratio=0.5, prune_ratio=0.5, bits=4),
        _row("recovered_50", "exact_global", loss=0.02, ratio=None, prune_ratio=0.45, recovered=True),
        _row("control", "dense", loss=-0.01, ratio=0.0, prune_ratio=0.0, bits=4, recovered=True),
    ]


def make_rows(folder: Path) -> None:
    """Rows of results as single files, and a list of exports."""
    for row in result_rows():
        write_json(folder / "stages" / f"{row['name']}.json", row)
    export = {"path": "out/nf4", "format": "nf4", "bytes": 40, "max_logit_diff": 0.1, "rerouted": 0.01}
    write_json(folder / "stages" / "cut_50.exports.json", [export])


def make_comparison(folder: Path) -> None:
    """The list that `compare` writes."""
    write_json(folder / "compare.json", result_rows())


def make_matrix(folder: Path) -> None:
    """The list of a matrix of calibrations."""
    columns = {"settings": {}, "ratio": 0.5, "tokens": 100, "nll": 2.1, "variant": False}
    cells = [
        columns | {"method": "reap", "calibration": one, "size": 100, "evaluation": other, "loss_above_dense": 0.1}
        for one in (*CORPORA, "all")
        for other in CORPORA
    ]
    cells += [row | {"method": "paper_a_log", "variant": True} for row in cells[-2:]]
    write_json(folder / "matrix.json", [*cells, cells[0] | {"method": "dense", "calibration": None, "size": 0}])


def make_routing(folder: Path) -> None:
    """What a RouterMonitor writes."""
    layers = (LayerRouting(entropy=0.7, load=(0.5, 0.25, 0.25, 0.0), evicted=(3,), num_tokens=16),) * 2
    tables = [RoutingTable(step=step, corpora=dict.fromkeys(CORPORA, layers)) for step in (0, 9)]
    write_json(folder / "router.json", dict(zip(("before", "after"), (one.to_dict() for one in tables), strict=True)))


def make_results(folder: Path) -> None:
    """Everything that `report` reads, but statistics."""
    for make in (make_rows, make_comparison, make_matrix, make_routing):
        make(folder)
    (folder / "plans").mkdir()
    make_plan(folder / "plans")


def make_tokenizer(folder: Path) -> None:
    """A tokenizer of letters with a chat template."""
    words = ["<pad>", "</s>", "<user>", "<assistant>", *"abcdefghijklmnopqrstuvwxyz"]
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="<pad>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="</s>", pad_token="<pad>")
    fast.chat_template = _TEMPLATE
    fast.save_pretrained(folder)


def make_text(folder: Path) -> None:
    """Documents, one a line."""
    rows = [{"text": f"document {index} of some words", "source": {"page": index}} for index in range(6)]
    _write_lines(folder / "corpus.jsonl", rows)


def make_instructions(folder: Path) -> None:
    """Instructions with and without an input."""
    rows = [{"instruction": f"do {index}", "input": "it" * (index % 2), "output": "done"} for index in range(4)]
    _write_lines(folder / "corpus.jsonl", rows)


def make_messages(folder: Path) -> None:
    """Conversations."""
    talk = [{"role": "user", "content": "hello"}, {"role": "assistant", "content": "good day"}]
    _write_lines(folder / "corpus.jsonl", [{"messages": talk * (1 + index % 2)} for index in range(4)])


def make_plain_text(folder: Path) -> None:
    """A text file."""
    (folder / "corpus.txt").write_text("A text of some words.\nAnd a second line of it.\n" * 4, encoding="utf-8")


def make_parquet(folder: Path) -> None:
    """Documents in a table."""
    from datasets import Dataset

    Dataset.from_dict({"text": ["one text", "another text of words"] * 3}).to_parquet(folder / "corpus.parquet")


def _write_lines(file: Path, rows: list[dict[str, Any]]) -> None:
    file.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")


def make_config(folder: Path) -> None:
    """The config of a small model."""
    sizes = {"hidden_size": 64, "intermediate_size": 32, "moe_intermediate_size": 16, "num_hidden_layers": 2}
    sizes |= {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 16, "vocab_size": 64}
    config = CONFIG_MAPPING["qwen3_moe"](**sizes, num_experts=4, num_experts_per_tok=2, dtype="bfloat16")
    config.save_pretrained(folder)


def make_run_config(folder: Path) -> None:
    """YAML of `compare`."""
    content = {
        "model": "asset:small_moe",
        "out": "results",
        "data": {"tokenizer": "asset:small_moe", "sequence_length": 32, "validation": {"a": {"source": _TEXT}}},
        "grid": {"methods": ["reap", {"method": "paper_a", "method_args": {"align": 8}}], "ratios": [0.25, 0.5]},
        "stages": [{"name": "own", "prune_ratio": 0.5, "bits": 4}],
        "recovery": {"rows": ["own"], "steps": 2},
        "tasks": ["piqa"],
    }
    (folder / "config.yaml").write_text(yaml.safe_dump(content), encoding="utf-8")
