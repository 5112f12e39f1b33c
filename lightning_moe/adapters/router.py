"""DoraRouter: DoRA on a router's weight, whatever the rest of it does.  T tokens, E experts, H hidden, r rank."""

import math
from typing import Any

import torch
from peft import LoraConfig
from torch import Tensor, nn
from torch.func import functional_call

from lightning_moe.adapters.functional import adapted_weight
from lightning_moe.adapters.layer import OwnLoraLayer


class DoraRouter(OwnLoraLayer):
    """Calls the original router with its `weight` [E, H] replaced by `m (W + s B A) / ||W + s B A||_row`.

    The router itself still runs (its groups, bias, masks, and transformers' recording of router logits), in fp32 where
    the adapter is active, because a learning rate of 1e-6 is lost in 16-bit weights. Parameters: `lora_A_router`
    [r, H], `lora_B_router` [E, r], `lora_magnitude_router` [E], fp32. The base weight stays frozen.

    Args:
        base_layer: a router with a parameter `weight` [E, H].
        adapter_name: PEFT's name of the adapter.
        config: PEFT's config; only `use_dora` is read.
        r: rank, at least 1.
        lora_alpha: the scaling is `lora_alpha / r`.

    Raises:
        ValueError: the rank is not positive.
    """

    adapter_layer_names = ("lora_A_router", "lora_B_router", "lora_magnitude_router")

    def __init__(
        self,
        base_layer: nn.Module,
        adapter_name: str,
        config: LoraConfig,
        r: int = 0,
        lora_alpha: float = 1,
        **kwargs: Any,
    ) -> None:
        super().__init__(base_layer, adapter_name)
        self.lora_A_router = nn.ParameterDict()
        self.lora_B_router = nn.ParameterDict()
        self.lora_magnitude_router = nn.ParameterDict()
        self.update_layer(adapter_name, r, lora_alpha, config)

    @property
    def router(self) -> nn.Module:
        """The original router."""
        return self.get_submodule("base_layer")

    def update_layer(self, adapter_name: str, r: int, lora_alpha: float, config: LoraConfig, **kwargs: Any) -> None:
        """Adds the parameters of one adapter."""
        self.note_adapter(adapter_name, rank=r, alpha=lora_alpha, config=config, what="a router")
        weight_EH = self.router.get_parameter("weight").detach().float()
        down_rH = torch.empty(r, weight_EH.shape[1], device=weight_EH.device)
        self.lora_A_router[adapter_name] = nn.Parameter(nn.init.kaiming_uniform_(down_rH, a=math.sqrt(5)))
        self.lora_B_router[adapter_name] = nn.Parameter(weight_EH.new_zeros(weight_EH.shape[0], r))
        if config.use_dora:
            self.lora_magnitude_router[adapter_name] = nn.Parameter(weight_EH.norm(dim=1))
        self.set_adapter(self.active_adapters, inference_mode=config.inference_mode)

    def forward(self, hidden_states: Tensor) -> tuple[Tensor, ...]:
        """What the router returns for `[T, H]`: logits `[T, E]`, weights `[T, K]`, indices `[T, K]`."""
        weight_EH = self.adapted_weight()
        if weight_EH is None:
            return self.router(hidden_states)
        with torch.autocast(hidden_states.device.type, enabled=False):
            return functional_call(self.router, {"weight": weight_EH}, (hidden_states.float(),))

    def adapted_weight(self) -> Tensor | None:
        """The weight with the active adapter, fp32 `[E, H]`; None where no adapter is active."""
        names = [name for name in self.active_adapters if name in self.scaling]
        if self.disable_adapters or not names:
            return None
        if len(names) > 1:
            raise ValueError(
                f"Router adapters are used one at a time, but {names} are active. Call `set_adapter(name)`."
            )
        weight_EH = self.router.get_parameter("weight").float()
        magnitude_E = self.lora_magnitude_router[names[0]] if self.use_dora[names[0]] else None
        A_rH, B_Er = self.lora_A_router[names[0]], self.lora_B_router[names[0]]
        return adapted_weight(weight_EH, A_rH, B_Er, magnitude_E, self.scaling[names[0]])

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Refused, as for the experts.

        Raises:
            ValueError: always; use `lightning_moe.adapters.merge_adapters`.
        """
        raise ValueError("Merge with `lightning_moe.adapters.merge_adapters(model, dtype=...)`: it dequantises first.")
