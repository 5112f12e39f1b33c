"""Calibrations that one process and several must agree on; each is a function of the processes that share it."""

import torch
from tiny_models import random_tokens, tiny_model
from torch.utils.data import DataLoader, IterableDataset

from lightning_moe.allocation import build_method
from lightning_moe.calibration.collector import collect_statistics
from lightning_moe.calibration.processes import ALONE
from lightning_moe.models.discovery import moe_layers
from lightning_moe.surgery.repair import plan_repair
from lightning_moe.training.losses import next_token_loss, weight_among_processes


class Stream(IterableDataset):
    """Read once per iterator, of unknown length."""

    def __init__(self, batches):
        super().__init__()
        self.batches = batches

    def __iter__(self):
        yield from self.batches


def text(num_batches, *, seed, batch=2, padded=False):
    batches = []
    for index in range(num_batches):
        ids = random_tokens(batch=batch, length=16, seed=100 * seed + index)
        mask = torch.ones_like(ids)
        if padded:
            mask[0, 11 + index % 3 :] = 0
        batches.append({"input_ids": ids, "attention_mask": mask})
    return batches


def loaders(name):
    """`uneven`: 5 and 3 batches, one corpus with padding; `short`: a corpus of one batch; `stream`: no length."""
    if name == "uneven":
        return {"a": text(5, seed=1), "b": text(3, seed=2, padded=True)}
    if name == "short":
        return {"a": text(2, seed=3), "b": text(1, seed=4)}
    return {"a": DataLoader(Stream(text(7, seed=5)), batch_size=None)}


CALIBRATIONS = ("uneven", "short", "stream")


def statistics_of(name, *, processes=ALONE):
    model = tiny_model("qwen2_moe")
    statistics = collect_statistics(model, loaders=loaders(name), progress=False, processes=processes)
    return {corpus: [dict(layer) for layer in layers] for corpus, layers in statistics.corpora.items()}


def repaired(*, processes=ALONE):
    model = tiny_model(dtype=torch.float64)
    batches = {"a": text(5, seed=6, batch=24), "b": text(2, seed=7, batch=24, padded=True)}
    statistics = collect_statistics(model, loaders=batches, progress=False)
    plan = build_method("exact_global", align=8).plan(statistics, prune_ratio=0.5)
    repair = plan_repair(model, plan=plan, loaders=batches, progress=False, processes=processes)
    return {
        "rows": list(repair.down_rows),
        "errors": torch.tensor([repair.error_before, repair.error_after], dtype=torch.float64),
        "counts": list(repair.num_repaired),
    }


def message_of(name, *, processes=ALONE):
    """What a calibration says that must fail; every process must hear it."""
    model, batches = tiny_model(), loaders("uneven")
    if name == "nan":
        if processes.rank == 0:  # the others are well, and must not wait
            moe_layers(model)[1].experts.gate_up_proj.data.fill_(float("nan"))
    elif name == "empty":
        batches["none"] = []
    else:
        batches["blank"] = [{"input_ids": random_tokens(), "attention_mask": torch.zeros(2, 16, dtype=torch.int64)}]
    try:
        collect_statistics(model, loaders=batches, progress=False, processes=processes)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"calibration '{name}' was not refused")


def mean_loss(labels_BS):
    """A gradient that a strategy averages: of the mean loss of these rows, weighted among the processes."""
    weight_CV = torch.ones(3, 6, requires_grad=True)
    logits_BSV = torch.sin(labels_BS.clamp_min(0).float()).unsqueeze(-1).expand(-1, -1, 3) @ weight_CV
    logits_BSV = logits_BSV * torch.linspace(0, 1, 6)
    (weight_among_processes(labels_BS) * next_token_loss(logits_BSV, labels_BS)).backward()
    return weight_CV.grad


def labels_of(rank):
    """Very unequal numbers of positions with a label; the last of four processes has none."""
    labels_BS = torch.full((2, 5), -100)
    labels_BS.view(-1)[1 : 1 + (9, 3, 1, 0)[rank]] = torch.arange((9, 3, 1, 0)[rank]) % 6
    return labels_BS
