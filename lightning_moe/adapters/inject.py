"""Put adapters on a model: ours on experts and routers, stock PEFT on shared experts and attention."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from bitsandbytes.nn.modules import Linear4bit
from peft import LoraConfig, PeftModel, get_peft_model
from peft.tuners.lora.bnb import Linear4bit as LoraLinear4bit
from torch import nn
from transformers import PreTrainedModel

from lightning_moe.adapters.experts import DoraExperts
from lightning_moe.adapters.groups import trainable_groups
from lightning_moe.adapters.router import DoraRouter
from lightning_moe.models.channel_experts import ChannelExperts
from lightning_moe.models.discovery import MoeLayer, moe_layers

_LARGEST_RANK = 2**16
_FIRST_NUMBER = re.compile(r"(?<=\.)\d+(?=\.)")


@dataclass(frozen=True, kw_only=True)
class AdapterConfig:
    """Which parts get an adapter and of what rank; a rank of 0 leaves the part alone.

    Args:
        expert_rank: Rank on the three projections of every routed expert (at most the hidden size is used).
        router_rank: Rank on the router's weight (at most its number of experts is used).
        attention_rank: Rank on the attention's Linear layers, in the decoder layers of the adapted MoE layers.
        shared_expert_rank: Rank on the shared experts' Linear layers; null means as the experts.
        alpha_ratio: `lora_alpha / rank`, which is the scaling of `B A`.
        use_dora: DoRA, or plain LoRA.
        layers: Which MoE layers are adapted, counted from 0 among the MoE layers; null means all.
        train_norms: Train a copy of the decoder's normalisation weights too (saved with the adapter).

    Raises:
        ValueError: a negative rank, nothing to train, or a scaling that is not positive.
    """

    expert_rank: int = 32
    router_rank: int = 4
    attention_rank: int = 0
    shared_expert_rank: int | None = None
    alpha_ratio: float = 2.0
    use_dora: bool = True
    layers: Sequence[int] | None = None
    train_norms: bool = False

    def __post_init__(self) -> None:
        ranks = {
            "expert_rank": self.expert_rank,
            "router_rank": self.router_rank,
            "attention_rank": self.attention_rank,
        }
        for name, rank in (ranks | {"shared_expert_rank": self.rank_of_shared}).items():
            if not 0 <= rank <= _LARGEST_RANK:
                allowed = f"0 (no adapter) or a positive rank up to {_LARGEST_RANK}"
                raise ValueError(f"`{name}` must be {allowed}, got {rank}.")
        if not any(ranks.values()) and not self.rank_of_shared and not self.train_norms:
            raise ValueError("Every adapter rank is 0 and `train_norms` is off: nothing would be trained. Raise one.")
        if self.alpha_ratio <= 0:
            raise ValueError(
                f"`alpha_ratio` is the scaling of the adapters and must be positive, got {self.alpha_ratio}."
            )
        if self.layers is not None and not self.layers:
            raise ValueError("`layers` is empty: name the MoE layers to adapt, or give null for all.")

    @property
    def rank_of_shared(self) -> int:
        """Rank on the shared experts."""
        return self.expert_rank if self.shared_expert_rank is None else self.shared_expert_rank


class MoeLoraConfig(LoraConfig):
    """PEFT's LoraConfig whose `target_modules` stay as they are given.

    For MoE model types PEFT rewrites targets called gate, gate_proj, up_proj and down_proj into `target_parameters` of
    the stock fused experts, which a cut model does not have and DoRA does not support.
    """

    def __setattr__(self, name: str, value: Any) -> None:
        if name == "target_modules" and isinstance(self.__dict__.get(name), str):
            return
        super().__setattr__(name, value)


def register_layers(config: LoraConfig, model: PreTrainedModel) -> LoraConfig:
    """Tells a LoraConfig which layer classes serve this model's experts, routers and 4-bit Linear layers.

    PEFT does not store this mapping. To load an adapter with stock PEFT, use it so:
    `PeftModel.from_pretrained(model, folder, config=adapter_config_of(folder, model=model))`.
    """
    routers = {type(layer.router) for layer in moe_layers(model)}
    mapping: dict[type[nn.Module], type[nn.Module]] = dict.fromkeys(routers, DoraRouter)
    config._register_custom_module(mapping | {ChannelExperts: DoraExperts, Linear4bit: LoraLinear4bit})
    return config


def build_lora_config(model: PreTrainedModel, *, config: AdapterConfig) -> LoraConfig:
    """PEFT's config for an adapter: targets, ranks and alphas per part, and our layers registered.

    Raises:
        ValueError: a layer index the model does not have, or stock experts that were not converted.
    """
    targets = target_names(model, config=config)
    ranks = _ranks(model, config)
    patterns = {group: _name_pattern(names) for group, names in targets.items() if names and group != "norms"}
    ending = {key: group for group, names in targets.items() if group in patterns for key in map(_tail, names)}
    norms = sorted({name.rpartition(".")[2] for name in targets["norms"]})
    lora = MoeLoraConfig(
        task_type="CAUSAL_LM",
        r=max(ranks.values(), default=1) or 1,
        lora_alpha=config.alpha_ratio,  # pyright: ignore[reportArgumentType]
        use_dora=config.use_dora,
        target_modules="|".join(patterns.values()) or "no-target",
        target_parameters=[],
        rank_pattern={key: ranks[group] for key, group in ending.items()},
        alpha_pattern={key: config.alpha_ratio * ranks[group] for key, group in ending.items()},
        modules_to_save=norms or None,
    )
    return register_layers(lora, model)


def target_names(model: PreTrainedModel, *, config: AdapterConfig) -> dict[str, list[str]]:
    """Full names of the modules that `config` asks to adapt, by group.

    Raises:
        ValueError: a layer index the model does not have, or stock experts that were not converted.
    """
    layers = _chosen_layers(moe_layers(model), config.layers)
    for layer in layers:
        if config.expert_rank and not isinstance(layer.experts, ChannelExperts):
            raise ValueError(
                f"'{layer.name}' has stock experts: call `convert_experts` or `apply_plan` before adapting."
            )
    linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear)]
    shared = tuple(f"{name}." for layer in layers for name in layer.shared_names)
    decoders = tuple(f"{layer.block_name.rpartition('.')[0]}." for layer in layers)
    attention = layers[0].family.attention
    in_decoder = [name for name in linears if name.startswith(decoders) and name.rpartition(".")[2] in attention]
    asked = {
        "experts": [layer.name for layer in layers] if config.expert_rank else [],
        "shared_experts": [name for name in linears if name.startswith(shared)]
        if config.rank_of_shared and shared
        else [],
        "router": [layer.router_name for layer in layers] if config.router_rank else [],
        "attention": in_decoder if config.attention_rank else [],
    }
    return asked | {"norms": list(_norm_names(model)) if config.train_norms else []}


def inject_adapters(model: PreTrainedModel, *, config: AdapterConfig) -> PeftModel:
    """Freezes the model and puts adapters into it, in place; only what `config` asks for is trainable.

    The model's function does not change: B starts at 0 and the magnitudes at the norms of the (dequantised) weights.
    Adapters are fp32 whatever the base is.

    Raises:
        ValueError: a layer index the model does not have, stock experts, or an asked-for part without a parameter.
    """
    expected = [group for group, names in target_names(model, config=config).items() if names]
    if config.attention_rank and "attention" not in expected:
        raise ValueError(
            "`attention_rank` is set, but no attention Linear of this family was found in the adapted layers."
        )
    peft_model = get_peft_model(model, build_lora_config(model, config=config))
    assert isinstance(peft_model, PeftModel)
    trainable_groups(peft_model, expected=expected)
    return peft_model


def _chosen_layers(layers: list[MoeLayer], indices: Sequence[int] | None) -> list[MoeLayer]:
    if indices is None:
        return layers
    unknown = sorted(set(indices) - set(range(len(layers))))
    if unknown:
        raise ValueError(
            f"`layers` names MoE layers {unknown}, but this model has {len(layers)} (0 to {len(layers) - 1})."
        )
    return [layers[index] for index in sorted(set(indices))]


def _ranks(model: PreTrainedModel, config: AdapterConfig) -> Mapping[str, int]:
    """Rank of each group, capped where a larger one could not add anything."""
    num_experts = min(layer.router.get_parameter("weight").shape[0] for layer in moe_layers(model))
    return {
        "experts": min(config.expert_rank, int(model.config.get_text_config().hidden_size)),
        "shared_experts": config.rank_of_shared,
        "router": min(config.router_rank, num_experts),
        "attention": config.attention_rank,
    }


def _norm_names(model: PreTrainedModel) -> Iterable[str]:
    """Modules of the decoder whose only parameter is a vector called `weight`."""
    for name, module in model.named_modules():
        parameters = dict(module.named_parameters())
        if set(parameters) == {"weight"} and parameters["weight"].ndim == 1 and not list(module.children()):
            yield name


def _tail(name: str) -> str:
    """The part of a name after the layer number, as a regular expression: the key of PEFT's rank pattern."""
    number = _FIRST_NUMBER.search(name)
    return re.escape(name[number.end() + 1 :] if number else name)


def _name_pattern(names: Sequence[str]) -> str:
    """A regular expression that matches these full names and no other, layer numbers gathered: readable in JSON."""
    numbers: dict[tuple[str, str], list[str]] = {}
    plain = []
    for name in names:
        number = _FIRST_NUMBER.search(name)
        if number is None:
            plain.append(re.escape(name))
        else:
            key = (re.escape(name[: number.start()]), re.escape(name[number.end() :]))
            numbers.setdefault(key, []).append(number.group())
    gathered = [f"{head}({'|'.join(found)}){tail}" for (head, tail), found in numbers.items()]
    return "|".join(plain + gathered)
