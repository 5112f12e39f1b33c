"""Which parameters a cut must not replace: those that two parts share, and those that carry somebody's hooks."""

from collections.abc import Sequence

from lightning_moe.models.discovery import MoeLayer


def check_parameters(layers: Sequence[MoeLayer]) -> None:
    """Refuses what would be lost without a word where new parameters take the place of the old ones.

    A decoder layer that stands in the model several times is one layer and may be cut.

    Raises:
        ValueError: experts or routers of two layers share a parameter, or a parameter has a hook on its gradient.
    """
    owners: dict[int, str] = {}
    for layer in layers:
        for owner, part in ((layer.name, layer.experts), (layer.router_name, layer.router)):
            for name, parameter in part.named_parameters():
                first = owners.setdefault(id(parameter), owner)
                if first != owner:
                    raise ValueError(
                        f"'{owner}' shares '{name}' with '{first}', and each layer is cut by itself. Give every "
                        "layer its own experts and router, or share the whole decoder layer."
                    )
                if parameter._backward_hooks or parameter._post_accumulate_grad_hooks:
                    raise ValueError(
                        f"'{owner}.{name}' has a hook on its gradient, which is lost when a cut replaces the "
                        "parameter. Act between `backward` and `optimizer.step` instead, or register it after the last "
                        "cut."
                    )
