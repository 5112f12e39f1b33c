"""Masks of channels as hexadecimal text, eight channels in two digits, the first in the highest bit.  n channels."""

import numpy as np
import torch
from torch import Tensor


def mask_to_hex(keep_n: Tensor) -> str:
    """A boolean mask as text.

    Examples:
        >>> mask_to_hex(torch.tensor([True, False, True]))  # 1010 0000
        'a0'
    """
    return np.packbits(keep_n.numpy()).tobytes().hex()


def mask_from_hex(mask: object, *, num_channels: int, what: str) -> Tensor:
    """The boolean mask of `num_channels` channels that `mask_to_hex` wrote; `what` is its name in errors.

    Raises:
        ValueError: another length, another alphabet, or bits beyond the channels.

    Examples:
        >>> mask_from_hex("a0", num_channels=3, what="`keep`").tolist()
        [True, False, True]
    """
    digits = 2 * -(-num_channels // 8)
    if not isinstance(mask, str) or len(mask) != digits:
        came = f"{len(mask)} characters" if isinstance(mask, str) else type(mask).__name__
        raise ValueError(f"{what} must have {digits} digits, got {came}.")
    try:
        bits = np.unpackbits(np.frombuffer(bytes.fromhex(mask), dtype=np.uint8))
    except ValueError as error:
        raise ValueError(f"{what} is not hexadecimal: {mask[:80]!r}.") from error
    if bits[num_channels:].any():
        raise ValueError(f"{what} has bits beyond its {num_channels} channels.")
    return torch.from_numpy(bits[:num_channels].astype(bool))
