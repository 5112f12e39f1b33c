"""Shares of training data: disjoint, equally many, in the order of one process."""

import logging

import pytest
import torch
from text_data import data_module
from torch.utils.data import DataLoader, IterableDataset

from lightning_moe.calibration.processes import Processes
from lightning_moe.training.corpora import Corpus
from lightning_moe.training.loading import EpochShuffle, EvenShare
from lightning_moe.training.rank_shard import RankShard

pytestmark = pytest.mark.multiprocess


class Numbers(IterableDataset):
    def __init__(self, count):
        super().__init__()
        self.count = count

    def __iter__(self):
        yield from range(self.count)


def shards(count, *, size, **options):
    members = [Processes(rank=rank, size=size) for rank in range(size)]
    return [
        [int(item) for batch in DataLoader(RankShard(Numbers(count), processes=one), **options) for item in batch]
        for one in members
    ]


@pytest.mark.parametrize(("count", "size", "kept"), [(11, 4, 8), (12, 4, 12), (3, 4, 0), (7, 1, 7)])
def test_shards_of_a_stream_are_disjoint_and_equally_long(count, size, kept):
    found = shards(count, size=size, batch_size=1)
    assert sorted(item for shard in found for item in shard) == list(range(kept))
    assert {len(shard) for shard in found} == {kept // size}


def test_batches_of_all_processes_are_those_of_one():
    two = [
        list(DataLoader(RankShard(Numbers(19), processes=Processes(rank=rank, size=2)), batch_size=3))
        for rank in (0, 1)
    ]
    one = list(DataLoader(Numbers(19), batch_size=6))[:3]
    assert [sorted(a.tolist() + b.tolist()) for a, b in zip(*two, strict=True)] == [batch.tolist() for batch in one]


@pytest.mark.filterwarnings("ignore:This DataLoader will create 2 worker processes")
def test_workers_share_the_share():
    found = shards(23, size=2, batch_size=2, num_workers=2)
    assert sorted(item for shard in found for item in shard) == list(range(20))
    assert {len(shard) for shard in found} == {10}


def test_a_stream_may_be_read_again():
    shard = RankShard(Numbers(5), processes=Processes(rank=1, size=2))
    assert list(shard) == list(shard) == [1, 3]


def test_the_permutation_is_dealt_out_in_the_order_of_one_process():
    def order(rank, size):
        shuffle = EpochShuffle(num_rows=11, seed=3, processes=Processes(rank=rank, size=size))
        shuffle.set_epoch(2)
        assert len(shuffle) == len(list(shuffle))
        return list(shuffle)

    whole, parts = order(0, 1), [order(rank, 3) for rank in range(3)]
    assert [row for rows in zip(*parts, strict=True) for row in rows] == whole[:9]


def rows(count):
    return [{"input_ids": torch.tensor([index]), "labels": torch.tensor([index])} for index in range(count)]


@pytest.mark.parametrize(("count", "size"), [(7, 2), (8, 4), (1, 3)])
def test_evaluation_counts_every_row_once_in_equally_many_batches(count, size):
    shares = [EvenShare(rows(count), num_rows=count, processes=Processes(rank=rank, size=size)) for rank in range(size)]
    assert len({len(share) for share in shares}) == 1
    labels = [int(share[index]["labels"]) for share in shares for index in share.sampler()]
    assert sorted(label for label in labels if label != -100) == list(range(count))
    assert len(labels) == -(-count // size) * size


class Attached:
    """What a data module asks its trainer."""

    def __init__(self, rank, size):
        self.global_rank, self.world_size = rank, size


def module_of(rank, size, *, batch_size, max_tokens=8 * 13):
    corpora = {"code": Corpus(source="asset:text/code/calibration.jsonl", max_tokens=max_tokens)}
    module = data_module(train=corpora, validation=corpora, batch_size=batch_size, drop_last=True)
    module.trainer = Attached(rank, size)
    return module


def read(module, *, state=None):
    if state is not None:
        module.load_state_dict(state)
    return [batch["input_ids"].tolist() for batch in module.train_dataloader()]


def test_processes_train_on_the_batches_of_one_and_resume_on_another_number(caplog):
    caplog.set_level(logging.WARNING)
    whole = read(module_of(0, 1, batch_size=4))
    modules = [module_of(rank, 2, batch_size=2) for rank in (0, 1)]
    parts = [read(module) for module in modules]
    assert len(whole) == 3
    for step, batch in enumerate(whole):
        assert sorted(row for part in parts for row in part[step]) == sorted(batch)
    assert modules[0].state_dict() == modules[1].state_dict()
    # 8 of 13 rows were read: two steps of 4 rows, however many processes make them.
    state = modules[0].state_dict() | {"num_batches": 2}
    assert read(module_of(0, 1, batch_size=4), state=state) == whole[2:]
    assert [read(module_of(rank, 2, batch_size=2), state=state) for rank in (0, 1)] == [part[2:] for part in parts]
    assert caplog.text == ""
    assert len(read(module_of(0, 1, batch_size=3), state=state)) == 2
    assert "was reading 4 rows a step, these are 3: 2 rows are read twice" in caplog.text


def test_a_position_that_comes_after_the_loader_was_made_counts_too():
    """FSDP2 restores data modules after optimizers, whose schedule asked for the length of the loader."""
    module, whole = module_of(0, 1, batch_size=4), read(module_of(0, 1, batch_size=4))
    loader = module.train_dataloader()
    module.load_state_dict({"epoch": 0, "num_batches": 1, "rows_per_batch": 4, "num_rows": 13})
    assert [batch["input_ids"].tolist() for batch in loader] == whole[1:]


def test_too_few_rows_for_the_processes_are_an_error():
    with pytest.raises(ValueError, match=r"`data\.train` has 2 rows of 8 tokens for 3 processes. Give more text"):
        module_of(0, 3, batch_size=1, max_tokens=16).train_dataloader()


def test_validation_loaders_of_a_trainer_are_shares_and_the_report_reads_all():
    modules = [module_of(rank, 2, batch_size=4) for rank in (0, 1)]
    ((first,), (second,)) = (module.val_dataloader() for module in modules)
    assert len(first) == len(second) == 2
    num_tokens = [int((batch["labels"] != -100).sum()) for loader in (first, second) for batch in loader]
    whole = modules[0].validation_dataloaders()["code"]
    assert sum(num_tokens) == sum(int((batch["labels"] != -100).sum()) for batch in whole)
