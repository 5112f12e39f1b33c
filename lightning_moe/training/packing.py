"""Packing: token streams and examples into rows of equal length.

Text is joined by end-of-text tokens (and the tokenizer's beginning-of-text tokens, if it has them begin a text) and
cut into windows, every token in exactly one row. Examples with a prompt are never cut to continue in another row: whole
ones share a row as long as they fit, and one longer than a row keeps its beginning. As usual for packed text, a token
also attends to what precedes it in its row from another document.
"""

# N rows, S tokens in a row, T tokens of a stream, R of its last, partial row

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.utils.data import Dataset

NO_LOSS = -100


@dataclass(frozen=True, kw_only=True)
class TokenSpan:
    """Tokens of one example and, for each, whether it carries loss."""

    input_ids: list[int]
    learn: list[bool]


class Rows(Dataset[dict[str, Tensor]]):
    """Rows of tokens as training reads them.

    Args:
        input_ids_NS: Tokens, int32, padding at the end of a row.
        length_N: Tokens of each row that are not padding.
        learn_NS: Which tokens carry loss; None: all but padding.
    """

    def __init__(self, *, input_ids_NS: Tensor, length_N: Tensor, learn_NS: Tensor | None = None) -> None:
        self.input_ids_NS = input_ids_NS
        self.length_N = length_N
        self.learn_NS = learn_NS

    def __len__(self) -> int:
        return len(self.input_ids_NS)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        """Return `input_ids`, `attention_mask` and `labels` of one row, int64 [S]; labels are not shifted."""
        input_ids_S = self.input_ids_NS[index].long()
        mask_S = torch.arange(len(input_ids_S)) < self.length_N[index]
        learn_S = mask_S if self.learn_NS is None else self.learn_NS[index]
        return {
            "input_ids": input_ids_S,
            "attention_mask": mask_S.long(),
            "labels": input_ids_S.masked_fill(~learn_S, NO_LOSS),
        }

    @property
    def num_tokens(self) -> int:
        """Tokens without padding."""
        return int(self.length_N.sum())


def pack_stream(stream_T: Tensor, *, sequence_length: int, padding: int, keep_last: bool) -> Rows:
    """Cut a stream of tokens (int32) into rows; the last, partial one is padded or dropped.

    Examples:
        >>> rows = pack_stream(torch.arange(5), sequence_length=2, padding=9, keep_last=True)
        >>> rows.input_ids_NS.tolist(), rows.num_tokens
        ([[0, 1], [2, 3], [4, 9]], 5)
    """
    num_full = len(stream_T) // sequence_length
    full_NS = stream_T[: num_full * sequence_length].view(num_full, sequence_length)
    rest_R = stream_T[num_full * sequence_length :]
    length_N = torch.full((num_full,), sequence_length)
    if keep_last and len(rest_R):
        last_1S = torch.full((1, sequence_length), padding, dtype=stream_T.dtype)
        last_1S[0, : len(rest_R)] = rest_R
        full_NS = torch.cat([full_NS, last_1S])
        length_N = torch.cat([length_N, torch.tensor([len(rest_R)])])
    return Rows(input_ids_NS=full_NS, length_N=length_N)


def pack_examples(examples: Sequence[TokenSpan], *, sequence_length: int, padding: int) -> Rows:
    """Lay whole examples into rows in their order, a new row where the next one does not fit; the rest is padding.

    An example longer than a row is truncated, and left out if none of its first `sequence_length` tokens carries loss.
    """
    rows: list[TokenSpan] = []
    for example in examples:
        ids, learn = example.input_ids[:sequence_length], example.learn[:sequence_length]
        if not any(learn):
            continue
        if not rows or len(rows[-1].input_ids) + len(ids) > sequence_length:
            rows.append(TokenSpan(input_ids=[], learn=[]))
        rows[-1].input_ids.extend(ids)
        rows[-1].learn.extend(learn)
    input_ids_NS = torch.full((len(rows), sequence_length), padding, dtype=torch.int32)
    learn_NS = torch.zeros(len(rows), sequence_length, dtype=torch.bool)
    for index, row in enumerate(rows):
        input_ids_NS[index, : len(row.input_ids)] = torch.tensor(row.input_ids, dtype=torch.int32)
        learn_NS[index, : len(row.learn)] = torch.tensor(row.learn)
    length_N = torch.tensor([len(row.input_ids) for row in rows], dtype=torch.int64)
    return Rows(input_ids_NS=input_ids_NS, length_N=length_N, learn_NS=learn_NS)
