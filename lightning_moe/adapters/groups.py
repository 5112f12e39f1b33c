"""What is trainable, by part of the model."""

from collections.abc import Iterable, Mapping, Sequence

from peft.tuners.lora.layer import LoraLayer
from torch import nn
from torch.nn import Parameter

from lightning_moe.adapters.experts import DoraExperts
from lightning_moe.adapters.router import DoraRouter
from lightning_moe.models.discovery import find_language_model, moe_layers

GROUPS = ("experts", "shared_experts", "router", "attention", "norms")


def trainable_groups(model: nn.Module, *, expected: Iterable[str] = ()) -> dict[str, list[Parameter]]:
    """The trainable parameters of an adapted model by part, in the order of GROUPS; parts without any are left out.

    `model` is a PeftModel, the language model in it, or a module that holds it. `norms` is everything trainable
    outside the adapter layers.

    Raises:
        ValueError: a part of `expected` has no trainable parameter, or is not one of GROUPS.
    """
    language_model = find_language_model(model)
    shared = tuple(f"{name}." for layer in moe_layers(language_model) for name in layer.shared_names)
    groups: dict[str, list[Parameter]] = {name: [] for name in GROUPS}
    seen: set[int] = set()
    for name, module in language_model.named_modules():
        if isinstance(module, LoraLayer) and isinstance(module, nn.Module):
            trainable = [parameter for parameter in module.parameters() if parameter.requires_grad]
            groups[_group_of(name, module, shared)] += trainable
            seen.update(map(id, trainable))
    groups["norms"] = [p for p in language_model.parameters() if p.requires_grad and id(p) not in seen]
    for name in expected:
        if name not in groups:
            raise ValueError(f"'{name}' is not a part that can be trained. Allowed: {', '.join(GROUPS)}.")
        if not groups[name]:
            raise ValueError(
                f"Adapters for '{name}' were asked for, but no parameter of that part is trainable. "
                "Set its rank to 0, or check that the model has such a part and is not loaded for inference."
            )
    return {name: parameters for name, parameters in groups.items() if parameters}


def describe_trainable(groups: Mapping[str, Sequence[Parameter]]) -> str:
    """A table: trainable tensors and numbers of each part, and their sum."""
    rows = [(name, len(tensors), sum(tensor.numel() for tensor in tensors)) for name, tensors in groups.items()]
    rows.append(("all", sum(row[1] for row in rows), sum(row[2] for row in rows)))
    lines = [f"{'trainable part':<16}{'tensors':>9}{'parameters':>14}"]
    return "\n".join(lines + [f"{name:<16}{tensors:>9}{numbers:>14,}" for name, tensors, numbers in rows])


def _group_of(name: str, module: nn.Module, shared: tuple[str, ...]) -> str:
    if isinstance(module, DoraExperts):
        return "experts"
    if isinstance(module, DoraRouter):
        return "router"
    return "shared_experts" if shared and name.startswith(shared) else "attention"
