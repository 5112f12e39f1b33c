"""The `deepseek` model type (deepseek-moe-16b): not native to transformers, so declared here and registered on import.

Its decoder is the native DeepseekOcr2 text decoder; only the language-model head is missing there. Checkpoint keys go
through the conversion that transformers has for Qwen2-MoE (same per-expert layout). Checked against random weights of
the published shape; not against the real checkpoint.
"""

from typing import Any

from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForCausalLM
from transformers.conversion_mapping import get_checkpoint_conversion_mapping, register_checkpoint_conversion_mapping
from transformers.generation.utils import GenerationMixin
from transformers.modeling_outputs import CausalLMOutputWithPast
from transformers.models.deepseek_ocr2.configuration_deepseek_ocr2 import DeepseekOcr2TextConfig
from transformers.models.deepseek_ocr2.modeling_deepseek_ocr2 import (
    DeepseekOcr2TextModel,
    DeepseekOcr2TextPreTrainedModel,
)


class DeepseekConfig(DeepseekOcr2TextConfig):
    """Config of deepseek-moe-16b; `first_k_dense_replace` layers are dense, the rest MoE.

    Raises:
        ValueError: the config asks for normalised top-k weights or for expert groups, which this router does not do.
    """

    model_type = "deepseek"

    def __init__(self, **kwargs: Any) -> None:
        if kwargs.pop("norm_topk_prob", False):
            raise ValueError("`norm_topk_prob` must be false for model type 'deepseek', as it is in deepseek-moe-16b.")
        if kwargs.get("topk_method", "greedy") != "greedy":
            raise ValueError(
                f"`topk_method` must be 'greedy' for model type 'deepseek', got {kwargs['topk_method']!r}. "
                "Expert groups are a feature of 'deepseek_v2'."
            )
        num_layers, num_dense = kwargs.get("num_hidden_layers", 28), kwargs.get("first_k_dense_replace", 1)
        kwargs["mlp_layer_types"] = ["dense" if i < num_dense else "sparse" for i in range(num_layers)]
        super().__init__(**kwargs)


class DeepseekModel(DeepseekOcr2TextModel):
    """The decoder."""

    config_class = DeepseekConfig


class DeepseekForCausalLM(DeepseekOcr2TextPreTrainedModel, GenerationMixin):
    """Decoder and language-model head."""

    config_class = DeepseekConfig
    _tied_weights_keys = {"lm_head.weight": "model.embed_tokens.weight"}  # noqa: RUF012

    def __init__(self, config: DeepseekConfig) -> None:
        super().__init__(config)
        self.model = DeepseekModel(config)
        self.vocab_size = config.vocab_size
        self.lm_head = nn.Linear(config.hidden_size, config.vocab_size, bias=False)
        self.post_init()

    def forward(
        self, input_ids: Tensor | None = None, labels: Tensor | None = None, logits_to_keep: int = 0, **kwargs: Any
    ) -> CausalLMOutputWithPast:
        """Token ids `[B, S]` to logits `[B, S, V]` (the last `logits_to_keep` positions if that is not 0)."""
        outputs = self.model(input_ids=input_ids, **kwargs)
        hidden = outputs.last_hidden_state
        logits = self.lm_head(hidden[:, -logits_to_keep:] if logits_to_keep else hidden)
        loss = None
        if labels is not None:
            loss = self.loss_function(logits=logits, labels=labels, vocab_size=self.vocab_size)
        return CausalLMOutputWithPast(loss=loss, logits=logits, past_key_values=outputs.past_key_values)


AutoConfig.register("deepseek", DeepseekConfig, exist_ok=True)
AutoModelForCausalLM.register(DeepseekConfig, DeepseekForCausalLM, exist_ok=True)
register_checkpoint_conversion_mapping("deepseek", get_checkpoint_conversion_mapping("qwen2_moe") or [], overwrite=True)
