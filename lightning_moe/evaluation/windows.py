"""Sliding windows over a text, so that every token is predicted with enough before it.

T tokens of the text, S tokens in a window, B windows.
"""

from collections.abc import Iterator

import torch
from torch import Tensor


class SlidingWindows:
    """Batches for `evaluate_model`: windows of `context` tokens that advance by `stride`, as in strided perplexity.

    The first window predicts all of its tokens but the first, each later one only those that the window before it did
    not reach: so every token of the text is predicted exactly once, from at least `context - stride` tokens before it
    (from all there are, near the beginning of the text). The very first token is not predicted, as nothing precedes
    it; where a tokenizer begins texts with a token of its own, it is that one. The last window begins early enough to
    be full.

    Args:
        token_T: the text.
        context: tokens in a window, at least 2.
        stride: tokens between the beginnings of two windows, from 1 to `context` - 1.
        batch_size: windows in a batch.

    Raises:
        ValueError: a size out of its range.
    """

    def __init__(self, token_T: Tensor, *, context: int, stride: int, batch_size: int) -> None:
        if not 1 <= stride < context:
            raise ValueError(
                f"`stride` must be from 1 to {context - 1}, one less than the {context} tokens of a window, got "
                f"{stride}. Leave it out for windows that do not overlap."
            )
        if batch_size < 1:
            raise ValueError(f"`batch_size` must be at least 1, got {batch_size}.")
        self.token_T = token_T.long()
        self.context = context
        self.stride = stride
        self.batch_size = batch_size

    def spans(self) -> list[tuple[int, int, int]]:
        """(begin, first predicted token, end) of every window.

        Examples:
            >>> SlidingWindows(torch.arange(8), context=4, stride=2, batch_size=1).spans()
            [(0, 0, 4), (2, 4, 6), (4, 6, 8)]
        """
        length, end = len(self.token_T), min(self.context, len(self.token_T))
        spans = [(0, 0, end)]
        while end < length:
            first, end = end, min(end + self.stride, length)
            spans.append((end - self.context, first, end))
        return spans

    def __len__(self) -> int:
        return -(-len(self.spans()) // self.batch_size)

    def __iter__(self) -> Iterator[dict[str, Tensor]]:
        spans = self.spans()
        for start in range(0, len(spans), self.batch_size):
            part = spans[start : start + self.batch_size]
            input_ids_BS = torch.stack([self.token_T[begin:end] for begin, _, end in part])
            labels_BS = input_ids_BS.clone()
            for row, (begin, first, _) in enumerate(part):
                labels_BS[row, : first - begin] = -100
            yield {"input_ids": input_ids_BS, "attention_mask": torch.ones_like(input_ids_BS), "labels": labels_BS}
