"""What makes a plain `model.save_pretrained(folder)` of a model that was cut in memory write its widths."""

from transformers import PreTrainedModel
from transformers.quantizers.auto import AutoHfQuantizer

QUANT_METHOD = "channel_moe"


def save_with_widths(model: PreTrainedModel) -> None:
    """From now on `save_pretrained` writes the ragged form, which `from_pretrained` loads; nothing else changes.

    transformers asks the model's quantizer what to write. Ours (`export.huggingface.ChannelMoeQuantizer`, found through
    transformers' registry) describes the model as it is when it is saved, so later cuts need no other call. It takes
    the place of another one, such as bitsandbytes', which would leave the widths out.
    """
    vars(model)["hf_quantizer"] = AutoHfQuantizer.from_config({"quant_method": QUANT_METHOD}, pre_quantized=True)
