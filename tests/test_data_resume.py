"""Training order: mixing, shuffling, resuming within an epoch."""

import logging
from collections import Counter

import pytest
import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import ModelCheckpoint
from text_data import data_module

from lightning_moe.training.corpora import Corpus
from lightning_moe.training.loading import EpochShuffle


def test_training_mixes_corpora_in_proportion_and_reads_every_row_once_an_epoch():
    corpora = {
        "math": Corpus(source="asset:text/math/recovery.jsonl", max_tokens=8 * 30),
        "code": Corpus(source="asset:text/code/recovery.jsonl", max_tokens=8 * 10),
    }
    module = data_module(train=corpora, batch_size=16)
    read = torch.cat([batch["input_ids"] for batch in module.train_dataloader()])
    stored = torch.cat([rows.input_ids_NS for rows in module.rows("train").values()])
    assert Counter(map(tuple, read.tolist())) == Counter(map(tuple, stored.tolist()))
    assert not torch.equal(read, stored.long())
    assert len(read) == 40


def test_order_depends_on_seed_and_epoch_alone():
    def order(seed, epoch):
        shuffle = EpochShuffle(num_rows=20, seed=seed)
        shuffle.set_epoch(epoch)
        return list(shuffle)

    assert order(0, 1) == order(0, 1)
    assert sorted(order(0, 1)) == list(range(20))
    assert len({tuple(order(seed, epoch)) for seed in (0, 1) for epoch in (0, 1)}) == 4


# Lightning remarks on a fit without validation corpora, which is allowed.
WITHOUT_VALIDATION = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")
OTHER_FOLDER = pytest.mark.filterwarnings("ignore:The dirpath has changed")


class Reader(LightningModule):
    """Writes down what it reads; asks for the number of steps, as warmup does."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.read = []

    def training_step(self, batch, batch_index):
        self.read.append((self.current_epoch, batch["input_ids"].tolist()))
        return self.weight

    def validation_step(self, batch, batch_index):
        raise AssertionError("there are no validation corpora")

    def configure_optimizers(self):
        assert self.trainer.estimated_stepping_batches > 0
        return torch.optim.SGD(self.parameters(), lr=0.1)


def fit_reader(folder, *, resume=None, max_tokens=8 * 10):
    corpora = {"code": Corpus(source="asset:text/code/calibration.jsonl", max_tokens=max_tokens)}
    module = Reader()
    trainer = Trainer(
        max_epochs=3,
        accelerator="cpu",
        logger=False,
        callbacks=[ModelCheckpoint(dirpath=folder, filename="{step}", every_n_train_steps=1, save_top_k=-1)],
        enable_progress_bar=False,
        enable_model_summary=False,
    )
    trainer.fit(module, datamodule=data_module(train=corpora, batch_size=2), ckpt_path=resume)
    return module.read


@WITHOUT_VALIDATION
@OTHER_FOLDER
def test_resumed_run_reads_on_where_it_stopped(tmp_path):
    # 10 rows, batches of 2: 5 steps an epoch. Step 2 is within the first epoch, 5 at its end, 7 within the second.
    whole = fit_reader(tmp_path)
    assert len(whole) == 15
    assert len({str([batch for of, batch in whole if of == epoch]) for epoch in range(3)}) == 3
    for step in (2, 5, 7):
        assert fit_reader(tmp_path / f"from{step}", resume=str(tmp_path / f"step={step}.ckpt")) == whole[step:]


@WITHOUT_VALIDATION
@OTHER_FOLDER
def test_checkpoint_of_other_data_reads_these_from_the_start(tmp_path, caplog):
    fit_reader(tmp_path)
    with caplog.at_level(logging.WARNING):
        read = fit_reader(tmp_path / "other", resume=str(tmp_path / "step=7.ckpt"), max_tokens=8 * 12)
    assert "was reading 10 training rows, these are 12" in caplog.text
    assert len(read) > 0
