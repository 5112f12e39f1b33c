import pytest
import torch
from statistics_factory import shape_of

from lightning_moe.allocation.alignment import Alignment, Demand, align_widths
from lightning_moe.records import LayerShape


def make_layer(*widths, top_k=1, **groups):
    return LayerShape(name="model.layers.3.mlp.experts", widths=widths, top_k=top_k, **groups)


def aligned(layer, *, ideal, num_blocks, align=2, min_width=2, floor=None, value=None):
    """Widths as a list; without `value` the first of equal experts is the most valuable."""
    num = layer.num_experts
    demand = Demand(
        ideal_E=torch.tensor(ideal),
        value_E=torch.tensor(value or list(range(num, 0, -1)), dtype=torch.float64),
        floor_E=torch.tensor(floor or [0] * num),
        num_blocks=num_blocks,
    )
    return align_widths(layer, demand=demand, alignment=Alignment(align=align, min_width=min_width)).tolist()


def test_aligned_demand_is_left_alone():
    assert aligned(make_layer(8, 8, 8), ideal=[8, 4, 2], num_blocks=7) == [8, 4, 2]


def test_narrow_experts_are_evicted_and_their_channels_return():
    # 3 and 1 are below 4 and go. 7 and 5 become 6 and 4; 3 of 8 blocks are free: both lost one channel and get a block
    # each (8 and 6); the last block goes to the expert with room: 8 and 8.
    assert aligned(make_layer(8, 8, 8, 8), ideal=[7, 5, 3, 1], num_blocks=8, min_width=4) == [8, 8, 0, 0]


def test_largest_remainder_comes_first():
    # Floors 4, 4, 8 leave 2 of 6 blocks of 4; the losses are 3, 2, 3.
    assert aligned(make_layer(12, 12, 12), ideal=[7, 6, 11], num_blocks=6, align=4, min_width=4) == [8, 4, 12]


def test_equal_remainders_go_to_the_expert_with_most_room():
    # Both lose 1 of 5; one block: the second expert has room for 6 more blocks, the first for 2.
    assert aligned(make_layer(8, 16), ideal=[5, 5], num_blocks=5) == [4, 6]


def test_equal_remainders_and_room_go_to_the_more_valuable_expert():
    assert aligned(make_layer(8, 8), ideal=[5, 5], num_blocks=5, value=[1.0, 2.0]) == [4, 6]


def test_full_expert_passes_its_block_on():
    # Expert 0 lost 1 channel of its partial block (9 = 4 blocks + 1) and is full; expert 1 takes the freed block.
    assert aligned(make_layer(9, 9), ideal=[9, 1], num_blocks=5, min_width=2) == [8, 2]


def test_blocks_after_the_first_go_where_most_room_is():
    # Only expert 0 and 1 stay: 2 + 2 of 8 blocks, nothing lost, room 6 and 4. One at a time to the one with most room:
    # 3 2 | 4 2 | then equal room 4: value, 5 2 | 5 3.
    layer = make_layer(16, 12, 8, 8)
    assert aligned(layer, ideal=[4, 4, 1, 1], num_blocks=8, min_width=4) == [10, 6, 0, 0]


def test_min_width_is_rounded_up_to_blocks():
    # 5 channels are 3 blocks of 2: the experts of 5 and 4 go, 6 stays and takes their room.
    assert aligned(make_layer(16, 16, 16), ideal=[6, 5, 4], num_blocks=7, min_width=5) == [14, 0, 0]


def test_top_k_experts_stay_however_narrow():
    # Both other experts are below 4; top_k = 2 brings the wider one back at 4 channels, paid by expert 0.
    assert aligned(make_layer(12, 12, 12, top_k=2), ideal=[10, 1, 3], num_blocks=7, min_width=4) == [10, 0, 4]


def test_every_group_keeps_two_experts():
    layer = make_layer(8, 8, 8, 8, 8, 8, top_k=2, num_groups=2, top_k_groups=1)
    widths = aligned(layer, ideal=[8, 8, 6, 1, 1, 0], num_blocks=12)
    assert widths == [8, 8, 4, 2, 2, 0]
    layer.check_reachable(widths)


def test_protected_expert_keeps_its_floor():
    # 4 channels for expert 2 overdraw the 6 blocks by 2: all others sit at their ideal, so the less valuable one of
    # them pays first, and then the one that has lost least so far.
    assert aligned(make_layer(8, 8, 8), ideal=[8, 4, 0], num_blocks=6, floor=[0, 0, 4]) == [6, 2, 4]


def test_protected_expert_keeps_at_least_min_width():
    assert aligned(make_layer(8, 8), ideal=[8, 0], num_blocks=4, floor=[0, 1], min_width=4) == [4, 4]


def test_floor_above_an_expert_is_all_of_it():
    assert aligned(make_layer(8, 4), ideal=[8, 0], num_blocks=4, floor=[0, 100]) == [4, 4]


def test_evicted_experts_return_when_the_others_are_full():
    # Expert 0 is full at 4 of the 6 blocks: one of the two that were too narrow returns, at the minimum.
    assert aligned(make_layer(8, 8, 8), ideal=[8, 2, 2], num_blocks=6, min_width=4) == [8, 4, 0]
    # With 5 blocks the one that returns needs 2, so expert 0 gives one of its own.
    assert aligned(make_layer(8, 8, 8), ideal=[8, 1, 1], num_blocks=5, min_width=4) == [6, 4, 0]
    assert aligned(make_layer(4, 4, 4), ideal=[4, 3, 3], num_blocks=6, min_width=4) == [4, 4, 4]


def test_poorest_survivors_go_when_the_protected_ones_take_the_budget():
    # Expert 3 is protected with 4 channels = 2 of 3 blocks: of the three others only one can stay.
    assert aligned(make_layer(8, 8, 8, 8), ideal=[2, 2, 2, 0], num_blocks=3, floor=[0, 0, 0, 4]) == [2, 0, 0, 4]


def test_masked_experts_stay_masked():
    assert aligned(make_layer(8, 0, 8), ideal=[6, 0, 2], num_blocks=4) == [6, 0, 2]


def test_narrow_stock_experts_may_stay_whole():
    # Expert 1 has 4 channels in all, less than the minimum of 6: it may stay with them.
    assert aligned(make_layer(8, 4), ideal=[8, 4], num_blocks=6, min_width=6) == [8, 4]


@pytest.mark.parametrize(
    ("layer", "settings", "message"),
    [
        # top_k = 3 experts of 4 channels need 6 blocks
        (
            make_layer(8, 8, 8, top_k=3),
            {"ideal": [4, 2, 2], "num_blocks": 4, "min_width": 4},
            r"budget of 4 blocks of `align`=2 channels does not fit: 3 experts must stay \(top_k=3.*need 6 blocks",
        ),
        (
            make_layer(8, 8),
            {"ideal": [8, 8], "num_blocks": 9},
            "budget of 9 blocks .* need 1 blocks, all 2 experts hold 8",
        ),
        # 5 blocks in two experts that are 0 or 4 wide
        (
            make_layer(8, 8),
            {"ideal": [8, 2], "num_blocks": 5, "min_width": 8},
            "budget of 5 blocks of `align`=2 channels does not fit: 1 experts must stay",
        ),
        (
            make_layer(8, 8),
            {"ideal": [4, 2], "num_blocks": 3, "floor": [0, 8]},
            "budget of 3 blocks .* 2 experts must stay .* need 5 blocks",
        ),
    ],
)
def test_layer_that_cannot_be_served_is_named(layer, settings, message):
    with pytest.raises(ValueError, match=f"model.layers.3.mlp.experts: the layer's {message}"):
        aligned(layer, **settings)


@pytest.mark.parametrize("settings", [{"align": 0}, {"min_width": 0}, {"align": 1.5}, {"min_width": -3}])
def test_bad_settings_are_refused(settings):
    with pytest.raises(ValueError, match=rf"`{next(iter(settings))}` must be a whole number >= 1, got"):
        Alignment(**settings)


@pytest.mark.parametrize("groups", [{}, {"num_groups": 4, "top_k_groups": 2}])
@pytest.mark.parametrize(("align", "min_width"), [(1, 1), (4, 4), (8, 16), (16, 8)])
@pytest.mark.parametrize("seed", range(8))
def test_random_layers_meet_every_rule(seed, align, min_width, groups):
    generator = torch.Generator().manual_seed(seed)
    layer = make_layer(*(64,) * 16, top_k=4, **groups)
    ideal_E = (torch.rand(16, generator=generator) ** 2 * 65).long()
    num_blocks = max(int(ideal_E.sum()) // align, 8 * -(-min_width // align))
    floor = [0] * 15 + [min_width if seed % 2 else 0]
    value = torch.rand(16, generator=generator).tolist()
    widths = aligned(
        layer,
        ideal=ideal_E.tolist(),
        num_blocks=num_blocks,
        align=align,
        min_width=min_width,
        floor=floor,
        value=value,
    )
    assert sum(widths) == num_blocks * align
    assert all(width % align == 0 for width in widths)
    assert all(width == 0 or min_width <= width <= 64 for width in widths)
    assert widths[15] >= floor[15]
    layer.check_reachable(widths)


def test_permuted_experts_give_permuted_widths():
    generator = torch.Generator().manual_seed(0)
    ideal_E = torch.randint(0, 33, (16,), generator=generator)
    value_E = torch.rand(16, generator=generator)
    order = torch.randperm(16, generator=generator)
    settings = {"num_blocks": int(ideal_E.sum()) // 8, "align": 8, "min_width": 8}
    layer = make_layer(*shape_of([32] * 16).layers[0].widths, top_k=2)
    before = aligned(layer, ideal=ideal_E.tolist(), value=value_E.tolist(), **settings)
    after = aligned(layer, ideal=ideal_E[order].tolist(), value=value_E[order].tolist(), **settings)
    assert after == [before[index] for index in order.tolist()]
