"""Faults of numbers: NaN, infinity and overflow in weights, statistics and training, odd routing, odd settings."""

import shutil
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path

import torch
from faults.cases import Case, CaseFolder, Expectation, Outcome, completed, disturbed, refused
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor

from lightning_moe.training.module import LanguageModelModule

_EXPERT = "model.layers.1.mlp.experts.3"
_ROUTER = "model.layers.{}.mlp.gate.weight"
_EMBEDDINGS = "model.embed_tokens.weight"
_STEP = 2  # whole steps before the one that goes wrong

Edit = Callable[[dict[str, Tensor]], None]


def _edited(file: str, edit: Edit, folder: Path) -> None:
    """Changes tensors of a safetensors file; what else is in it stays."""
    path = folder / file
    with safe_open(path, framework="pt") as opened:
        metadata: Mapping[str, str] | None = opened.metadata()
    tensors = load_file(path)
    edit(tensors)
    save_file(tensors, path, metadata=dict(metadata or {}))


def _set(name: str, value: float, tensors: dict[str, Tensor]) -> None:
    """The first number of the first tensor whose name begins so."""
    tensors[min(key for key in tensors if key.startswith(name))].view(-1)[0] = value


def _overflowing(tensors: dict[str, Tensor]) -> None:
    """An expert whose weights fit float16, and whose activations do not."""
    for side in ("gate", "up", "down"):
        tensors[f"{_EXPERT}.{side}_proj.weight"].mul_(2000)


def _routed(tensors: dict[str, Tensor], *, to_one: bool) -> None:
    """Expert 3 of each layer gets every token, or none: one number of all embeddings decides."""
    tensors[_EMBEDDINGS][:, 0] = 3.0
    for layer in range(2):
        router_EH = tensors[_ROUTER.format(layer)]
        router_EH[:] = 0.01 * router_EH
        router_EH[3, 0] = 50.0 if to_one else -50.0


def _with(folder: CaseFolder, *, file: str, edit: Edit, expects: Expectation, options: tuple[str, ...] = ()) -> Outcome:
    arguments = [*folder.stage.arguments, *options]
    spoil = partial(_edited, file, edit)
    return disturbed(folder, expects=expects, spoil=spoil, arguments=arguments, may_differ=True)


def _options(folder: CaseFolder, *, options: tuple[str, ...], expects: Expectation) -> Outcome:
    """Odd settings; what they trained must not be gone on from."""
    arguments = [*folder.stage.arguments, *options]

    def forget(path: Path) -> None:
        shutil.rmtree(path / "out" / "checkpoints", ignore_errors=True)

    return disturbed(folder, expects=expects, arguments=arguments, remedy=forget, may_differ=True)


def _nan_loss() -> None:
    """The third step of a training has a loss that is NaN."""
    step = LanguageModelModule.training_step

    def training_step(self: LanguageModelModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        loss = step(self, batch, batch_idx)
        return loss * float("nan") if self.trainer.global_step == _STEP else loss

    LanguageModelModule.training_step = training_step


def _infinite_gradient() -> None:
    """The loss of the third step is finite, and a gradient of it is not."""
    step = LanguageModelModule.training_step

    def training_step(self: LanguageModelModule, batch: dict[str, Tensor], batch_idx: int) -> Tensor:
        if self.trainer.global_step == _STEP:
            trained = next(value for value in self.parameters() if value.requires_grad)
            trained.register_hook(lambda gradient: torch.full_like(gradient, float("inf")))
        return step(self, batch, batch_idx)

    LanguageModelModule.training_step = training_step


def _in_training(folder: CaseFolder, *, child: Callable[[], None], expects: Expectation) -> Outcome:
    """The second run goes on from the last checkpoint, to the weights of an undisturbed run."""
    return disturbed(folder, expects=expects, child=child)


def _weights() -> list[Case]:
    model, made = "model/model.safetensors", []
    for stage in ("calibrate", "prune", "quantise", "pack", "recover"):
        for value in (float("nan"), float("inf")):
            expects = refused(r"layers\.1\.mlp\.experts.*(NaN or infinity|not finite)|NaN or infinity.*experts\.3")
            edit = partial(_set, f"{_EXPERT}.down_proj", value)
            run = partial(_with, file=model, edit=edit, expects=expects)
            quick = value != float("inf")
            made.append(Case(name=f"{value} in one expert", stage=stage, fault="weights", run=run, quick=quick))
    for stage, option in (("calibrate", "--dtype"), ("recover", "--model.dtype")):
        expects = refused(r"layers\.1\.mlp\.experts: NaN or infinity .* expert 3, whose weights are finite")
        run = partial(_with, file=model, edit=_overflowing, expects=expects, options=(option, "float16"))
        made.append(Case(name="overflow in one expert", stage=stage, fault="weights", run=run))
    for stage in ("calibrate", "pack", "recover"):
        for name, to_one in (("no token for an expert", False), ("all tokens to one expert", True)):
            run = partial(_with, file=model, edit=partial(_routed, to_one=to_one), expects=completed)
            made.append(Case(name=name, stage=stage, fault="routing", run=run))
    return made


def _files() -> list[Case]:
    adapter, expects = "out/recovered/adapter/adapter/adapter_model.safetensors", refused("NaN|finite")
    statistics, nan = "out/statistics.safetensors", float("nan")
    table = [("plan", statistics, "corpus"), ("export", adapter, "base_model")]
    return [
        Case(
            name=f"NaN in {Path(file).name}",
            stage=stage,
            fault="numbers in files",
            run=partial(_with, file=file, edit=partial(_set, prefix, nan), expects=expects),
        )
        for stage, file, prefix in table
    ]


def _settings() -> list[Case]:
    ratio, rate = "--prune_ratio", "--model.expert_learning_rate"
    table = [
        ("ratio 0", "plan", (ratio, "0"), completed),
        ("ratio 1", "plan", (ratio, "1"), refused(r"`prune_ratio` must be in \[0, 1\), got 1")),
        ("ratio NaN", "plan", (ratio, ".nan"), refused(r"`prune_ratio` must be in \[0, 1\), got nan")),
        ("ratio 0", "recover", ("--pruning.prune_ratio", "0"), completed),
        ("ratio 1", "recover", ("--pruning.prune_ratio", "1"), refused(r"`prune_ratio` must be in \[0, 1\), got 1")),
        ("rate NaN", "recover", (rate, ".nan"), refused("`expert_learning_rate` must be a finite number")),
        ("rate 1e38", "recover", (rate, "1e38"), refused("(Step|After step) [12]: .*Lower the learning rate")),
    ]
    return [
        Case(
            name=name,
            stage=stage,
            fault="settings",
            run=partial(_options, options=options, expects=expects),
            quick=stage != "recover" or name == "rate 1e38",
        )
        for name, stage, options, expects in table
    ]


_TRAINING = [
    Case(
        name="NaN loss",
        stage="recover",
        fault="training",
        run=partial(_in_training, child=_nan_loss, expects=refused("Step 3: NaN or infinity in the loss")),
    ),
    Case(
        name="infinite gradient",
        stage="recover",
        fault="training",
        run=partial(
            _in_training, child=_infinite_gradient, expects=refused("Step 3: NaN or infinity in the gradients of")
        ),
    ),
]

CASES: list[Case] = [*_weights(), *_files(), *_settings(), *_TRAINING]
