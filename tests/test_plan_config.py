"""`plan` from a config alone: published sizes, the bytes of really saved models, ratios that fit."""

import json
from pathlib import Path

import pytest
import torch
from cli_runs import run
from random_plans import uniform_plan
from tiny_models import WIDTH, tiny_model

from lightning_moe.allocation.uniform_sizes import UniformSizes
from lightning_moe.commands._sizing import answer_from_config
from lightning_moe.evaluation.stages import model_bytes
from lightning_moe.export.folders import open_folder
from lightning_moe.export.streaming import prune_folder
from lightning_moe.models.loading import load_model

CONFIGS = Path(__file__).parent / "model_configs"
# Published: parameters, as 2 bytes each the `total_size` of the shards, and active ones in billions.
PUBLISHED = {
    "qwen15_moe_a27b": (14_315_784_192, 2.7),
    "qwen3_30b_a3b": (30_532_122_624, 3.35),
    "deepseek_v2_lite": (15_706_484_224, 2.66),
    "deepseek_moe_16b": (16_375_728_128, 2.8),
    "mixtral_8x7b": (46_702_792_704, 12.9),
    "olmoe_1b_7b": (6_919_161_856, 1.3),
}
FAMILIES = ["qwen2_moe", "qwen3_moe", "mixtral", "olmoe", "deepseek", "deepseek_v2", "deepseek_v3", "ernie4_5_moe"]


def ask(source, tmp_path, **settings):
    answer_from_config(config_json=str(source), json=str(tmp_path / "sizes.json"), **settings)
    return json.loads((tmp_path / "sizes.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_sizes(name, tmp_path):
    total, active = PUBLISHED[name]
    found = ask(CONFIGS / f"{name}.json", tmp_path, prune_ratio=0.25)
    dense, pruned = found["dense"], found["pruned"]
    assert dense["stored_params"] == total
    assert dense["active_params"] / 1e9 == pytest.approx(active, abs=0.05)
    assert dense["nominal_bytes"] == 2 * total
    assert dense["bytes"] == pytest.approx(2 * total, rel=1e-4)
    assert found["prune_ratio"] == pytest.approx(0.25, abs=0.005)
    assert pruned["nominal_bytes"] == pruned["stored_params"] / 2
    assert 1.05 * pruned["nominal_bytes"] < pruned["bytes"] < 1.25 * pruned["nominal_bytes"]


def test_deepseek_v2_lite_counts_its_active_parameters_without_the_embedding(tmp_path):
    dense = ask(CONFIGS / "deepseek_v2_lite.json", tmp_path, prune_ratio=0)["dense"]
    assert (dense["active_params"] - 102_400 * 2048) / 1e9 == pytest.approx(2.4, abs=0.06)


def test_the_published_compression_of_qwen3_30b(tmp_path):
    found = ask(CONFIGS / "qwen3_30b_a3b.json", tmp_path, prune_ratio=0.25)
    assert found["width"] == 576
    # 4 bits for every parameter: 61.064 / 11.642. Both rounded to a tenth of a GB first, 61.1 / 11.6, it is 5.27.
    assert found["nominal_compression"] == pytest.approx(5.245, abs=1e-3)
    rounded = [round(found[name]["nominal_bytes"] / 1e9, 1) for name in ("dense", "pruned")]
    assert rounded[0] / rounded[1] == pytest.approx(5.27, abs=5e-3)
    assert found["compression"] == pytest.approx(4.70, abs=5e-3)


@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_dense_folder_to_the_byte(name, tied, tmp_path):
    tiny_model(name, dtype=torch.bfloat16, tie_word_embeddings=tied).save_pretrained(tmp_path / "stock")
    found = ask(tmp_path / "stock", tmp_path, prune_ratio=0, bits=16)
    assert found["dense"]["bytes"] == model_bytes(tmp_path / "stock")
    beside = ask(tmp_path / "stock" / "config.json", tmp_path, prune_ratio=0, bits=16)
    assert beside["dense"] == found["dense"]
    for size in ("60KB", "5MB"):
        folder = tmp_path / size
        tiny_model(name, dtype=torch.bfloat16, tie_word_embeddings=tied).save_pretrained(folder, max_shard_size=size)
        assert ask(folder, tmp_path, prune_ratio=0, bits=16)["dense"]["bytes"] == model_bytes(folder)
    (tmp_path / "60KB" / "config.json").rename(tmp_path / "60KB" / "alone.json")
    assert ask(tmp_path / "60KB" / "alone.json", tmp_path, prune_ratio=0)["dense"]["stored_params"] > 0


@pytest.mark.parametrize("bits", [16, 4])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_pruned_folder(name, bits, tmp_path):
    tiny_model(name, dtype=torch.bfloat16).save_pretrained(tmp_path / "stock")
    found = ask(tmp_path / "stock", tmp_path, keep_ratio=0.5, bits=bits)
    assert (found["width"], found["ratio"], found["keep_ratio"]) == (WIDTH // 2, 0.5, 0.5)
    plan = uniform_plan(load_model(str(tmp_path / "stock")), width=WIDTH // 2)
    stock = open_folder(str(tmp_path / "stock"))
    prune_folder(stock, plan=plan, out=tmp_path / "cut", quantize=bits == 4, progress=False)
    written = model_bytes(tmp_path / "cut")
    assert written <= found["pruned"]["bytes"] <= (written if bits == 16 else 1.002 * written)
    assert found["compression"] == found["dense"]["bytes"] / found["pruned"]["bytes"]
    # A cut folder is counted as the model that it came from.
    assert ask(tmp_path / "cut", tmp_path, prune_ratio=0.5, bits=bits)["pruned"] == found["pruned"]


def test_a_stock_model_of_one_width(tmp_path):
    tiny_model(dtype=torch.bfloat16, moe_intermediate_size=24).save_pretrained(tmp_path / "uniform")
    assert ask(tmp_path / "uniform", tmp_path, prune_ratio=0)["dense"]["bytes"] == model_bytes(tmp_path / "uniform")


def test_the_shipped_model(tmp_path):
    found = ask("asset:small_moe", tmp_path, prune_ratio=0.5)
    assert found["dense"]["stored_params"] == sum(p.numel() for p in load_model("asset:small_moe").parameters())
    assert found["dense"]["bytes"] == pytest.approx(11_143_632 + 969 + 216, abs=200)


@pytest.mark.parametrize("bits", [16, 4])
def test_the_smallest_ratio_that_fits(bits, tmp_path):
    stock = CONFIGS / "qwen3_30b_a3b.json"
    budget = {4: "10GB", 16: "40GB"}[bits]
    found = ask(stock, tmp_path, fit=budget, bits=bits)
    assert found["pruned"]["bytes"] <= found["fit"]["bytes"] == int(budget[:2]) * 10**9
    wider = ask(stock, tmp_path, prune_ratio=1 - (found["width"] + 16) / 768, bits=bits)
    assert wider["width"] == found["width"] + 16
    assert wider["pruned"]["bytes"] > found["fit"]["bytes"]
    assert ask(stock, tmp_path, prune_ratio=found["ratio"], bits=bits)["pruned"] == found["pruned"]


def test_the_answer_in_words(tmp_path, caplog):
    run("plan", "--config_json", CONFIGS / "qwen3_30b_a3b.json", "--fit", "10GB", "--json", tmp_path / "sizes.json")
    found = json.loads((tmp_path / "sizes.json").read_text())
    assert f"To fit 10GB in 4 bit, prune {found['ratio']:.2%}" in caplog.text
    assert "416 of 768 channels in each expert" in caplog.text
    for row in ("dense, bfloat16", "pruned, bfloat16", "dense, 4 bit", "pruned, 4 bit"):
        assert row in caplog.text
    ask("asset:small_moe", tmp_path, fit="1GB")
    assert "The whole model fits 1GB in 4 bit" in caplog.text
    ask("asset:small_moe", tmp_path, prune_ratio=0.3, align=64)
    assert "Prune ratio 0.5 (0.3 rounded to `align`): 64 of 128 channels" in caplog.text


def test_a_ratio_that_is_rounded_to_nothing_is_said(tmp_path, caplog):
    found = ask("asset:small_moe", tmp_path, prune_ratio=0.25, align=128)
    assert (found["ratio"], found["prune_ratio"]) == (0.25, 0)
    assert "Nothing is cut: `align` 128 rounds the ratio 0.25 to 0. Take a larger ratio" in caplog.text
    caplog.clear()
    ask("asset:small_moe", tmp_path, prune_ratio=0)
    ask("asset:small_moe", tmp_path, fit="1GB")
    assert "Nothing is cut" not in caplog.text


def test_types(tmp_path):
    stock = CONFIGS / "olmoe_1b_7b.json"
    wide = ask(stock, tmp_path, prune_ratio=0.5, bits=16, dtype="float32")
    assert wide["dense"]["nominal_bytes"] == 4 * wide["dense"]["stored_params"]
    content = {key: value for key, value in json.loads(stock.read_text()).items() if key != "torch_dtype"}
    (tmp_path / "untyped.json").write_text(json.dumps(content))
    assert ask(tmp_path / "untyped.json", tmp_path, prune_ratio=0.5)["dtype"] == "bfloat16"


def test_what_is_refused(tmp_path):
    stock = CONFIGS / "olmoe_1b_7b.json"
    with pytest.raises(ValueError, match=r"No prune ratio brings this model within 1\.000 MB: with 16 channels"):
        ask(stock, tmp_path, fit="1MB")
    with pytest.raises(ValueError, match=r"one of `ratio` .* got `prune_ratio` and `fit`"):
        ask(stock, tmp_path, prune_ratio=0.5, fit="1GB")
    with pytest.raises(ValueError, match="got none"):
        ask(stock, tmp_path)
    with pytest.raises(ValueError, match="`align`=2048 is wider than the experts, 1024 channels"):
        ask(stock, tmp_path, prune_ratio=0.5, align=2048)
    with pytest.raises(ValueError, match=r"There is no model config at '.*none\.json'"):
        ask(tmp_path / "none.json", tmp_path, prune_ratio=0.5)
    (tmp_path / "other.json").write_text("{}")
    with pytest.raises(ValueError, match=r"other\.json' is no config\.json of a model: it has no `model_type`"):
        ask(tmp_path / "other.json", tmp_path, prune_ratio=0.5)
    (tmp_path / "llama.json").write_text('{"model_type": "llama"}')
    with pytest.raises(ValueError, match="'llama' is not a known Mixture-of-Experts family"):
        ask(tmp_path / "llama.json", tmp_path, prune_ratio=0.5)


@pytest.mark.parametrize(
    ("flags", "message"),
    [
        (
            ["--config_json", "x", "--statistics", "s", "--ratio", "0.5"],
            "`statistics` cannot be had with `config_json`",
        ),
        (["--config_json", "x", "--method", "uniform", "--ratio", "0.5"], "`method` cannot be had with `config_json`"),
        (["--config_json", "x", "--ratio", "0.5", "--batch_size", "2"], "the settings of a run need `fit_training`"),
        (["--statistics", "s", "--out", "p", "--fit", "1GB"], "`fit` cannot be had with `statistics`"),
        (["--ratio", "0.5"], "To make a plan name `statistics`"),
        (["--ratio", "0.5", "--prune_ratio", "0.5"], "`ratio` and `prune_ratio` are one thing"),
    ],
)
def test_the_two_modes_are_not_mixed(flags, message, capsys):
    with pytest.raises(SystemExit):
        run("plan", *flags)
    assert message in capsys.readouterr().err


def test_sizes_are_plain_functions_of_the_width():
    model = UniformSizes(config=tiny_model(dtype=torch.bfloat16).config, dtype=torch.bfloat16)
    whole, half = model.cut(WIDTH, bits=16), model.cut(WIDTH // 2, bits=16)
    # 2 layers of 8 experts, 3 projections of hidden size 64; 2 of 8 experts are used.
    assert whole.stored_params - half.stored_params == 2 * 8 * 3 * 64 * WIDTH // 2
    assert whole.active_params - half.active_params == 2 * 2 * 3 * 64 * WIDTH // 2
