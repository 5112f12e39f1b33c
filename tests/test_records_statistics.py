import copy
import os
import pickle
from dataclasses import replace

import pytest
import torch
from statistics_factory import hand_statistics, make_statistics, rewrite, shape_of

from lightning_moe.files import LazyTensors
from lightning_moe.records import (
    STATISTICS,
    CalibrationStatistics,
)
from lightning_moe.records.statistics import WEIGHT_NORMS


def changed(statistics, *, name, value, corpus="text", layer=0):
    """A copy with one statistic replaced; `value` None removes it."""
    layers = [dict(own) for own in statistics.corpora[corpus]]
    layers[layer].pop(name, None)
    if value is not None:
        layers[layer][name] = value
    return {"shape": statistics.shape, "weights": statistics.weights, "corpora": {corpus: tuple(layers)}}


def test_total_adds_sums_and_takes_maxima():
    statistics = make_statistics(corpora=("a", "b", "c"), optional=True)
    a, b = statistics.corpora["a"][1], statistics.corpora["b"][1]
    total = statistics.total(["a", "b"])[1]
    for name in STATISTICS:
        expected = torch.maximum(a[name], b[name]) if name in {"max_abs", "max_weighted_sq"} else a[name] + b[name]
        assert torch.equal(total[name], expected), name


def test_total_without_names_takes_every_corpus_and_shares_no_memory():
    statistics = make_statistics(corpora=("a", "b"))
    total = statistics.total()
    assert float(total[0]["num_tokens"]) == 2000
    single = statistics.total(["a"])
    single[0]["count"].zero_()
    assert float(statistics.corpora["a"][0]["count"].sum()) > 0


@pytest.mark.parametrize("names", [[], ["nowhere"], ["text", "text"]])
def test_total_of_unknown_corpora_is_refused(names):
    with pytest.raises(ValueError, match=r"`corpora` must name some of \['text'\], each once, got"):
        make_statistics().total(names)


def test_merge_equals_one_run_over_both():
    first, second = make_statistics(corpora=("a", "b"), seed=1), make_statistics(corpora=("b", "c"), seed=2)
    second = replace(second, weights=first.weights)
    merged = first.merge(second)
    assert list(merged.corpora) == ["a", "b", "c"]
    assert torch.equal(merged.corpora["a"][0]["count"], first.corpora["a"][0]["count"])
    expected = first.corpora["b"][1]["hidden_sq"] + second.corpora["b"][1]["hidden_sq"]
    assert torch.equal(merged.corpora["b"][1]["hidden_sq"], expected)
    largest = torch.maximum(first.corpora["b"][0]["max_abs"], second.corpora["b"][0]["max_abs"])
    assert torch.equal(merged.corpora["b"][0]["max_abs"], largest)


def test_merge_is_commutative():
    first = make_statistics(seed=1)
    second = replace(make_statistics(seed=2), weights=first.weights)
    assert first.merge(second).digest == second.merge(first).digest


def test_merge_refuses_another_model():
    with pytest.raises(ValueError, match="different shape cannot be merged"):
        make_statistics().merge(make_statistics(num_experts=4))
    with pytest.raises(ValueError, match=r"model.layers.0.mlp.experts: gate_sq_norm differs"):
        make_statistics(seed=1).merge(make_statistics(seed=2))


def test_merging_with_a_file_of_an_older_version_keeps_what_both_have():
    new = make_statistics(seed=1)
    old = replace(
        make_statistics(seed=2), weights=tuple({name: layer[name] for name in WEIGHT_NORMS} for layer in new.weights)
    )
    assert set(new.merge(old).weights[0]) == set(WEIGHT_NORMS)
    assert new.merge(old).digest == old.merge(new).digest


def test_merging_corpora_with_and_without_moments_names_the_options():
    full, plain = make_statistics(corpora=("a",), optional=True), make_statistics(corpora=("b",))
    with pytest.raises(ValueError, match=r"only some have \['input_sq', .*\(`gradients` true, `moments` true\)"):
        full.merge(replace(plain, weights=full.weights))


def test_with_sums_of_other_text_is_refused():
    plain, other = make_statistics(), make_statistics(num_tokens=900, optional=True)
    sums = {
        "text": tuple({name: layer[name] for name in ("loss_snip", "num_tokens")} for layer in other.corpora["text"])
    }
    with pytest.raises(ValueError, match=r"`sums` of corpus 'text' are of 900 tokens, these statistics of 1000"):
        plain.with_sums(sums)


def test_with_sums_adds_optional_statistics_to_every_corpus():
    plain, full = make_statistics(corpora=("a", "b")), make_statistics(corpora=("a", "b"), optional=True)
    sums = {
        corpus: tuple({name: layer[name] for name in ("loss_snip", "loss_taylor")} for layer in layers)
        for corpus, layers in full.corpora.items()
    }
    joined = plain.with_sums(sums)
    assert torch.equal(joined.corpora["b"][1]["loss_snip"], full.corpora["b"][1]["loss_snip"])
    assert torch.equal(joined.corpora["b"][1]["count"], plain.corpora["b"][1]["count"])
    with pytest.raises(ValueError, match=r"numbers of layers {'a': 2, 'b': 2}, got {'a': 1}. Take the same text"):
        plain.with_sums({"a": sums["a"][:1]})


def test_statistics_survive_the_disk(tmp_path):
    statistics = make_statistics(corpora=("prose", "code|tricky/name"), optional=True)
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = CalibrationStatistics.load(tmp_path / "statistics.safetensors")
    assert loaded.shape == statistics.shape
    assert loaded.digest == statistics.digest
    assert list(loaded.corpora) == ["prose", "code|tricky/name"]
    assert torch.equal(loaded.weights[1]["down_sq_norm"], statistics.weights[1]["down_sq_norm"])
    statistics.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (tmp_path / "statistics.safetensors").read_bytes()


def test_loaded_statistics_hold_no_tensor(tmp_path):
    statistics = make_statistics(corpora=("a", "b"), optional=True)
    statistics.save(tmp_path / "statistics.safetensors")
    loaded = CalibrationStatistics.load(tmp_path / "statistics.safetensors")
    (tmp_path / "statistics.safetensors").unlink()
    assert loaded.corpora["a"][0]["count"] is not loaded.corpora["a"][0]["count"]
    for name, value in statistics.total()[1].items():
        assert torch.equal(loaded.total()[1][name], value), name
    assert loaded.merge(statistics).digest == statistics.merge(loaded).digest


def test_a_total_reads_nothing_before_it_is_asked(tmp_path, monkeypatch):
    make_statistics(corpora=("a", "b"), optional=True).save(tmp_path / "statistics.safetensors")
    loaded = CalibrationStatistics.load(tmp_path / "statistics.safetensors")
    asked = []
    read = LazyTensors.__getitem__
    monkeypatch.setattr(LazyTensors, "__getitem__", lambda self, name: asked.append(name) or read(self, name))
    total = loaded.total()
    assert "count" in total[0]
    assert "luck" not in total[0]
    assert asked == []
    assert float(total[1]["num_tokens"]) == 2000
    assert asked == ["num_tokens"] * 3  # of the total and of both corpora


def test_loaded_statistics_can_be_sent_to_another_process(tmp_path):
    make_statistics(corpora=("a", "b"), optional=True).save(tmp_path / "statistics.safetensors")
    loaded = CalibrationStatistics.load(tmp_path / "statistics.safetensors")
    sent = pickle.loads(pickle.dumps(loaded))
    assert sent.shape == loaded.shape
    assert sent.digest == loaded.digest
    assert copy.deepcopy(loaded).digest == loaded.digest
    assert torch.equal(pickle.loads(pickle.dumps(loaded.total()))[1]["count"], loaded.total()[1]["count"])


def test_a_file_truncated_after_it_was_opened_is_named(tmp_path):
    path = tmp_path / "statistics.safetensors"
    make_statistics().save(path)
    loaded = CalibrationStatistics.load(path)
    os.truncate(path, path.stat().st_size // 2)
    with pytest.raises(ValueError, match=r"'.*statistics.safetensors' changed or is damaged: "):
        _ = loaded.digest


def test_digest_sees_one_changed_number_and_not_the_order_of_corpora():
    statistics = make_statistics(corpora=("a", "b"))
    turned = replace(statistics, corpora=dict(reversed(statistics.corpora.items())))
    assert turned.digest == statistics.digest
    layers = [dict(layer) for layer in statistics.corpora["a"]]
    layers[0]["count"] = layers[0]["count"] + 1
    assert replace(statistics, corpora={**statistics.corpora, "a": tuple(layers)}).digest != statistics.digest


@pytest.mark.parametrize("name", sorted(STATISTICS))
def test_nan_names_corpus_layer_and_statistic(name):
    statistics = make_statistics(optional=True)
    value = statistics.corpora["text"][1][name].clone()
    value.view(-1)[0] = float("nan")
    where = f"corpus 'text', model.layers.1.mlp.experts: statistic {name} holds NaN or infinity"
    with pytest.raises(ValueError, match=where):
        CalibrationStatistics(**changed(statistics, name=name, value=value, layer=1))


@pytest.mark.parametrize(
    ("name", "value", "message"),
    [
        ("count", torch.ones(8), r"statistic count must be float64 of shape \(8,\), got torch.float32 of shape \(8,\)"),
        ("count", torch.ones(7).double(), r"must be float64 of shape \(8,\), got torch.float64 of shape \(7,\)"),
        (
            "count",
            torch.ones(8, device="meta").double(),
            "statistic count must be in main memory, got a tensor on meta",
        ),
        ("count", torch.full((8,), -2.0).double(), "statistic count must not be negative, its smallest value is -2.0"),
        ("count", torch.zeros(8).double(), "experts: calibration saw 0 routed tokens"),
        ("num_tokens", torch.tensor(0.0).double(), "corpus 'text', .*: calibration saw 0 tokens. Give it text"),
        ("count", None, r"missing statistics \['count'\], unknown statistics \[\]"),
        ("luck", torch.ones(8).double(), r"missing statistics \[\], unknown statistics \['luck'\]"),
        ("output_sum", torch.ones(8, 64).double(), r"the same statistics; only some have \['output_sum'\]"),
    ],
)
def test_bad_statistic_is_refused(name, value, message):
    with pytest.raises(ValueError, match=message):
        CalibrationStatistics(**changed(make_statistics(), name=name, value=value))


def test_negative_attribution_is_legal():
    statistics = make_statistics()
    value = -statistics.corpora["text"][0]["attribution"].abs()
    assert CalibrationStatistics(**changed(statistics, name="attribution", value=value)).corpora


def test_incomplete_records_are_refused():
    statistics = make_statistics()
    with pytest.raises(ValueError, match="at least one corpus, got none"):
        replace(statistics, corpora={})
    with pytest.raises(ValueError, match="A corpus needs a name, got ''"):
        replace(statistics, corpora={"": statistics.corpora["text"]})
    with pytest.raises(ValueError, match="Corpus 'text' must have 2 layers, got 1"):
        replace(statistics, corpora={"text": statistics.corpora["text"][:1]})
    with pytest.raises(ValueError, match="`weights` must have 2 layers, got 1"):
        replace(statistics, weights=statistics.weights[:1])
    with pytest.raises(ValueError, match=r"`weights` must hold .*, got \['gate_sq_norm'\]"):
        replace(statistics, weights=({"gate_sq_norm": statistics.weights[0]["gate_sq_norm"]},) * 2)
    without_one = tuple({k: v for k, v in layer.items() if k != "up_abs_sum"} for layer in statistics.weights)
    with pytest.raises(ValueError, match=r"`weights` must hold .* and, all or none, \['gate_abs_sum', 'up_abs_sum', "):
        replace(statistics, weights=without_one)
    broken = {name: value * float("inf") for name, value in statistics.weights[0].items()}
    with pytest.raises(ValueError, match="experts: weight norm gate_sq_norm holds NaN or infinity"):
        replace(statistics, weights=(broken, statistics.weights[1]))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"version": 2}, "must hold calibration statistics of version 1, got .*'version': 2"),
        ({"shape": {}}, "does not hold valid calibration statistics: A model's shape must hold"),
        ({"corpora": ["other"]}, "does not hold valid calibration statistics: 'text'"),
        ({"corpora": None}, "does not hold valid calibration statistics: .*NoneType"),
        ({"tensors": lambda own: own | {"loose": torch.ones(1)}}, "statistics: not enough values"),
        (
            {"tensors": lambda own: own | {"weights|9|x": torch.ones(1)}},
            "'weights\\|9\\|x' must be of one of the layers 0 to 1, got '9'",
        ),
        ({"tensors": lambda own: own | {"weights|-1|x": torch.ones(1)}}, "of one of the layers 0 to 1, got '-1'"),
        ({"tensors": lambda own: own | {"corpus|01|x|text": torch.ones(1)}}, "of one of the layers 0 to 1, got '01'"),
        ({"tensors": lambda own: {k: v for k, v in own.items() if "|count|" not in k}}, "missing statistics"),
    ],
)
def test_valid_safetensors_with_foreign_content_is_refused(tmp_path, change, message):
    make_statistics().save(tmp_path / "s")
    rewrite(tmp_path / "s", **change)
    with pytest.raises(ValueError, match=message):
        CalibrationStatistics.load(tmp_path / "s")


def test_hand_statistics_are_valid():
    statistics = hand_statistics(shape_of([1, 1]), layers=[{"count": [3, 4]}])
    assert statistics.total()[0]["count"].tolist() == [3.0, 4.0]
