import json
from dataclasses import FrozenInstanceError, dataclass, replace
from typing import ClassVar

import pytest
import torch
from statistics_factory import hand_statistics, make_statistics, shape_of

from lightning_moe.allocation import (
    PRESETS,
    ChannelCoverage,
    ChannelRanking,
    ExactGlobal,
    ExpertDropping,
    ExpertSparsity,
    PaperA,
    PruningMethod,
    RandomExperts,
    TBCoverage,
    UniformWidth,
    build_method,
)
from lightning_moe.allocation.budget import resolve_align, resolve_prune_ratio

# --- presets and settings -------------------------------------------------------------------------------------------


def test_presets_are_the_documented_methods():
    by_score = ["frequency", "router_weight", "router_probability", "reap", "man", "msan", "mone", "aimer"]
    assert {name: build_method(name) for name in PRESETS} == {
        "exact_global": ExactGlobal(criterion="channel_ablation", align=None, layer_floor=0.0, expert_floor=0),
        "channel_coverage": ChannelCoverage(criterion="channel_ablation", protected_share=0.5, normalise="model"),
        "paper_a": PaperA(criterion="activation_norm", expert_weight="attribution", smoothing="sqrt4", alpha=0.9),
        "tb_coverage": TBCoverage(utility="reap", protected_share=0.5, fill="sum", normalise="layer", order="given"),
        "random": RandomExperts(seed=0),
        **{name: ExpertDropping(criterion=name, scope="layer") for name in by_score},
        "expert_sparsity": ExpertSparsity(max_subsets=100_000),
        "uniform": UniformWidth(criterion="channel_ablation", align=None),
        "wanda": ChannelRanking(criterion="wanda", layers="uniform"),
        "magnitude": ChannelRanking(criterion="weight_norm", layers="uniform"),
        "camera": ChannelRanking(criterion="camera", layers="uniform"),
        "snip": ChannelRanking(criterion="snip", layers="global"),
        "taylor": ChannelRanking(criterion="taylor", layers="global"),
        "u_shaped": ChannelRanking(criterion="channel_ablation", layers="u_shaped", strength=0.5),
        "loss_proportional": ChannelRanking(criterion="channel_ablation", layers="loss_proportional"),
        "expert_dropping": ExpertDropping(criterion="reap"),
        "channel_ranking": ChannelRanking(criterion="channel_ablation", layers="uniform"),
    }


def test_a_method_passes_through():
    method = PaperA(align=32, min_width=64)
    assert build_method(method) is method


@pytest.mark.parametrize("method", ["paper_b", "", 3, None, PaperA])
def test_unknown_method_is_refused(method):
    names = r"one of \['exact_global', 'channel_coverage', 'paper_a', 'tb_coverage', .*'channel_ranking'\], got"
    with pytest.raises(ValueError, match=names):
        build_method(method)


def test_settings_change_a_preset():
    assert build_method("exact_global", align=32, layer_floor=0.1) == ExactGlobal(align=32, layer_floor=0.1)
    assert build_method("reap", criterion="frequency") == ExpertDropping(criterion="frequency")
    assert build_method("wanda", layers="global") == ChannelRanking(criterion="wanda", layers="global")


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        ("uniform", {"min_width": 8}, r"The method 'uniform' has the settings \['align', 'criterion'\], got \['min_w"),
        ("reap", {"align": 16}, r"The method 'reap' has the settings \['criterion', 'scope'\], got \['align'\]"),
        ("exact_global", {"align": 0}, "`align` must be a whole number >= 1, got 0"),
        (PaperA(), {"align": 8}, r"a PruningMethod without settings or .* with the settings \['align'\]"),
    ],
)
def test_bad_settings_of_a_preset_are_refused(method, settings, message):
    with pytest.raises(ValueError, match=message):
        build_method(method, **settings)


# Stock widths of Qwen3-30B, DeepSeek-MoE-16B, Mixtral and the shipped model; then the borders, and a ragged model.
DEFAULT_BLOCKS = [(768, 64), (1408, 64), (14336, 64), (128, 16), (512, 64), (448, 16), (520, 16), ((64, 768), 64)]


@pytest.mark.parametrize(("width", "block"), DEFAULT_BLOCKS)
def test_blocks_of_real_widths_are_wider(width, block):
    widths = [width] * 2 if isinstance(width, int) else list(width)
    assert resolve_align(None, shape=shape_of([16, 16], widths)) == block
    assert resolve_align(8, shape=shape_of(widths)) == 8
    assert PaperA().resolved(shape_of(widths)) == PaperA(align=block, min_width=block)
    assert PaperA(align=8).resolved(shape_of(widths)) == PaperA(align=8, min_width=block)
    assert ExpertDropping().resolved(shape_of(widths)) == ExpertDropping()


@pytest.mark.parametrize("method", [ExactGlobal, PaperA, UniformWidth])
@pytest.mark.parametrize(("width", "block"), [(512, 64), (128, 16)])
@pytest.mark.parametrize("prune_ratio", [0.0, 0.4])
def test_a_plan_records_the_blocks_it_was_made_in(method, width, block, prune_ratio):
    statistics = make_statistics(num_experts=4, width=width)
    plan = method().plan(statistics, prune_ratio=prune_ratio)
    settings = json.loads(plan.provenance["settings"])
    assert (plan.align, settings["align"], settings.get("min_width", block)) == (block,) * 3
    assert all(kept % block == 0 for index in range(2) for kept in plan.widths(index))
    explicit = method(align=block).plan(statistics, prune_ratio=prune_ratio)
    assert explicit.digest == plan.digest
    assert method(align=32).plan(statistics, prune_ratio=prune_ratio).align == 32


@pytest.mark.parametrize(("keep_ratio", "prune_ratio"), [(0.9, 0.1), (0.3, 0.7), (1, 0.0), (0.5, 0.5), (0.25, 0.75)])
def test_keep_ratio_is_the_other_word(keep_ratio, prune_ratio):
    assert resolve_prune_ratio(prune_ratio=None, keep_ratio=keep_ratio) == prune_ratio
    assert resolve_prune_ratio(prune_ratio=prune_ratio, keep_ratio=None) == prune_ratio


@pytest.mark.parametrize(
    ("prune_ratio", "keep_ratio", "message"),
    [
        (0.5, 0.5, "exactly one of `prune_ratio` .* got prune_ratio=0.5 and keep_ratio=0.5"),
        (None, None, "exactly one of `prune_ratio` .* got prune_ratio=None and keep_ratio=None"),
        (0.0, 1.0, "exactly one of `prune_ratio` .* got prune_ratio=0.0 and keep_ratio=1.0"),
        (1.0, None, r"`prune_ratio` must be in \[0, 1\), got 1.0"),
        (None, 0, r"`keep_ratio` must be in \(0, 1\], got 0"),
        (None, 1.1, r"`keep_ratio` must be in \(0, 1\], got 1.1"),
        (None, True, r"`keep_ratio` must be in \(0, 1\], got True"),
        (None, "0.5", r"`keep_ratio` must be in \(0, 1\], got '0.5'"),
        (None, float("nan"), r"`keep_ratio` must be in \(0, 1\], got nan"),
    ],
)
def test_one_ratio_in_one_word(prune_ratio, keep_ratio, message):
    with pytest.raises(ValueError, match=message):
        resolve_prune_ratio(prune_ratio=prune_ratio, keep_ratio=keep_ratio)


def test_methods_are_frozen_and_keyword_only():
    with pytest.raises(FrozenInstanceError, match="align"):
        ExactGlobal().align = 32  # pyright: ignore
    with pytest.raises(TypeError, match="positional"):
        ExactGlobal("channel_ablation")  # pyright: ignore


@pytest.mark.parametrize(
    ("method", "settings", "message"),
    [
        (ExactGlobal, {"criterion": "reap"}, r"`criterion` must be one of \['channel_ablation', .*\], got 'reap'"),
        (ExactGlobal, {"align": 0}, "`align` must be a whole number >= 1, got 0"),
        (ExactGlobal, {"layer_floor": -0.1}, r"`layer_floor` .* must be in \[0, 1\], got -0.1"),
        (ExactGlobal, {"expert_floor": 1.5}, "`expert_floor` must be a whole number >= 0, got 1.5"),
        (PaperA, {"criterion": "luck"}, "`criterion` must be one of .* got 'luck'"),
        (PaperA, {"expert_weight": "camera"}, r"`expert_weight` must be one of \['attribution', .* got 'camera'"),
        (PaperA, {"smoothing": "cubic"}, r"`smoothing` must be one of \['sqrt4', .* got 'cubic'"),
        (PaperA, {"alpha": 1.0}, "`alpha` must be between 0 and 1, both excluded, got 1.0"),
        (PaperA, {"min_width": 0}, "`min_width` must be a whole number >= 1, got 0"),
        (PaperA, {"align": "16"}, "`align` must be a whole number >= 1, got '16'"),
        (PaperA, {"layer_floor": 2}, r"`layer_floor` .* must be in \[0, 1\], got 2"),
        (UniformWidth, {"criterion": "x"}, "`criterion` must be one of .* got 'x'"),
        (UniformWidth, {"align": -1}, "`align` must be a whole number >= 1, got -1"),
        (ExpertDropping, {"criterion": "camera"}, r"`criterion` must be one of \['attribution', .* got 'camera'"),
        (ExpertDropping, {"scope": "model"}, r"`scope` must be one of \['layer', 'global'\], got 'model'"),
        (
            ExpertDropping,
            {"scope": "global"},
            r"`scope`='global' needs a criterion .*'aimer'\], got 'reap': outputs",
        ),
        (RandomExperts, {"seed": -1}, "`seed` must be a whole number >= 0, got -1"),
        (ExpertSparsity, {"max_subsets": 0.5}, "`max_subsets` must be a whole number >= 0, got 0.5"),
        (TBCoverage, {"utility": "camera"}, "`utility` must be one of .* got 'camera'"),
        (TBCoverage, {"protected_share": 1.5}, r"`protected_share` is a share and must be in \[0, 1\], got 1.5"),
        (TBCoverage, {"protected_count": -1}, "`protected_count` must be a whole number >= 0, got -1"),
        (TBCoverage, {"fill": "median"}, r"`fill` must be one of \['sum', 'mean', 'max', 'rank', 'pooled'\], got 'med"),
        (TBCoverage, {"normalise": "l2"}, r"`normalise` must be one of \['none', 'tokens', .* got 'l2'"),
        (TBCoverage, {"order": "random"}, r"`order` must be one of \['given', 'name', 'tokens'\], got 'random'"),
        (ChannelCoverage, {"criterion": "reap"}, "`criterion` must be one of .* got 'reap'"),
        (ChannelCoverage, {"protected_share": True}, "`protected_share` is a share and .* got True"),
        (ChannelCoverage, {"normalise": ""}, "`normalise` must be one of .* got ''"),
        (ChannelCoverage, {"order": "size"}, "`order` must be one of .* got 'size'"),
        (ChannelCoverage, {"align": 0}, "`align` must be a whole number >= 1, got 0"),
        (ChannelRanking, {"criterion": "reap"}, "`criterion` must be one of .* got 'reap'"),
        (ChannelRanking, {"layers": "v"}, r"`layers` must be one of \['global', 'uniform', 'u_shaped', .* got 'v'"),
        (ChannelRanking, {"strength": 2}, r"`strength` is a share and must be in \[0, 1\], got 2"),
        (ChannelRanking, {"smoothing": "cubic"}, r"`smoothing` must be one of \['sqrt4', .* got 'cubic'"),
    ],
)
def test_bad_settings_are_refused_at_once(method, settings, message):
    with pytest.raises(ValueError, match=message):
        method(**settings)


def test_plan_says_where_it_comes_from():
    statistics = make_statistics(corpora=("prose", "code"))
    plan = PaperA(min_width=8, align=8).plan(statistics, prune_ratio=0.5, corpora=["code"])
    assert (plan.method, plan.prune_ratio, plan.align, plan.shape) == ("paper_a", 0.5, 8, statistics.shape)
    assert plan.provenance["corpora"] == "code"
    assert plan.provenance["statistics"] == statistics.digest
    assert json.loads(plan.provenance["settings"])["expert_weight"] == "attribution"
    assert ExactGlobal().plan(statistics, prune_ratio=0.5).provenance["corpora"] == "prose, code"


def test_corpora_decide():
    statistics = make_statistics(corpora=("prose", "code"))
    plans = [ExactGlobal().plan(statistics, prune_ratio=0.5, corpora=names) for names in (["prose"], ["code"], None)]
    assert len({plan.digest for plan in plans}) == 3
    with pytest.raises(ValueError, match="`corpora` must name some of"):
        ExactGlobal().plan(statistics, prune_ratio=0.5, corpora=["poems"])


def test_a_method_of_ones_own():
    @dataclass(frozen=True, kw_only=True)
    class FirstExperts(PruningMethod):
        align: int = 1
        name: ClassVar[str] = "first"

        def keep(self, statistics, *, prune_ratio, corpora):
            return tuple(
                torch.arange(layer.num_channels) < (1 - prune_ratio) * layer.num_channels
                for layer in statistics.shape.layers
            )

    plan = build_method(FirstExperts()).plan(make_statistics(), prune_ratio=0.5)
    assert plan.widths(0) == (32, 32, 32, 32, 0, 0, 0, 0)


# --- exact_global ---------------------------------------------------------------------------------------------------


def test_exact_global_by_hand():
    # Scores are channel_ablation * down_sq_norm: 1*4=4, 3*1=3 | 2*1=2, 1*1=1 || 5*2=10, 0 | 1*1=1, 1*6=6
    statistics = hand_statistics(
        shape_of([2, 2], [2, 2]),
        layers=[
            {"channel_ablation": [1, 3, 2, 1], "down_sq_norm": [4, 1, 1, 1]},
            {"channel_ablation": [5, 0, 1, 1], "down_sq_norm": [2, 9, 1, 6]},
        ],
    )
    plan = ExactGlobal(align=1).plan(statistics, prune_ratio=0.5)
    assert [keep_C.int().tolist() for keep_C in plan.keep] == [[1, 1, 0, 0], [1, 0, 0, 1]]


def test_super_experts_keep_a_block_unless_switched_off():
    # Expert 3 of layer 0 contributes nothing to the ablation but has by far the largest output.
    layers = [
        {"channel_ablation": [9.0] * 6 + [0.0] * 2, "max_abs": [1, 1, 1, 500]},
        {"channel_ablation": [9.0] * 8, "max_abs": [1, 1, 1, 1]},
    ]
    statistics = hand_statistics(shape_of([2] * 4, [2] * 4), layers=layers)
    protected = ExactGlobal(align=2).plan(statistics, prune_ratio=0.5)
    assert protected.widths(0)[3] == 2
    bare = ExactGlobal(align=2, protect_super_experts=False).plan(statistics, prune_ratio=0.5)
    assert bare.widths(0)[3] == 0
    assert bare.num_kept == protected.num_kept == 8


@pytest.mark.parametrize(("method", "settings"), [(ExactGlobal, {"align": 8}), (PaperA, {"align": 8, "min_width": 8})])
def test_floors_hold(method, settings):
    statistics = make_statistics(num_layers=3, num_experts=16)
    # The last layer is nearly worthless, by every measure.
    weak = [dict(layer) for layer in statistics.corpora["text"]]
    for name in ("channel_ablation", "gate_sq", "up_sq", "hidden_sq", "layer_energy"):
        weak[2][name] = weak[2][name] * 1e-6
    statistics = replace(statistics, corpora={"text": tuple(weak)})
    plan = method(layer_floor=0.4, expert_floor=5, **settings).plan(statistics, prune_ratio=0.5)
    for index in range(3):
        assert sum(plan.widths(index)) >= 0.4 * 16 * 32
        assert min(plan.widths(index)) >= 8  # 5 channels are one block of 8
    assert plan.num_kept == statistics.shape.num_channels // 2
    with pytest.raises(ValueError, match="budget"):
        method(layer_floor=0.6, **settings).plan(statistics, prune_ratio=0.5)
