"""The largest whole number within a limit, when every try is expensive."""

from collections.abc import Callable

_BISECT_EVERY = 3


def largest_within(
    excess: Callable[[int], float | None],
    *,
    highest: int,
    origin: float,
    start: int | None = None,
    enough: float = 0.0,
) -> tuple[int | None, int]:
    """Searches `[1, highest]` for the largest number whose excess is at most 0, in about five tries where it is smooth.

    Interpolation between the ends of a bracket (the Illinois rule: the end that stays twice counts half), and a
    bisection at every third try, so that steps and bends cost at most three times what bisection would.

    Args:
        excess: Rises with the number; above 0 is over the limit, None is a number too small to be tried.
        highest: A number that is over the limit.
        origin: Excess at 0, below 0; only a guess comes from it.
        start: First guess, where one is known.
        enough: Stop once a number within the limit has an excess of `-enough` or more.

    Returns:
        The number (None if each is over the limit or too small), and the smallest number found to be over.

    Examples:
        >>> largest_within(lambda number: number**2 - 50, highest=20, origin=-50)
        (7, 8)
    """
    best, low, below = None, 0, min(origin, -1e-12)
    high, above = highest, excess(highest) or 1e-12
    side, step = 0, 0
    while high - low > 1 and not (best == low and -below <= enough):
        guess = _next_guess(low, high, below=below, above=above, step=step) if start is None else start
        guess = min(max(guess, low + 1), high - 1)
        found = excess(guess)
        start = None if start is None or found is None or step else guess + (1 if found <= 0 else -1)
        if found is None:
            low = guess
        elif found <= 0:
            best = low = guess
            below, above, side = min(found, -1e-12), above / 2 if side < 0 else above, -1
        else:
            high = guess
            above, below, side = found, below / 2 if side > 0 else below, 1
        step += 1
    return best, high


def _next_guess(low: int, high: int, *, below: float, above: float, step: int) -> int:
    if step % _BISECT_EVERY == _BISECT_EVERY - 1:
        return (low + high) // 2
    return low + round((high - low) * below / (below - above))
