"""Plain DataLoaders go on within an epoch: the next batch, drawn as without the interruption."""

import pytest
import torch
from lightning import LightningModule, seed_everything
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.utilities.combined_loader import CombinedLoader
from tiny_runs import ForeignModule, quiet_trainer, token_batches
from torch.utils.data import DataLoader, Dataset, DistributedSampler, IterableDataset, WeightedRandomSampler

from callbacks import ChannelPruning, ExpertCalibration
from callbacks._epochs import PlainLoaders
from callbacks.exact_resume import ExactResume
from lightning_moe.training.random_state import own_generators

pytestmark = [
    pytest.mark.resume,
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
    pytest.mark.filterwarnings("ignore:The number of training batches"),
    pytest.mark.filterwarnings("ignore:Checkpoint directory .* exists and is not empty"),
    pytest.mark.filterwarnings("ignore:Consider setting `persistent_workers=True`"),
    pytest.mark.filterwarnings("ignore:.*does not have many workers"),
    pytest.mark.filterwarnings("ignore:Total length of `.*` across ranks is zero"),
]


class Steps(LightningModule):
    """Notes what a step sees: its batch and number, the schedule, and a random number."""

    def __init__(self):
        super().__init__()
        self.weight = torch.nn.Parameter(torch.zeros(()))
        self.seen = []

    def training_step(self, batch, batch_idx):
        parts = batch.values() if isinstance(batch, dict) else [batch]
        rate = self.trainer.optimizers[0].param_groups[0]["lr"]
        self.seen.append((batch_idx, self.global_step, rate, torch.rand(()).item(), [part.tolist() for part in parts]))
        return self.weight * sum(part.sum() for part in parts)

    def validation_step(self, batch, batch_idx):
        torch.rand(3)

    def on_validation_end(self):
        self.seen.append("validated")

    def configure_optimizers(self):
        optimizer = torch.optim.SGD(self.parameters(), lr=0.1)
        scheduler = torch.optim.lr_scheduler.StepLR(optimizer, step_size=1, gamma=0.9)
        return {"optimizer": optimizer, "lr_scheduler": {"scheduler": scheduler, "interval": "step"}}


class Noisy(Dataset):
    """Draws from torch's generator for every row."""

    def __len__(self):
        return 10

    def __getitem__(self, index):
        return index + torch.rand(())


def plain(num_rows=10, **settings):
    return DataLoader(torch.arange(float(num_rows)), **({"batch_size": 2, "shuffle": True} | settings))


def generator():
    return torch.Generator().manual_seed(3)


def weighted(**settings):
    return WeightedRandomSampler(torch.ones(10), 10, **settings)


LOADERS = {
    "shuffled": plain,
    "in_order": lambda: plain(shuffle=False),
    "own_generator": lambda: plain(generator=generator()),
    "drop_last": lambda: plain(11, drop_last=True),
    "sampler": lambda: plain(shuffle=False, sampler=weighted()),
    "generator_of_the_sampler": lambda: plain(shuffle=False, sampler=weighted(generator=generator())),
    "by_epoch": lambda: plain(shuffle=False, sampler=DistributedSampler(range(10), num_replicas=1, rank=0, seed=5)),
    "noisy": lambda: DataLoader(Noisy(), batch_size=2, shuffle=True),
    "several": lambda: {"a": plain(), "b": plain(4)},
    "combined": lambda: CombinedLoader({"a": plain(), "b": plain(14)}, "min_size"),
}
WORKERS = {
    "workers": lambda: plain(num_workers=1),
    "persistent": lambda: plain(num_workers=1, persistent_workers=True, generator=generator()),
}


def steps(make_loader, folder, *, resume=None, max_epochs=3, **settings):
    """Epochs of five batches; a resumed run starts from another seed."""
    seed_everything(0 if resume is None else 1, verbose=False)
    module = Steps()
    keep = ModelCheckpoint(dirpath=folder, save_top_k=-1, filename="{step}", every_n_train_steps=1)
    fixed = {"max_steps": -1, "max_epochs": max_epochs, "enable_checkpointing": True}
    trainer = quiet_trainer([ExactResume(), keep], **(fixed | settings))
    trainer.fit(
        module, make_loader(), plain(4, shuffle=False) if settings.get("limit_val_batches") else None, ckpt_path=resume
    )
    return module.seen


def assert_goes_on(make_loader, folder, *, after, **settings):
    expected = steps(make_loader, folder / "whole", **settings)
    for step in after:
        resumed = steps(make_loader, folder / "x", resume=folder / "whole" / f"step={step}.ckpt", **settings)
        assert len(resumed) > 0
        assert resumed == expected[-len(resumed) :]
        assert resumed[0] == next(seen for seen in expected if seen != "validated" and seen[1] == step)


@pytest.mark.parametrize("name", LOADERS)
def test_the_next_batch_follows(tmp_path, name):
    assert_goes_on(LOADERS[name], tmp_path, after=[1, 4, 5, 8, 10, 12])


@pytest.mark.parametrize("name", WORKERS)
def test_the_next_batch_follows_from_workers(tmp_path, name):
    assert_goes_on(WORKERS[name], tmp_path, after=[2, 5, 8])


@pytest.mark.parametrize(
    "settings",
    [
        {"accumulate_grad_batches": 2},
        {"limit_train_batches": 3},
        {"limit_val_batches": 1.0, "val_check_interval": 2},
        {"max_epochs": -1, "max_steps": 12},
    ],
)
def test_counters_are_those_of_the_whole_run(tmp_path, settings):
    assert_goes_on(plain, tmp_path, after=[1, 3, 4, 7], **settings)


def test_it_can_be_resumed_twice_within_an_epoch(tmp_path):
    expected = steps(plain, tmp_path / "whole")
    steps(plain, tmp_path / "first", resume=tmp_path / "whole" / "step=6.ckpt")
    resumed = steps(plain, tmp_path / "second", resume=tmp_path / "first" / "step=8.ckpt")
    assert resumed == expected[8:]


def test_an_epoch_that_max_steps_cut_short_is_read_on(tmp_path):
    expected = steps(plain, tmp_path / "whole")
    steps(plain, tmp_path / "part", max_epochs=-1, max_steps=7)
    assert steps(plain, tmp_path / "more", resume=tmp_path / "part" / "step=7.ckpt") == expected[7:]


class Stream(IterableDataset):
    def __iter__(self):
        return iter(torch.arange(10.0))


class Stateful(DataLoader):
    def state_dict(self):
        return {}

    def load_state_dict(self, state):
        pass


@pytest.mark.parametrize(
    "loader",
    [DataLoader(Stream(), batch_size=2), Stateful(torch.arange(10.0)), [plain(), Stateful(torch.arange(10.0))]],
)
def test_loaders_with_a_state_and_streams_are_left_alone(loader):
    trainer = quiet_trainer([ExactResume()], max_steps=1)
    module = Steps()
    module.training_step = lambda batch, batch_idx: module.weight * 1
    trainer.fit(module, loader)
    assert not isinstance(trainer.fit_loop._combined_loader, PlainLoaders)


def test_calibrating_on_training_batches_leaves_their_order_alone():
    def order(callbacks):
        rows = torch.utils.data.ConcatDataset([token_rows(), token_rows(seed=9)])
        module = ForeignModule()
        quiet_trainer(callbacks).fit(module, DataLoader(rows, batch_size=4, shuffle=True, generator=generator()))
        return torch.stack(module.seen)

    assert order(cut()).equal(order([]))


def token_rows(*, seed=0):
    return [{name: value[0] for name, value in batch.items()} for batch in token_batches(seed=seed)]


def cut():
    return [ExpertCalibration(num_batches=2), ChannelPruning(prune_ratio=0.25, method_args={"align": 8})]


def test_generators_of_a_loader_are_found_once():
    shared = generator()
    assert own_generators(plain(generator=shared)) == [shared]
    assert own_generators(plain(shuffle=False, sampler=weighted(generator=shared))) == [shared]
    assert own_generators(plain()) == []
