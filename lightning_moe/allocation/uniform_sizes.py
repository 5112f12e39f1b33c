"""What a model takes when every expert keeps the same number of channels, from its config alone."""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from functools import cached_property
from math import ceil
from pathlib import Path

import torch
from transformers import PretrainedConfig

from lightning_moe.allocation.uniform import kept_width
from lightning_moe.allocation.units import format_bytes
from lightning_moe.quantization.size import Bits, ModelSizes, sizes_of
from lightning_moe.quantization.stock import stock_bytes


@dataclass(frozen=True, kw_only=True)
class Sizes:
    """One model.

    Args:
        stored_params: Logical parameters, a packed weight counted as one.
        active_params: Parameters that a token uses, every expert used equally often.
        bytes: The folder as it is stored: embeddings, routers and norms unpacked, scales, headers and configs.
        nominal_bytes: What papers count: every parameter at the bit-width of the experts, and nothing else.
    """

    stored_params: int
    active_params: int
    bytes: int
    nominal_bytes: int


@dataclass(frozen=True, kw_only=True, eq=False)
class UniformSizes:
    """Sizes of the uniformly cut models that a config describes.

    Args:
        config: Of a known family, not cut.
        dtype: Type of the weights that are not packed.
        rest_bytes: Of `generation_config.json`; what transformers makes of the config if None.
        index: Of the shards of the stock model, where there are any; see `stock_bytes`.
    """

    config: PretrainedConfig
    dtype: torch.dtype
    rest_bytes: int | None = None
    index: Path | None = None

    @cached_property
    def unpacked(self) -> ModelSizes:
        """In the type of the weights."""
        return self._sizes(bits=16)

    @cached_property
    def packed(self) -> ModelSizes:
        """In NF4."""
        return self._sizes(bits=4)

    def _sizes(self, *, bits: Bits) -> ModelSizes:
        sizes = sizes_of(self.config, bits=bits, dtype=self.dtype)
        return sizes if self.rest_bytes is None else replace(sizes, rest_bytes=self.rest_bytes)

    @cached_property
    def original(self) -> Sizes:
        """The stock model as transformers stores it."""
        num_bytes = stock_bytes(self.config, dtype=self.dtype, rest_bytes=self.rest_bytes, index=self.index)
        return replace(self.cut(self.width, bits=16), bytes=num_bytes)

    @cached_property
    def width(self) -> int:
        """Channels of an expert before any cut."""
        return max(width for layer in self.unpacked.layers for width in layer.widths)

    def cut(self, width: int, *, bits: Bits) -> Sizes:
        """The model whose experts have `width` channels, as `prune` writes it."""
        sizes = self.packed if bits == 4 else self.unpacked
        widths = [[width] * len(layer.widths) for layer in sizes.layers]
        usage = [torch.full((len(layer.widths),), layer.top_k / len(layer.widths)) for layer in sizes.layers]
        stored = sizes.stored_params(widths)
        nominal_bits = 4 if bits == 4 else 8 * self.dtype.itemsize
        return Sizes(
            stored_params=stored,
            active_params=round(sizes.active_params(widths, usage=usage)),
            bytes=sizes.num_bytes(widths),
            nominal_bytes=ceil(stored * nominal_bits / 8),
        )

    def widest_within(self, num_bytes: int, *, bits: Bits, align: int) -> int:
        """The most channels, all or a multiple of `align`, with which the folder takes at most `num_bytes`.

        Raises:
            ValueError: one block in each expert is too much already; or `align` is wider than an expert.
        """
        most = kept_width(self.width, prune_ratio=0, align=align) // align
        widths: Sequence[int] = sorted({*range(align, align * most + 1, align), self.width})
        found, above = -1, len(widths)
        while above - found > 1:
            middle = (found + above) // 2
            fits = self.cut(widths[middle], bits=bits).bytes <= num_bytes
            found, above = (middle, above) if fits else (found, middle)
        if found < 0:
            least = self.cut(widths[0], bits=bits).bytes
            raise ValueError(
                f"No prune ratio brings this model within {format_bytes(num_bytes)}: with {widths[0]} channels in each "
                f"expert (`align`), {1 - widths[0] / self.width:.1%} pruned, it still takes {format_bytes(least)} in "
                f"{bits} bit. Allow that, or take fewer `bits` or a smaller `align`."
            )
        return widths[found]
