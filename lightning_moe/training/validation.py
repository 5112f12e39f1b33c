"""Held-out loss of a language model in a LightningModule, corpus by corpus."""

from abc import abstractmethod
from collections.abc import Iterable
from typing import Any, cast

import torch
from lightning import LightningModule
from torch import Tensor, nn
from torchmetrics.text import Perplexity
from transformers import PreTrainedModel
from typing_extensions import override

from lightning_moe.evaluation.perplexity import update_perplexity
from lightning_moe.training.batches import model_inputs
from lightning_moe.training.data import TextDataModule


class ValidatedModule(LightningModule):
    """Logs perplexity and loss per validation corpus, and as `nll` their mean: the metric to stop early on."""

    def __init__(self) -> None:
        super().__init__()
        self.perplexity = nn.ModuleList()

    @property
    @abstractmethod
    def language_model(self) -> PreTrainedModel:
        """The model that is validated."""

    @override
    def on_validation_start(self) -> None:
        """One perplexity per validation corpus."""
        metrics = [Perplexity(ignore_index=-100) for _ in self._validation_names()]
        self.perplexity = nn.ModuleList(metrics).to(self.device)

    @override
    def validation_step(self, batch: dict[str, Tensor], batch_idx: int, dataloader_idx: int = 0) -> None:
        """Adds the batch's next-token probabilities to its corpus's perplexity."""
        logits = self.language_model(**model_inputs(batch), use_cache=False).logits
        update_perplexity(cast(Perplexity, self.perplexity[dataloader_idx]), logits, batch["labels"])

    @override
    def on_validation_epoch_end(self) -> None:
        """Logs `perplexity/<corpus>`, `nll/<corpus>` (nats per token) and their mean over corpora as `nll`."""
        metrics = cast(Iterable[Perplexity], self.perplexity)
        perplexity = {name: metric.compute() for name, metric in zip(self._validation_names(), metrics, strict=True)}
        for name, value in perplexity.items():
            self.log(f"perplexity/{name}", value, sync_dist=True)
            self.log(f"nll/{name}", value.log(), sync_dist=True)
        self.log("nll", torch.stack(list(perplexity.values())).log().mean(), prog_bar=True, sync_dist=True)

    def _validation_names(self) -> tuple[str, ...]:
        """Names of the validation corpora, where the data module has them; numbers otherwise."""
        datamodule: Any = self.trainer.datamodule  # pyright: ignore[reportAttributeAccessIssue]
        if isinstance(datamodule, TextDataModule):
            return datamodule.validation_names
        loaders = self.trainer.val_dataloaders
        return tuple(str(index) for index in range(len(loaders) if isinstance(loaders, list | tuple) else 1))
