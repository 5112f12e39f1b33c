"""The cut of a checkpoint, one decoder layer in memory at a time.

C channels of a layer, k kept ones, H hidden, N novices.
"""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property

from torch import Tensor, nn

from lightning_moe.models.discovery import MoeLayer
from lightning_moe.models.folders import LayerFolder
from lightning_moe.quantization.linears import linears_to_pack
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import cut_layer
from lightning_moe.surgery.novices import Novices
from lightning_moe.surgery.streaming import load_cut_decoder, moe_layer_of, pack_decoder, pack_linears


@dataclass(frozen=True, kw_only=True, eq=False)
class FolderCut:
    """What becomes of a checkpoint: the tensors of its decoder layers and of the rest, as a cut model stores them.

    Args:
        folder: the checkpoint.
        plan: which channels stay; all without one.
        quantize: put experts and the Linear layers around them in NF4.
        novices: what evicted experts leave behind.
        device: where a layer is cut and packed.
    """

    folder: LayerFolder
    plan: PrunePlan | None
    quantize: bool
    novices: Novices | None
    device: str

    @cached_property
    def linears(self) -> list[str]:
        """Full names of the Linear layers that go to 4 bit."""
        return linears_to_pack(self.folder.model) if self.quantize else []

    @contextmanager
    def decoder(self, name: str) -> Iterator[dict[str, Tensor]]:
        """Loads a decoder layer, cuts and packs it; its tensors by full name inside the block.

        Raises:
            ValueError: a weight cannot be read, or one that would be packed is NaN or infinite.
        """
        layer = moe_layer_of(self.folder, name)
        try:
            load_cut_decoder(
                self.folder,
                name,
                keep_C=self._keep(layer),
                packs=self.quantize,
                novices_NH=self._novices(layer),
                device=self.device,
            )
            yield self._packed(name)
        finally:
            self.folder.release(name)

    def loaded_decoder(self, name: str) -> dict[str, Tensor]:
        """The same of a layer that is loaded."""
        layer = moe_layer_of(self.folder, name)
        keep_C = self._keep(layer)
        if layer is not None and keep_C is not None:
            novices_NH = self._novices(layer)
            cut_layer(layer, keep_C=keep_C, novices_NH=novices_NH, reports=False)
        return self._packed(name)

    @contextmanager
    def outside(self) -> Iterator[dict[str, Tensor]]:
        """The tensors of embeddings, last norm, head: everything outside the decoder layers, a tied one once.

        Raises:
            ValueError: a weight cannot be read, or one that would be packed is NaN or infinite.
        """
        decoders = self.folder.decoder_names
        inside = tuple(f"{name}." for name in decoders)
        names = [name for name in self.folder.model.state_dict() if not name.startswith(inside)]
        owners = list(dict.fromkeys(name.rpartition(".")[0] for name in names))
        try:
            for owner in owners:
                self.folder.load(owner)
            pack_linears(self.folder, names=[name for name in self.linears if not name.startswith(inside)])
            yield self._untied({key: value for key, value in self._state("").items() if not key.startswith(inside)})
        finally:
            for owner in owners:
                self.folder.release(owner)

    def _keep(self, layer: MoeLayer | None) -> Tensor | None:
        return None if self.plan is None or layer is None else self.plan.keep[layer.index]

    def _novices(self, layer: MoeLayer | None) -> Tensor | None:
        if self.novices is None or layer is None:
            return None
        return self.novices.rows[layer.index].to(self.folder.model.dtype)

    def _packed(self, name: str) -> dict[str, Tensor]:
        if self.quantize:
            pack_decoder(self.folder, name, linears=self.linears)
        return self._state(name)

    def _state(self, name: str) -> dict[str, Tensor]:
        module: nn.Module = self.folder.model.get_submodule(name)
        return module.state_dict(prefix=f"{name}." if name else "")

    def _untied(self, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
        """Without the copies of tied weights, which are loaded under both names."""
        for target, source in self.folder.model.all_tied_weights_keys.items():
            if target in tensors and source in tensors and tensors[target].equal(tensors[source]):
                del tensors[target]
        return tensors
