"""Run one decoder layer alone, by way of the decoder itself: it decides masks and positions, nothing is guessed.

B sequences, S tokens of one, H hidden.
"""

from collections.abc import Mapping
from contextlib import ExitStack, suppress
from typing import Any

from torch import Tensor
from transformers import PreTrainedModel

from lightning_moe.calibration.observer import replaced_forward


class _Reached(Exception):  # noqa: N818
    """Ends a forward pass of the decoder: what is wanted of it is there."""


class DecoderLayers:
    """The decoder layers of a model, each of which runs while the weights of all others may be on the meta device.

    The decoder is called as always, with the layers before the wanted one handing their input on; the wanted one ends
    the pass. Hooks on the layer see one ordinary call of it.

    Args:
        model: in eval mode; what a layer needs beside its own weights (rotary frequencies) is in memory.
        names: full names of the decoder layers, first layer first.
    """

    def __init__(self, model: PreTrainedModel, *, names: list[str]) -> None:
        self._decoder = model.get_decoder()
        self._layers = [model.get_submodule(name) for name in names]

    def first_input(self, inputs: Mapping[str, Tensor]) -> Tensor:
        """What the decoder hands to its first layer for `input_ids` (and `attention_mask`) `[B, S]`: `[B, S, H]`."""
        found: list[Tensor] = []

        def keep(hidden_BSH: Tensor, *_: Any, **__: Any) -> Tensor:
            found.append(hidden_BSH)
            raise _Reached

        with replaced_forward(self._layers[0], keep):
            self._call(**inputs)
        return found[0]

    def run(self, index: int, hidden_BSH: Tensor, *, attention_mask: Tensor | None) -> Tensor:
        """Output `[B, S, H]` of one layer on its input; `attention_mask` `[B, S]` as the decoder takes it."""
        layer = self._layers[index]
        own, found = layer.forward, []

        def run(_: Tensor, *args: Any, **kwargs: Any) -> Tensor:
            with replaced_forward(layer, own):  # a whole call, so that hooks on the layer run
                output = layer(hidden_BSH, *args, **kwargs)
            found.append(output[0] if isinstance(output, tuple) else output)
            raise _Reached

        mask = {} if attention_mask is None else {"attention_mask": attention_mask}
        with ExitStack() as stack:
            for before in self._layers[:index]:
                stack.enter_context(replaced_forward(before, _hand_on))
            stack.enter_context(replaced_forward(layer, run))
            self._call(inputs_embeds=hidden_BSH, **mask)
        return found[0]

    def _call(self, **inputs: Tensor) -> None:
        with suppress(_Reached):
            self._decoder(**inputs, use_cache=False)


def _hand_on(hidden_BSH: Tensor, *_: Any, **__: Any) -> Tensor:
    return hidden_BSH
