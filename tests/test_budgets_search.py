"""The search itself, on functions whose answer is known."""

import pytest

from lightning_moe.allocation.search import largest_within


def count_tries(function, *, answer, highest, origin, **settings):
    tries = []

    def excess(number):
        assert 1 <= number <= highest
        tries.append(number)
        return function(number)

    best, over = largest_within(excess, highest=highest, origin=origin, **settings)
    assert (best, over) == (answer, answer + 1 if answer else over)
    return len(tries)


@pytest.mark.parametrize("highest", [2, 3, 17, 1000, 73_728, 10**7])
@pytest.mark.parametrize("share", [0.001, 0.2, 0.5, 0.999])
def test_lines_take_a_few_tries(highest, share):
    answer = max(1, min(int(share * highest), highest - 1))
    tries = count_tries(lambda n: (n - answer - 0.5) / highest, answer=answer, highest=highest, origin=-share)
    assert tries <= 8


@pytest.mark.parametrize("power", [0.3, 3.0, 6.0])
def test_bends_take_no_more_than_bisection_thrice(power):
    highest, answer = 100_000, 31_415
    limit = ((answer + 0.5) / highest) ** power
    tries = count_tries(lambda n: (n / highest) ** power - limit, answer=answer, highest=highest, origin=-limit)
    assert tries <= 30


def test_steps():
    # 0.1 a thousand: over from 3000 on.
    tries = count_tries(lambda n: (n // 1000) / 10 - 0.25, answer=2999, highest=50_000, origin=-0.25)
    assert tries <= 48


def test_numbers_too_small_to_be_tried():
    best, over = largest_within(lambda n: None if n < 40 else n - 100.5, highest=1000, origin=-100.5)
    assert (best, over) == (100, 101)
    best, over = largest_within(lambda n: None if n < 400 else n - 100.5, highest=1000, origin=-100.5)
    assert (best, over) == (None, 400)
    best, over = largest_within(lambda n: n + 1.0, highest=1000, origin=-1.0)
    assert (best, over) == (None, 1)


def test_a_good_start_and_enough_save_tries():
    def line(number):
        return (number - 500.5) / 1000

    assert count_tries(line, answer=500, highest=1000, origin=-0.5, start=500) == 3
    assert count_tries(line, answer=500, highest=1000, origin=-0.5, start=501) == 3
    best, _ = largest_within(line, highest=1000, origin=-0.4, enough=0.1)
    assert 400 <= best <= 500
