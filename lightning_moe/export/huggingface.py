"""Ragged folders through transformers' own quantizer registry.

After `import lightning_moe`, stock `AutoModelForCausalLM.from_pretrained(folder)` rebuilds the cut structure from
`config.json` before it loads weights: no model class of our own, no remote code.
"""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, Self

import torch
from bitsandbytes.nn.modules import Linear4bit
from torch import Tensor, nn
from transformers import BitsAndBytesConfig, PreTrainedModel
from transformers.quantizers.auto import register_quantization_config, register_quantizer
from transformers.quantizers.quantizer_bnb_4bit import Bnb4BitHfQuantizer
from typing_extensions import override

import lightning_moe.models.deepseek  # noqa: F401  (registers the model type)
from lightning_moe.export.restoring import align_rows, check_tensors, restore_layers, restore_linears
from lightning_moe.files import read_json, write_atomically, write_json
from lightning_moe.models.channel_experts import ChannelExperts, DenseRows
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.saving import QUANT_METHOD
from lightning_moe.progress import quiet_transformers


class ChannelMoeConfig(BitsAndBytesConfig):
    """What `config.json` says of a cut model.

    Args:
        widths: name of each experts module -> channels of each of its experts (0: a novice, or masked in a
            grouped router).
        packed_experts: whether the expert rows are stored in NF4.
        packed_linears: names of the Linear layers stored in bitsandbytes NF4.
        novices: name of an experts module -> experts of width 0 whose output is a constant; only modules that have any.

    Raises:
        ValueError: a field is not of the type above, or a width is negative.
    """

    def __init__(
        self,
        widths: Mapping[str, Sequence[int]] | None = None,
        packed_experts: bool = False,
        packed_linears: Sequence[str] = (),
        novices: Mapping[str, Sequence[int]] | None = None,
        **kwargs: Any,
    ) -> None:
        super().__init__(
            load_in_4bit=True,
            bnb_4bit_quant_type="nf4",
            bnb_4bit_use_double_quant=True,
            bnb_4bit_quant_storage=torch.uint8,
        )
        self.quant_method = QUANT_METHOD  # pyright: ignore[reportAttributeAccessIssue]
        self.widths = _checked_lists({} if widths is None else widths, what="widths")
        self.novices = _checked_lists({} if novices is None else novices, what="novices")
        if not isinstance(packed_experts, bool):
            raise ValueError(f"`packed_experts` in config.json must be true or false, got {packed_experts!r}.")
        if not isinstance(packed_linears, list | tuple) or not all(isinstance(name, str) for name in packed_linears):
            raise ValueError(f"`packed_linears` in config.json must be a list of module names, got {packed_linears!r}.")
        self.packed_experts = packed_experts
        self.packed_linears = list(packed_linears)

    def to_dict(self) -> dict[str, Any]:
        """Plain types for `config.json`."""
        return {
            "quant_method": QUANT_METHOD,
            "widths": self.widths,
            "packed_experts": self.packed_experts,
            "packed_linears": self.packed_linears,
        } | ({"novices": self.novices} if self.novices else {})

    def to_diff_dict(self) -> dict[str, Any]:
        """The same: every field is needed to reload."""
        return self.to_dict()

    def is_quantizable(self) -> bool:
        """False: such a folder is already what it says."""
        return False


def _checked_lists(lists: object, *, what: str) -> dict[str, list[int]]:
    if not isinstance(lists, Mapping):
        raise ValueError(f"`{what}` in config.json must map names of experts modules to lists, got {lists!r}.")
    for name, values in lists.items():
        is_list = isinstance(values, list | tuple)
        if not is_list or any(not isinstance(value, int) or isinstance(value, bool) or value < 0 for value in values):
            raise ValueError(f"`{what}` of '{name}' in config.json must be a list of integers >= 0, got {values!r}.")
    return {str(name): list(values) for name, values in lists.items()}


class ChannelMoeQuantizer(Bnb4BitHfQuantizer):
    """Rebuilds the cut structure on the meta model; bitsandbytes' own code deserialises the packed Linear layers."""

    requires_calibration = True
    # What `save_pretrained` writes instead of the model's own tensors.
    stored_tensors: dict[str, Tensor] | None = None

    @property
    def quantized_element_size(self) -> float | None:  # pyright: ignore[reportIncompatibleMethodOverride]
        """None: every stored tensor counts with its own element size."""
        return None

    def __deepcopy__(self, memo: dict[int, Any]) -> Self:
        """Itself: transformers copies the quantizer once for every stored tensor while it loads.

        A real copy holds the widths of all layers, which made loading quadratic in the number of layers.
        """
        return self

    def validate_environment(self, *args: Any, **kwargs: Any) -> None:
        """Runs when the devices of the modules are known.

        Raises:
            ValueError: some are the CPU or the disk and some are not. Offloaded weights are fetched when their own
                module is called; the rows of experts are read by the module around them.
        """
        device_map = kwargs.get("device_map")
        devices = {str(device) for device in device_map.values()} if isinstance(device_map, Mapping) else set()
        if len(devices) > 1 and devices & {"cpu", "disk"}:
            raise ValueError(
                f"A pruned model cannot lie partly on the CPU or the disk, got devices {sorted(devices)} in "
                "`device_map`. Put all of it on GPUs or all on the CPU (`device_map='cpu'`); if it does not fit, prune "
                "more or store it in NF4."
            )
        super().validate_environment(*args, **kwargs)

    def update_device_map(self, device_map: Any) -> Any:
        """The user's device map, unchanged (bitsandbytes would move a 16-bit ragged model to the GPU by itself)."""
        return device_map

    def get_new_dtype(self, converter: Any, param: Any, dtype: torch.dtype | None) -> torch.dtype | None:
        """The model's own type for each floating-point tensor; stored as it is where the target is packed (uint8).

        bitsandbytes' rule keeps the stored type of everything called `weight`, packed or not.
        """
        is_float = param.is_floating_point() if isinstance(param, Tensor) else param.get_dtype().startswith(("F", "BF"))
        return dtype if is_float and dtype is not None and dtype.is_floating_point else None

    def get_state_dict_and_metadata(  # pyright: ignore[reportIncompatibleMethodOverride]: declared as always None
        self, model: PreTrainedModel
    ) -> tuple[dict[str, Tensor] | None, dict[str, Any]]:
        """Runs in `save_pretrained` before the config is written: describes anew a model cut since it was loaded.

        What it returns replaces the `state_dict` argument of `save_pretrained`; None means the model's own.
        """
        model.config.quantization_config = quantization_config_of(model)
        store_under_own_names(model)
        return self.stored_tensors, {}

    @override
    def _process_model_before_weight_loading(
        self,
        model: PreTrainedModel,
        device_map: Any = None,
        checkpoint_files: Sequence[str] | None = None,
        **kwargs: Any,
    ) -> None:
        config = self.quantization_config
        assert isinstance(config, ChannelMoeConfig)
        restore_layers(model, widths=config.widths, novices=config.novices, packed=config.packed_experts)
        restore_linears(model, names=config.packed_linears)
        check_tensors(model, files=checkpoint_files or ())

    @override
    def _process_model_after_weight_loading(self, model: PreTrainedModel, **kwargs: Any) -> PreTrainedModel:
        store_under_own_names(model)
        config = self.quantization_config
        assert isinstance(config, ChannelMoeConfig)
        # A 16-bit model trains like any other: transformers' Trainer wants adapters on a quantized one.
        model.is_quantized = config.packed_experts or bool(config.packed_linears)  # pyright: ignore
        align_rows(model)
        return model


def store_under_own_names(model: PreTrainedModel) -> None:
    """A plain `save_pretrained` has nothing to convert back to the family's published names."""
    model._weight_conversions = []  # pyright: ignore[reportArgumentType]


register_quantization_config(QUANT_METHOD)(ChannelMoeConfig)
register_quantizer(QUANT_METHOD)(ChannelMoeQuantizer)


def quantization_config_of(model: PreTrainedModel) -> ChannelMoeConfig:
    """Describes a cut model in memory, for its `config.json`.

    Raises:
        ValueError: some layer still has stock experts or has adapters, or some layers are packed and some are not.
    """
    experts: dict[str, ChannelExperts] = {}
    for layer in moe_layers(model):
        if layer.experts is not layer.base_experts:
            raise ValueError(
                f"'{layer.name}' has adapters, which this format does not hold. Export the model with "
                "`lightning_moe.export.deploy.export_model` (formats `adapter`, `merged`, `merged_nf4` or `ragged`)."
            )
        if not isinstance(layer.experts, ChannelExperts):
            raise ValueError(f"'{layer.name}' is not cut: only a cut model is saved in this format. Cut it first.")
        experts[layer.name] = layer.experts
    packed = [name for name, module in experts.items() if module.packed]
    if len(packed) not in (0, len(experts)):
        raise ValueError(
            f"{len(packed)} of {len(experts)} expert layers are in 4 bit, such as '{packed[0]}'. Pack all or none."
        )
    return ChannelMoeConfig(
        widths={name: module.widths for name, module in experts.items()},
        packed_experts=bool(packed),
        packed_linears=[name for name, module in model.named_modules() if isinstance(module, Linear4bit)],
        novices={name: module.novice_experts for name, module in experts.items() if module.novice_experts},
    )


def save_ragged(model: PreTrainedModel, folder: str | Path, *, dtype: torch.dtype | None = None) -> None:
    """Writes a cut model (16 bit or NF4) so that stock `from_pretrained` loads it after `import lightning_moe`.

    The folder appears when it is whole; an older model folder of that name is replaced. The model is left as it was.

    Args:
        model: the cut model, in memory.
        folder: where it goes.
        dtype: stored type of unpacked matrices (embeddings, Linear layers, expert rows); the model's own if None.
            Routers, norms and quantisation constants keep theirs.

    Raises:
        ValueError: the model is not cut, or `folder` holds something other than a model.
    """
    config = quantization_config_of(model)
    check_replaceable(folder)
    quantizer = ChannelMoeQuantizer(config, pre_quantized=True)
    quantizer.stored_tensors = _stored_tensors(model, dtype)
    with _described_by(model, quantizer), write_atomically(folder) as temporary, quiet_transformers():
        model.save_pretrained(temporary, save_original_format=False)
        if dtype is not None:
            declared = read_json(temporary / "config.json", what="model config")
            write_json(temporary / "config.json", declared | {"dtype": str(dtype).removeprefix("torch.")})


def _stored_tensors(model: PreTrainedModel, dtype: torch.dtype | None) -> dict[str, Tensor] | None:
    """The state dict with its matrices cast, tied ones once; None where nothing is to be cast."""
    if dtype is None or dtype == model.dtype:
        return None
    matrices = (nn.Linear, nn.Embedding, DenseRows)
    weights = [module.weight for module in model.modules() if isinstance(module, matrices) and module.weight.numel()]
    weights += [m.novices for m in model.modules() if isinstance(m, ChannelExperts) and m.novices is not None]
    cast = {weight.data_ptr(): weight.detach().to(dtype) for weight in weights if weight.is_floating_point()}
    tensors: dict[str, Tensor] = model.state_dict()
    return {name: cast.get(tensor.data_ptr(), tensor) for name, tensor in tensors.items()}


def check_replaceable(folder: str | Path) -> None:
    """Refuses to replace what is not a model.

    Raises:
        ValueError: `folder` is a file, or a folder with content but no `config.json`.
    """
    folder = Path(folder)
    if folder.is_dir() and any(folder.iterdir()) and not (folder / "config.json").is_file():
        raise ValueError(f"'{folder}' holds something other than a model and would be replaced. Name another folder.")
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"'{folder}' is a file; a model needs a folder. Name another one.")


@contextmanager
def _described_by(model: PreTrainedModel, quantizer: ChannelMoeQuantizer) -> Iterator[None]:
    """The model with this quantizer and its config inside the block, and with what it had before afterwards."""
    owners = {"quantization_config": model.config, "hf_quantizer": model}
    before = {name: vars(owner)[name] for name, owner in owners.items() if name in vars(owner)}
    model.config.quantization_config = quantizer.quantization_config
    model.__dict__["hf_quantizer"] = quantizer
    try:
        yield
    finally:
        for name, owner in owners.items():
            vars(owner).pop(name, None)
        for name, value in before.items():
            vars(owners[name])[name] = value
