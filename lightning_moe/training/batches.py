"""What of a batch goes into a model, and what it is measured by."""

from collections.abc import Mapping

from torch import Tensor

TEACHER_IDS, TEACHER_LOGPROBS = "teacher_ids", "teacher_logprobs"
_TARGETS = frozenset({"labels", TEACHER_IDS, TEACHER_LOGPROBS})


def model_inputs(batch: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """The batch without its targets: the same for a student and its teacher."""
    return {name: value for name, value in batch.items() if name not in _TARGETS}
