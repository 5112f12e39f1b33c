"""Strategies and placements under which nothing is cut or packed are refused by name, before the first batch."""

from types import SimpleNamespace

import pytest
import torch
from accelerate import cpu_offload
from lightning.pytorch.strategies import (
    DDPStrategy,
    DeepSpeedStrategy,
    FSDPStrategy,
    ModelParallelStrategy,
    SingleDeviceStrategy,
    Strategy,
)
from lightning.pytorch.strategies.single_xla import SingleDeviceXLAStrategy
from tiny_models import tiny_model
from tiny_runs import ForeignModule, loader_of, quiet_trainer, token_batches
from torch.distributed.tensor import DTensor
from torch.utils.data import DataLoader

from callbacks import ExpertCalibration, ExportPruned, Recovery
from callbacks._loaders import calibration_loaders
from callbacks._strategy import check_gatherable, check_strategy, check_whole
from lightning_moe.calibration.processes import Processes
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import convert_experts
from lightning_moe.training.module import RecoveryModule
from lightning_moe.training.optim import build_optimizer
from lightning_moe.training.rank_shard import RankShard
from lightning_moe.training.router_loss import RouterLogits, load_balancing_loss
from lightning_moe.training.sharding import decoder_layers, shard_model

pytestmark = pytest.mark.multiprocess


class Stub:
    """A trainer with a strategy that cannot be built here."""

    def __init__(self, strategy, module=None):
        self.strategy = strategy
        self.callbacks = []
        self.lightning_module = ForeignModule() if module is None else module


def without_init(kind):
    return kind.__new__(kind)


class DeepSpeedLike(DeepSpeedStrategy):
    """DeepSpeed itself is not installed."""

    def __init__(self):
        pass


class HomeMade(Strategy):
    """Somebody's own."""


@pytest.mark.parametrize(
    ("kind", "message"),
    [
        (DeepSpeedLike, "DeepSpeedLike: DeepSpeed partitions flattened parameters.*Use `ModelParallelStrategy`"),
        (FSDPStrategy, "FSDPStrategy: FSDP1 flattens.*Use `ModelParallelStrategy`"),
        (SingleDeviceXLAStrategy, "SingleDeviceXLAStrategy does not work.*Supported are one device, `ddp`"),
        (HomeMade, "HomeMade does not work.*Supported are one device, `ddp`"),
    ],
)
def test_other_strategies_are_refused_by_name(kind, message):
    kind.__abstractmethods__ = frozenset()
    with pytest.raises(ValueError, match=message):
        check_strategy(Stub(without_init(kind)), scheduled=False)


def test_supported_strategies_pass_and_cuts_in_training_need_whole_parameters():
    for strategy in (SingleDeviceStrategy("cpu"), DDPStrategy(), ModelParallelStrategy()):
        check_strategy(Stub(strategy), scheduled=False)
    check_strategy(Stub(DDPStrategy()), scheduled=True)
    with pytest.raises(ValueError, match=r"ModelParallelStrategy shards .* does not follow a cut.*`prune_ratio`"):
        check_strategy(Stub(without_init(ModelParallelStrategy)), scheduled=True)


def test_weights_that_accelerate_keeps_elsewhere_are_refused(tmp_path):
    module = ForeignModule()
    cpu_offload(module.lm.model.layers[0], execution_device=torch.device("cpu"))
    with pytest.raises(ValueError, match=r"accelerate offloads 'lm\.model\.layers\.0.*\(AlignDevicesHook\)"):
        check_strategy(Stub(without_init(SingleDeviceStrategy), module), scheduled=False)
    mapped = ForeignModule()
    mapped.lm.hf_device_map = {"model.embed_tokens": 0, "model.layers.0": "disk", "lm_head": "cpu"}
    with pytest.raises(ValueError, match=r"offloads 'lm' \(`device_map` has \['model.layers.0', 'lm_head'\]"):
        quiet_trainer([Recovery()]).fit(mapped, train_dataloaders=loader_of(token_batches(2)))
    whole = ForeignModule()
    whole.lm.hf_device_map = {"": "cpu"}  # all of it is here
    check_strategy(Stub(DDPStrategy(), whole), scheduled=False)


@pytest.mark.parametrize("start", ["spawn", "fork", "forkserver"])
def test_processes_that_cannot_hand_a_cut_model_back_are_refused(start):
    with pytest.raises(ValueError, match=rf"DDPStrategy starts its processes by `{start}`.* Use `ddp` in a script"):
        check_strategy(Stub(DDPStrategy(start_method=start)), scheduled=False)


def test_calibration_alone_refuses_what_cannot_be_measured():
    module = ForeignModule()
    cpu_offload(module.lm.model.layers[0], execution_device=torch.device("cpu"))
    trainer = quiet_trainer([ExpertCalibration(num_batches=1)])
    with pytest.raises(ValueError, match=r"accelerate offloads 'lm"):
        ExpertCalibration(num_batches=1).setup(Stub(trainer.strategy, module), module, "fit")


@pytest.fixture
def mesh(tmp_path):
    store = torch.distributed.FileStore(str(tmp_path / "store"), 1)
    torch.distributed.init_process_group("gloo", store=store, rank=0, world_size=1)
    names = ("data_parallel", "tensor_parallel")
    yield torch.distributed.device_mesh.init_device_mesh("cpu", (1, 1), mesh_dim_names=names)
    torch.distributed.destroy_process_group()


def test_every_decoder_layer_is_sharded_once(mesh):
    model = tiny_model("deepseek_v3")
    shard_model(model, mesh=mesh)
    kinds = {name: type(parameter) for name, parameter in model.named_parameters()}
    assert set(kinds.values()) == {DTensor}
    layers = decoder_layers(model)
    assert len(layers) == model.config.num_hidden_layers == 3
    assert all(isinstance(layer, torch.distributed.fsdp.FSDPModule) for layer in [*layers, model])
    shard_model(model, mesh=mesh)
    assert {name: type(parameter) for name, parameter in model.named_parameters()} == kinds
    with pytest.raises(ValueError, match=r"sharded before it could be cut.*Build it in `__init__`"):
        check_whole(model)
    group = {"name": "model", "params": list(model.parameters())}
    with pytest.raises(ValueError, match=r"`optimizer: adamw8bit` does not know FSDP2's shards. Use `adamw`"):
        build_optimizer([group], name="adamw8bit", weight_decay=0.0, betas=(0.9, 0.999))


def test_routers_are_read_while_their_layer_is_whole(mesh):
    """Ernie's selection bias is a parameter, which is spread over processes outside its layer's forward pass."""
    model = tiny_model("ernie4_5_moe")
    ids = token_batches(1)[0]["input_ids"]
    with RouterLogits(model) as routers:
        model(input_ids=ids)
    expected = load_balancing_loss(routers.outputs)
    shard_model(model, mesh=mesh)
    with RouterLogits(model) as routers:
        model(input_ids=ids)
    assert load_balancing_loss(routers.outputs).item() == pytest.approx(expected.item(), rel=1e-6)


def test_parameters_of_several_types_are_refused(mesh):
    model = tiny_model()
    model.model.norm.to(torch.bfloat16)
    with pytest.raises(ValueError, match=r"of one type.*'model\.norm\.weight' in torch\.bfloat16"):
        shard_model(model, mesh=mesh)


def test_tensor_parallelism_is_refused():
    class Mesh:
        def __getitem__(self, name):
            return self

        def size(self):
            return 2

    with pytest.raises(ValueError, match=r"`tensor_parallel_size` is 2, .*tensor_parallel_size=1"):
        shard_model(tiny_model(), mesh=Mesh())


def test_only_our_modules_are_put_together_again_for_an_export():
    trainer = Stub(without_init(ModelParallelStrategy))
    with pytest.raises(ValueError, match=r"cannot put the sharded model of ForeignModule.*save_distributed_checkpoint"):
        check_gatherable(trainer, trainer.lightning_module)
    with pytest.raises(ValueError, match="cannot put the sharded model"):
        ExportPruned(folder="exports", formats=["ragged"]).setup(trainer, trainer.lightning_module, "fit")
    check_gatherable(trainer, RecoveryModule(source="asset:small_moe"))


def test_packed_rows_hold_no_buffer_that_ddp_would_send_at_every_forward():
    model = tiny_model()
    convert_experts(model)
    quantize_model(model)
    assert [name for name, _ in model.named_buffers() if ".experts." in name] == []
    rows = dict(model.get_submodule("model.layers.0.mlp.experts.gate_proj").named_parameters())
    assert {name: value.dtype for name, value in rows.items()} == {
        "codes": torch.uint8,
        "absmax": torch.uint8,
        "scale": torch.float32,
    }
    assert not any(value.requires_grad for value in rows.values())


@pytest.mark.parametrize("rank", [0, 1])
def test_first_training_batches_are_read_once_among_all_processes(rank):
    """A loader that gives each process its share is not shared out again; any other is."""

    class Source:
        instance = object()

        def __init__(self, loader):
            self.dataloader = lambda: loader

        def is_defined(self):
            return True

    def read(loader):
        trainer = Stub(None)
        trainer.datamodule, trainer.world_size = None, 2
        trainer.fit_loop = SimpleNamespace(_data_source=Source(loader))
        (batches,) = calibration_loaders(trainer, num_batches=4).values()
        return [batch["input_ids"][0, 0].item() for batch in Processes(rank=rank, size=2).share(batches)]

    batches = [{"input_ids": torch.full((1, 4), index)} for index in range(9)]
    two = Processes(rank=rank, size=2)
    expected = [0, 2] if rank == 0 else [1, 3]
    assert read(loader_of(batches)) == expected
    assert read(DataLoader(RankShard(batches, processes=two), batch_size=None)) == expected
