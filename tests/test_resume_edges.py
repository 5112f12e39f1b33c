"""Corners of an exact resume: the second of two Gaussian numbers, generators of a loader, a skip that happens once."""

import random

import torch
from torch.utils.data import TensorDataset

from lightning_moe.training.loading import ReadingPosition, ResumableLoader
from lightning_moe.training.random_state import random_state, set_random_state


def test_the_second_of_two_gaussian_numbers_comes_after_a_resume():
    before = random_state()
    try:
        random.seed(7)
        random.gauss(0, 1)  # makes two numbers and keeps one
        state = random_state()
        expected = random.gauss(0, 1), random.random()
        random.seed(8)
        set_random_state(state)
        assert (random.gauss(0, 1), random.random()) == expected
    finally:
        set_random_state(before)


def test_generators_go_on_where_they_were():
    own = [torch.Generator().manual_seed(seed) for seed in (1, 2)]
    state = random_state(own)
    expected = [torch.rand(3, generator=generator).tolist() for generator in own]
    others = [torch.Generator().manual_seed(9) for _ in own]
    set_random_state(state, others)
    assert [torch.rand(3, generator=generator).tolist() for generator in others] == expected


def test_batches_are_skipped_once():
    rows = TensorDataset(torch.arange(5))
    position = ReadingPosition(skip_epoch=0, skip_batches=2)
    loader = ResumableLoader(rows, position=position, batch_size=1)
    read = [[int(batch[0]) for batch in loader] for _ in range(2)]
    assert read == [[2, 3, 4], [0, 1, 2, 3, 4]]
    assert position.num_batches == 5
