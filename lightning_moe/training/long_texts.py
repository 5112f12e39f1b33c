"""Documents of hundreds of megabytes, in pieces: a tokenizer takes many times the memory of a text that it is given."""

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass

LONGEST = 2**20  # characters: two to three hundred times as many bytes while they are tokenised
_TEXTS_AT_ONCE = 256
# Where a text is cut: so many characters back at most, and what a tokenizer makes of so many around it decides.
_LOOKED_BACK, _AROUND = 2**14, 256

Tokenize = Callable[[str], list[int]]


@dataclass(frozen=True, kw_only=True)
class Piece:
    """A document, or a part of a long one.

    Args:
        text: what is tokenised.
        begins: whether the document begins here.
        ends: whether it ends here.
    """

    text: str
    begins: bool = True
    ends: bool = True


def pieces(text: str, *, tokenize: Tokenize) -> Iterator[Piece]:
    """A document as it is or, with more than `LONGEST` characters, cut where its tokens stay those of the whole.

    That is before a space or in its place, whatever the tokenizer does alike. In a text that has no such place, say
    one without spaces, tokens at the cuts may be others.

    Args:
        text: not empty.
        tokenize: tokens of a text, no special ones added.
    """
    start = 0
    while len(text) - start > LONGEST:
        stop, again = _cut(text, first=start + 1, last=start + LONGEST, tokenize=tokenize)
        yield Piece(text=text[start:stop], begins=start == 0, ends=False)
        start = again
    yield Piece(text=text[start:], begins=start == 0)


def _cut(text: str, *, first: int, last: int, tokenize: Tokenize) -> tuple[int, int]:
    """Where a piece ends and where the next one starts."""
    place = last
    while (place := text.rfind(" ", max(first, last - _LOOKED_BACK), place)) >= 0:
        begin, end = max(place - _AROUND, 0), place + _AROUND
        whole, before = tokenize(text[begin:end]), tokenize(text[begin:place])
        for again in (place, place + 1):
            if before + tokenize(text[again:end]) == whole:
                return place, again
    return last, last


def batches(texts: Iterable[Piece]) -> Iterator[list[Piece]]:
    """As many as are tokenised at once."""
    batch: list[Piece] = []
    length = 0
    for piece in texts:
        batch.append(piece)
        length += len(piece.text)
        if len(batch) == _TEXTS_AT_ONCE or length >= LONGEST:
            yield batch
            batch, length = [], 0
    if batch:
        yield batch
