"""Held-out loss, expert usage, footprint, rows and their summary."""

import json
import math

import pytest
import torch
from random_plans import random_plan
from test_training_module import naive_nll
from tiny_models import random_tokens, tiny_model
from tiny_runs import save_model, save_text, text_module, token_batches

from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.adapters.storage import save_adapter
from lightning_moe.evaluation.compare import Comparison, Measures, StageSpec
from lightning_moe.evaluation.perplexity import evaluate_model
from lightning_moe.evaluation.stages import evaluate_stage, load_stages, model_bytes, save_stage
from lightning_moe.evaluation.summary import recovered_share, summarise
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.discovery import moe_layers
from lightning_moe.quantization.footprint import measure_footprint, missing_channels
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.records import PrunePlan
from lightning_moe.reporting.summary import Summary
from lightning_moe.surgery.cut import apply_plan, convert_experts, cut_layer


def compare_stages(source, *, stages, statistics, calibration, held_out, out):
    comparison = Comparison(
        source=source,
        calibration=lambda _: calibration,
        measures=Measures(held_out=held_out),
        out=out,
        statistics=statistics,
        keep=[stage.name for stage in stages],
    )
    return {row["name"]: row for row in comparison.run(stages)}


def padded_batches():
    """The second sequence of each batch is half padding."""
    batches = token_batches(2)
    for batch in batches:
        batch["labels"] = batch["labels"].clone()
        batch["attention_mask"][1, 8:] = 0
        batch["labels"][1, 8:] = -100
    return batches


def test_loss_is_that_of_a_loop_over_tokens():
    model, loaders = tiny_model(), {"one": padded_batches(), "two": token_batches(1, seed=1)}
    result = evaluate_model(model, loaders=loaders)
    for name, loader in loaders.items():
        assert result.nll_per_corpus[name] == pytest.approx(naive_nll(model, loader), rel=1e-5)
    assert result.nll == pytest.approx(sum(result.nll_per_corpus.values()) / 2)
    # 2 batches of 15 + 7 predictions, 1 of 2 x 15.
    assert result.num_tokens == 2 * (15 + 7) + 30


@pytest.mark.parametrize("name", ["qwen3_moe", "deepseek_v3_grouped"])
def test_usage_sums_to_the_experts_of_a_token_without_padding(name):
    model = tiny_model(name)
    top_k = model.config.num_experts_per_tok
    result = evaluate_model(model, loaders={"one": padded_batches()})
    assert list(result.usage) == [layer.name for layer in moe_layers(model)]
    for share_E in result.usage.values():
        assert share_E.sum().item() == pytest.approx(top_k)
    # By hand: the router's own choice on the tokens that are no padding.
    counted, first = torch.zeros(8), moe_layers(model)[0]
    chosen = []
    hook = first.router.register_forward_hook(lambda _module, _args, output: chosen.append(output[2]))
    for batch in padded_batches():
        with torch.no_grad():
            model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        counted += chosen.pop()[batch["attention_mask"].reshape(-1).bool()].reshape(-1).bincount(minlength=8)
    hook.remove()
    torch.testing.assert_close(result.usage[first.name], counted / (2 * 24))


def test_evaluation_leaves_no_hooks_and_the_mode_as_it_was():
    model = tiny_model().train()
    moe_layers(model)[0].block.eval()

    def broken():
        yield token_batches(1)[0]
        raise RuntimeError("the loader broke")

    with pytest.raises(RuntimeError, match="the loader broke"):
        evaluate_model(model, loaders={"one": broken()})
    assert model.training
    assert not moe_layers(model)[0].block.training
    assert not any(module._forward_pre_hooks for module in model.modules())


def test_no_corpus_and_no_token_are_refused():
    with pytest.raises(ValueError, match="There is no corpus to evaluate on: give the data module at least one"):
        evaluate_model(tiny_model(), loaders={})
    batch = token_batches(1)[0]
    empty = batch | {"labels": torch.full_like(batch["labels"], -100)}
    with pytest.raises(ValueError, match="Corpus 'one' has no token to predict"):
        evaluate_model(tiny_model(), loaders={"one": [empty]})
    with pytest.raises(ValueError, match="Corpus 'one' has no token to predict"):
        evaluate_model(tiny_model(), loaders={"one": []})


def test_a_broken_model_is_refused():
    model = tiny_model()
    model.lm_head.weight.data[5] = float("nan")
    with pytest.raises(ValueError, match="The loss on corpus 'one' is nan: the model's weights or its text are broken"):
        evaluate_model(model, loaders={"one": token_batches(1)})


# Hand counts of the tiny Qwen3-MoE: vocabulary 128, hidden 64, 2 layers, 8 experts of 32 channels, top-2.
EMBEDDINGS = 2 * 128 * 64
ATTENTION = 2 * (64 * 64 + 2 * 32 * 64 + 64 * 64)  # q, k and v of 2 of 4 heads, o
NORMS = 2 * (2 * 64 + 2 * 16) + 64  # before attention and experts, on q and k; the last
ROUTERS = 2 * 8 * 64
CHANNEL = 3 * 64
OUTSIDE = EMBEDDINGS + ATTENTION + NORMS + ROUTERS


def test_dense_footprint_by_hand():
    footprint = measure_footprint(tiny_model())
    assert footprint.stored_params == OUTSIDE + 2 * 8 * 32 * CHANNEL
    assert footprint.active_params == OUTSIDE + 2 * 2 * 32 * CHANNEL


def test_usage_decides_which_channels_count_as_active():
    model = cut_model()  # widths 8, 16, 32 ... see below
    usage = {layer.name: torch.tensor([1.0, 1.0, 0, 0, 0, 0, 0, 0]) for layer in moe_layers(model)}
    assert measure_footprint(model, usage=usage).active_params == OUTSIDE + 2 * (8 + 16) * CHANNEL


def cut_model():
    """Expert 0 keeps 8 channels, expert 1 keeps 16, the others all 32."""
    model = tiny_model()
    keep_EC = torch.ones(8, 32, dtype=torch.bool)
    keep_EC[0, 8:] = keep_EC[1, 16:] = False
    for layer in moe_layers(model):
        cut_layer(layer, keep_C=keep_EC.reshape(-1))
    return model


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("adapted", [False, True])
def test_cut_footprint_by_hand_packed_or_not_with_adapters_or_not(packed, adapted):
    model = cut_model()
    if packed:
        quantize_model(model)
    if adapted:
        inject_adapters(model, config=AdapterConfig(expert_rank=2, router_rank=2, attention_rank=2, train_norms=True))
    channels = 8 + 16 + 6 * 32
    footprint = measure_footprint(model)
    assert footprint.stored_params == OUTSIDE + 2 * channels * CHANNEL
    assert footprint.active_params == pytest.approx(OUTSIDE + 2 * channels * CHANNEL * 2 / 8)


def test_tied_embeddings_count_once():
    footprint = measure_footprint(tiny_model(tie_word_embeddings=True))
    assert footprint.stored_params == OUTSIDE - EMBEDDINGS // 2 + 2 * 8 * 32 * CHANNEL


def test_masked_experts_are_not_used():
    model = tiny_model("deepseek_v3_grouped")
    dense = measure_footprint(model)
    keep_EC = torch.ones(8, 32, dtype=torch.bool)
    keep_EC[0] = False
    for layer in moe_layers(model):
        cut_layer(layer, keep_C=keep_EC.reshape(-1))
    # Top-3 of the 7 that are left: as many channels as of 8.
    cut = measure_footprint(model)
    assert dense.stored_params - cut.stored_params == 2 * 32 * CHANNEL
    assert cut.active_params == pytest.approx(dense.active_params)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_text(tmp_path_factory.mktemp("evaluation"))
    save_model(folder / "model")
    return folder


def loaders_of(folder):
    data = text_module(folder)
    return dict(zip(data.validation_names, data.val_dataloader(), strict=True))


def test_a_row_of_a_packed_folder_with_its_adapter(folder, tmp_path):
    model = tiny_model(vocab_size=4096)
    convert_experts(model)
    quantize_model(model)
    save_ragged(model, tmp_path / "base")
    peft_model = inject_adapters(model, config=AdapterConfig(expert_rank=2, router_rank=2))
    save_adapter(peft_model, folder=tmp_path / "adapter")
    loaders = loaders_of(folder)
    row = evaluate_stage(
        "tiny", folder=tmp_path / "base", adapter=tmp_path / "adapter", loaders=loaders, prune_ratio=0.25, seconds=1.234
    )
    assert row["nll"] == pytest.approx(evaluate_model(model, loaders=loaders).nll, rel=1e-5)
    assert row["bytes"] == model_bytes(tmp_path / "base") + model_bytes(tmp_path / "adapter")
    files = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert row["bytes"] <= sum(path.stat().st_size for path in files)
    assert row["stored_params"] == measure_footprint(tiny_model(vocab_size=4096)).stored_params
    assert (row["keep_ratio"], row["seconds"]) == (0.75, 1.23)
    assert json.loads(json.dumps(row)) == row


def test_bytes_of_a_hub_name_are_not_known():
    assert model_bytes("owner/name") is None


def test_rows_are_saved_and_loaded(tmp_path):
    for name in ("one", "two"):
        save_stage(tmp_path, stage={"name": name, "nll": 2.0, "prune_ratio": 0.5})
    (tmp_path / "stages" / "one.exports.json").write_text("[]")
    assert list(load_stages(tmp_path)) == ["one", "two"]


def test_no_rows_and_foreign_files_are_refused(tmp_path, folder):
    with pytest.raises(ValueError, match=r"There are no rows of results below .* run `compare` or `fit` first"):
        load_stages(tmp_path)
    (tmp_path / "stages").mkdir()
    (tmp_path / "stages" / "x.json").write_text('{"loss": 1}')
    with pytest.raises(ValueError, match=r"x.json' is not a row of results: it needs `name`, `nll` and `prune_ratio`"):
        load_stages(tmp_path)
    with pytest.raises(ValueError, match=r"`name` of a stage must be a plain file name, got '../x'"):
        evaluate_stage("../x", folder=folder / "model", loaders={}, prune_ratio=0.0, seconds=0.0)


@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_missing_channels_are_counted_against_the_config(name):
    model = tiny_model(name)
    assert missing_channels(model) == 0
    plan = random_plan(model, evicted=[[1]])
    apply_plan(model, plan=plan)
    assert missing_channels(model) == pytest.approx(1 - plan.num_kept / plan.shape.num_channels)


def rows_of(**nll):
    return {name: {"name": name, "nll": value, "prune_ratio": 0.5} for name, value in nll.items()}


def test_recovered_share_by_hand():
    rows = rows_of(dense=2.0, dense_nf4=2.1, control=1.9, cut_50_nf4=3.1, recovered_50_nf4=2.3, recovered_9=5.0)
    # One-shot gap 3.1 - 2.1 = 1.0, left after recovery 2.3 - 1.9 = 0.4: 60 % closed.
    assert recovered_share(rows, before="dense_nf4", after="control") == {"recovered_50_nf4": pytest.approx(0.6)}
    assert recovered_share(rows_of(dense=2.0, cut_50_nf4=3.1), before="dense_nf4", after="control") == {}
    # Trained for another number of steps than the control: no fair pair.
    longer = {name: row | {"steps": 300 if name == "control" else 100} for name, row in rows.items()}
    assert recovered_share(longer, before="dense_nf4", after="control") == {}
    # A cut that lost nothing has no gap.
    assert recovered_share(rows | rows_of(cut_50_nf4=2.1), before="dense_nf4", after="control") == {}


def test_summary_is_what_the_report_reads(tmp_path):
    rows = rows_of(dense=2.0, dense_nf4=2.1, control=1.9, control_merged=1.95, cut_50_nf4=3.1, recovered_50_nf4=2.3)
    rows |= rows_of(controlled=2.5)
    rows["dense"]["prune_ratio"] = rows["dense_nf4"]["prune_ratio"] = 0.0
    for row in rows.values():
        save_stage(tmp_path, stage=row)
    export = {"path": "p", "format": "nf4", "bytes": 5, "max_logit_diff": 0.0}
    (tmp_path / "stages" / "recovered_50_nf4.exports.json").write_text(json.dumps([export]))
    summary = summarise(tmp_path)
    assert summary["dense"]["nll"] == 2.0
    assert summary["control"]["nll"] == 1.9
    assert [row["name"] for row in summary["stages"]] == ["dense_nf4", "controlled", "cut_50_nf4", "recovered_50_nf4"]
    assert summary["exports"] == [export]
    assert {"torch", "transformers", "python"} <= summary["versions"].keys()
    read = Summary.from_dict(summary)
    # On the way from the cut (3.1) to the control (1.9): (3.1 - 2.3) / 1.2.
    assert read.gap_closed == {"recovered_50_nf4": 66.67}
    assert summary["recovery"]["gap_closed_percent_without_adaptation"] == {"recovered_50_nf4": 60.0}
    assert read.loss(read.find("recovered_50_nf4")) == pytest.approx(0.3)


def test_methods_side_by_side(folder, tmp_path):
    from lightning_moe.calibration.collector import collect_statistics
    from lightning_moe.models.loading import load_model

    data = text_module(folder)
    statistics = collect_statistics(load_model(str(folder / "model")), loaders=data.calibration_dataloaders())
    settings = {"align": 8}
    stages = [
        StageSpec(name="nf4", prune_ratio=0.5, bits=4, method_args=settings),
        StageSpec(name="nf4_again", prune_ratio=0.5, bits=4, method_args=settings),
        StageSpec(name="half", keep_ratio=0.5, method_args=settings),  # the same cut in the other word
        StageSpec(name="reap", prune_ratio=0.5, method="reap", repair=False),
    ]
    rows = compare_stages(
        str(folder / "model"),
        stages=stages,
        statistics=statistics,
        calibration=data.calibration_dataloaders(),
        held_out=loaders_of(folder),
        out=tmp_path,
    )
    assert set(rows) == set(load_stages(tmp_path)) == {"dense", "nf4", "nf4_again", "half", "reap"}
    assert rows["nf4"]["nll"] == rows["nf4_again"]["nll"] != rows["half"]["nll"]
    # Half of 2 x 8 x 32 channels is gone, in 16 bit and packed alike.
    gone = rows["dense"]["stored_params"] - rows["half"]["stored_params"]
    plan = PrunePlan.load(tmp_path / "plans" / "half.json")  # the first of the rows that share the cut
    num_evicted = sum(len(plan.evicted(index)) for index in range(2))
    assert gone == 256 * CHANNEL + num_evicted * 64  # and their router rows
    assert rows["nf4"]["stored_params"] == rows["half"]["stored_params"]
    assert rows["nf4"]["bytes"] < rows["half"]["bytes"]
    # Dropped experts leave the router too: 2 layers x 4 rows.
    assert rows["dense"]["stored_params"] - rows["reap"]["stored_params"] == 256 * CHANNEL + 2 * 4 * 64
    assert all(math.isfinite(row["nll"]) for row in rows.values())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"name": "a/b", "prune_ratio": 0.5}, "must be a plain file name, got 'a/b'"),
        ({"name": "", "prune_ratio": 0.5}, "must be a plain file name, got ''"),
        ({"name": "a"}, "exactly one of .* got prune_ratio=None and keep_ratio=None"),
        ({"name": "a", "prune_ratio": 0.5, "keep_ratio": 0.5}, "got prune_ratio=0.5 and keep_ratio=0.5"),
        ({"name": "a", "keep_ratio": 0.0}, r"`keep_ratio` must be in \(0, 1\], got 0.0"),
        ({"name": "a", "prune_ratio": 1.0}, r"`prune_ratio` must be in \[0, 1\), got 1.0"),
        ({"name": "a", "prune_ratio": 0.5, "bits": 8}, "`bits` of stage 'a' must be 4 or 16, got 8"),
        ({"name": "a", "prune_ratio": 0.5, "method": "magic"}, "got 'magic'"),
    ],
)
def test_stages_are_checked(settings, match):
    with pytest.raises(ValueError, match=match):
        StageSpec(**settings)


@pytest.mark.parametrize("names", [("a", "a"), ("dense",)])
def test_two_stages_of_one_name(names, tmp_path):
    stages = [StageSpec(name=name, prune_ratio=0.5) for name in names]
    with pytest.raises(ValueError, match="Every stage needs its own name, and `dense` is the unpruned model's"):
        compare_stages("x", stages=stages, statistics=None, calibration={}, held_out={}, out=tmp_path)


def test_evaluation_is_the_same_for_any_batch_size():
    model = tiny_model()
    whole = random_tokens(batch=4, length=16)
    one = {"input_ids": whole, "attention_mask": torch.ones_like(whole), "labels": whole}
    halves = [{key: value[part] for key, value in one.items()} for part in (slice(0, 1), slice(1, 4))]
    first = evaluate_model(model, loaders={"one": [one]})
    second = evaluate_model(model, loaders={"one": halves})
    assert first.nll == pytest.approx(second.nll, rel=1e-6)
    assert all(torch.equal(first.usage[name], second.usage[name]) for name in first.usage)
