"""Which rows a grid makes, their names, and what it refuses."""

import pytest

from lightning_moe.evaluation.compare import Grid, GridMethod, StageSpec, needs_gradients


def names(**settings):
    return [row.name for row in Grid(**settings).rows()]


def test_every_combination_has_a_readable_name_of_its_own():
    made = names(
        methods=["paper_a", GridMethod(method="exact_global", name="ours", bits=[4])],
        ratios=[0.25, 0.5],
        repair=[False, True],
        samples=2,
    )
    # The dense model in 4 bit, and 2 methods x 2 samples x 2 ratios x 2 repairs.
    assert len(made) == len(set(made)) == 1 + 16
    assert made[:5] == [
        "dense_nf4",
        "paper_a_25_s0",
        "paper_a_25_repaired_s0",
        "paper_a_50_s0",
        "paper_a_50_repaired_s0",
    ]
    assert made[-1] == "ours_50_repaired_nf4_s1"


def test_a_row_says_what_it_is():
    (row,) = Grid(methods=[GridMethod(method="reap", name="r", novices=True)], ratios=[0.375]).rows()
    assert row.name == "r_37.5_novices_s0"
    said = row.columns()
    assert (said["method"], said["ratio"], said["bits"], said["sample"]) == ("r", 0.375, 16, 0)
    assert said["novices"]
    assert said["export"] is None  # so that a row found under this name keeps none of another


def test_keep_ratios_are_the_other_word():
    rows = Grid(methods=["paper_a"], keep_ratios=[0.9, 0.25]).rows()
    assert [row.requested_ratio for row in rows] == [0.1, 0.75]
    assert [row.name for row in rows] == ["paper_a_10_s0", "paper_a_75_s0"]


def test_whole_experts_leave_nothing_to_repair():
    assert names(methods=["reap"], ratios=[0.5], repair=[False, True]) == ["reap_50_s0"]
    assert names(methods=["reap"], ratios=[0.5], repair=[True]) == ["reap_50_s0"]
    both = names(methods=["reap"], ratios=[0.5], repair=[True, "after_nf4"], bits=[16, 4])
    assert both == ["dense_nf4", "reap_50_repaired_after_nf4_s0"]


def test_a_repair_after_nf4_has_no_16_bit_row():
    made = names(methods=["uniform"], ratios=[0.5], repair=[False, "after_nf4"], bits=[16, 4])
    assert made == ["dense_nf4", "uniform_50_s0", "uniform_50_nf4_s0", "uniform_50_repaired_after_nf4_s0"]


def test_uniform_rows_have_the_order_of_the_method():
    rows = Grid(methods=["paper_a", "reap", "uniform"], ratios=[0.5], uniform_row=True).rows()
    assert [row.name for row in rows] == ["paper_a_50_s0", "paper_a_50_uniform_s0", "reap_50_s0", "uniform_50_s0"]
    assert rows[1].method == "uniform"
    assert rows[1].method_args["criterion"] == "activation_norm"
    assert rows[1].columns()["export"] == "uniform width"
    assert rows[1].columns()["method"] == "paper_a"


def test_chance_differs_from_sample_to_sample():
    seeds = [row.method_args["seed"] for row in Grid(methods=["random"], ratios=[0.5], samples=3).rows()]
    assert seeds == [0, 1, 2]
    given = GridMethod(method="random", method_args={"seed": 7})
    assert [row.method_args["seed"] for row in Grid(methods=[given], ratios=[0.5], samples=2).rows()] == [7, 7]


def test_gradients_are_gathered_where_a_method_asks():
    assert needs_gradients(Grid(methods=["reap", "taylor"], ratios=[0.5]).rows())
    own = GridMethod(method="uniform", method_args={"criterion": "snip"})
    assert needs_gradients(Grid(methods=[own], ratios=[0.5]).rows())
    assert not needs_gradients(Grid(methods=["reap", "paper_a"], ratios=[0.5]).rows())


@pytest.mark.parametrize(
    ("settings", "match"),
    [
        ({"methods": []}, "`methods` of the grid is an empty list"),
        ({"ratios": []}, "`ratios` of the grid is an empty list"),
        ({"ratios": None, "keep_ratios": []}, "`keep_ratios` of the grid is an empty list"),
        ({"ratios": None}, "exactly one of `ratios` .* got ratios=None and keep_ratios=None"),
        ({"keep_ratios": [0.5]}, r"got ratios=\[0.5\] and keep_ratios=\[0.5\]"),
        ({"bits": []}, "`bits of paper_a` of the grid is an empty list"),
        ({"repair": []}, "`repair of paper_a` of the grid is an empty list"),
        ({"ratios": [1.0]}, r"`prune_ratio` must be in \[0, 1\), got 1.0"),
        ({"methods": ["magic"]}, "got 'magic'"),
        ({"methods": [GridMethod(method="reap", method_args={"x": 1})]}, r"has the settings .* got \['x'\]"),
        ({"methods": ["reap", "reap"]}, r"makes \['reap_50_s0'\] more than once"),
        ({"ratios": [0.5, 0.5]}, "more than once"),
        ({"samples": 0}, "`samples` must be a whole number >= 1, got 0"),
        ({"repair": ["after_nf4"]}, r"`repair: after_nf4` of paper_a needs 4 among its `bits`, got \[16\]"),
        ({"novices": True, "calibrations": 2}, "`novices` of stage .* go with `calibrations: 1`, got 2"),
        ({"methods": ["uniform", "snip"], "calibrations": 2}, "'snip_50_c2_s0' scores by gradients.*`calibrations: 1`"),
        ({"calibrations": 0}, "`calibrations` must be a whole number >= 1, got 0"),
    ],
)
def test_a_wrong_grid_is_refused(settings, match):
    with pytest.raises(ValueError, match=match):
        Grid(**({"methods": ["paper_a"], "ratios": [0.5]} | settings)).rows()


def test_a_single_row_repaired_after_nf4_needs_4_bit():
    with pytest.raises(ValueError, match="`repair: after_nf4` of stage 'x' needs `bits: 4`, got 16"):
        StageSpec(name="x", prune_ratio=0.5, repair="after_nf4")
    with pytest.raises(ValueError, match="`sample` must be a whole number >= 0, got -1"):
        StageSpec(name="x", prune_ratio=0.5, sample=-1)
