"""What our PEFT layers have in common: adapters, in parameters of their own form, around a module that is no Linear."""

from peft import LoraConfig
from peft.tuners.lora.layer import LoraLayer
from torch import nn
from typing_extensions import override


class OwnLoraLayer(nn.Module, LoraLayer):
    """A layer that PEFT wraps around `base_layer`, and whose parameters are its own business.

    Args:
        base_layer: the frozen module.
        adapter_name: PEFT's name of the first adapter.
    """

    other_param_names = ("r", "lora_alpha", "scaling", "use_dora")

    def __init__(self, base_layer: nn.Module, adapter_name: str) -> None:
        nn.Module.__init__(self)
        LoraLayer.__init__(self, base_layer)
        self._active_adapter = adapter_name

    @override
    def _get_in_out_features(self, module: nn.Module) -> tuple[None, None]:
        return None, None

    def note_adapter(self, name: str, *, rank: int, alpha: float, config: LoraConfig, what: str) -> None:
        """Keeps what `update_layer` is given for one adapter; `what` is adapted.

        Raises:
            ValueError: the rank is not positive.
        """
        if rank <= 0:
            raise ValueError(f"The rank of {what} adapter must be at least 1, got {rank}.")
        self.r[name], self.lora_alpha[name], self.scaling[name] = rank, alpha, alpha / rank
        self.use_dora[name] = config.use_dora
