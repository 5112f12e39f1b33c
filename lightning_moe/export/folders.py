"""Folders that this package wrote, layer by layer, and the choice of who reads a folder."""

from typing import Any

from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.quantizers.auto import AutoHfQuantizer

from lightning_moe.export.huggingface import store_under_own_names
from lightning_moe.models.discovery import MoeLayer
from lightning_moe.models.folders import LayerFolder
from lightning_moe.models.fp8 import QUANT_METHOD as FP8
from lightning_moe.models.fp8 import quantization_of
from lightning_moe.models.loading import DtypeName, read_config
from lightning_moe.models.saving import QUANT_METHOD
from lightning_moe.models.sources import clear_errors, open_source, refuse_adapter
from lightning_moe.models.streaming import StockFolder, meta_model


class RaggedFolder(LayerFolder):
    """A cut model as this package writes it, in 16 bit or in NF4, in one file or in shards.

    Args:
        source: folder or hub name.
        dtype: type of the weights that are not packed; `auto` keeps the stored one.

    Raises:
        ValueError: see `load_model`; or this package did not write the folder.
    """

    def __init__(self, source: str, *, dtype: DtypeName = "auto") -> None:
        config = read_config(source)
        method = quantization_of(config).get("quant_method")
        if method != QUANT_METHOD:
            raise ValueError(f"'{source}' is no cut model (`quant_method` is {method!r}): read it with `open_folder`.")
        tensors, digest = open_source(source)
        with clear_errors(source):
            quantizer = AutoHfQuantizer.from_config(config.quantization_config, pre_quantized=True)
        model = meta_model(source, config=config, tensors=tensors, dtype=dtype, quantizer=quantizer)
        super().__init__(
            source=source,
            dtype=dtype,
            model=model,
            tensors=tensors,
            conversions=get_model_conversion_mapping(model, hf_quantizer=quantizer),
            quantizer=quantizer,
            fingerprint=digest,
        )

    def _load_experts(self, layer: MoeLayer) -> None:
        """The rows are stored as they lie in memory: nothing to convert."""
        self.load(layer.name)

    def _read(self, parts: Any) -> None:
        super()._read(parts)
        store_under_own_names(self.model)


def open_folder(source: str, *, dtype: DtypeName = "auto") -> LayerFolder:
    """A checkpoint to be read layer by layer: a stock one, in 16 bit or FP8, or one that this package wrote.

    Args:
        source: folder, `asset:small_moe`, or hub name.
        dtype: type of the weights that are not packed; `auto` keeps the stored one.

    Raises:
        ValueError: the folder is an adapter, is quantised in another way, has no safetensors files, or is damaged.
    """
    refuse_adapter(source)
    method = quantization_of(read_config(source)).get("quant_method")
    if method == QUANT_METHOD:
        return RaggedFolder(source, dtype=dtype)
    if method not in (None, FP8):
        raise ValueError(
            f"'{source}' is quantised with {method!r} (`quantization_config` of its config.json), which is not read. "
            f"Supported: weights in 16 or 32 bit, 8-bit floating point with factors for blocks ({FP8!r}), and what "
            f"this package writes ({QUANT_METHOD!r}). Take the checkpoint that it was quantised from."
        )
    return StockFolder(source, dtype=dtype)
