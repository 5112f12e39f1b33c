"""How the processes of a run get the model that a module names: whole, from one copy a node, or each its share."""

from collections.abc import Callable

from lightning import LightningModule, Trainer
from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.multiprocessing.reductions import StorageWeakRef
from transformers import PreTrainedModel

from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.models.loading import DtypeName, load_model
from lightning_moe.training.node_loading import check_same, leave_frozen_alone, load_shared, storages_of
from lightning_moe.training.rank_loading import RankLoader, is_pruned_folder
from lightning_moe.training.sharding import shard_model


class ModelSource:
    """The source of one module's model.

    Args:
        source: folder, asset or hub name.
        dtype: type of the weights that are not packed; `auto` keeps the stored one.
        from_scratch: random weights in the shape of the source's config.
    """

    def __init__(self, source: str, *, dtype: DtypeName, from_scratch: bool) -> None:
        self.source = source
        self.dtype: DtypeName = dtype
        self.from_scratch = from_scratch
        self._fill: Callable[[nn.Module], None] | None = None
        self._loaded: set[StorageWeakRef] = set()

    def load(self, *, processes: Processes, in_shares: bool) -> PreTrainedModel:
        """The model; every process of `processes` calls this.

        Args:
            processes: those that the model is for.
            in_shares: the model is going to be sharded, so the expert rows of a pruned folder wait on the meta device.

        Raises:
            ValueError: see `load_shared`.
        """
        if self.from_scratch:
            return load_model(self.source, dtype=self.dtype, from_scratch=True)
        if in_shares:
            check_same(self.source, processes=processes)
        if in_shares and is_pruned_folder(self.source):
            with processes.together():
                loader = RankLoader(self.source, dtype=self.dtype)
            self._fill = loader.fill
            return loader.model
        model = load_shared(self.source, dtype=self.dtype, processes=processes)
        if processes.size > 1:  # otherwise nobody has compared what they read
            self._loaded = storages_of(model)
        return model

    def distribute(self, model: PreTrainedModel, *, module: nn.Module, mesh: DeviceMesh | None) -> None:
        """What is done before training, when the model is cut, packed and adapted; a second time changes nothing.

        Args:
            model: what `load` gave.
            module: what holds it, and what DDP would wrap.
            mesh: of FSDP2: the model is sharded over it.
        """
        if mesh is None:
            leave_frozen_alone(module, loaded=self._loaded)
        else:
            shard_model(model, mesh=mesh, fill=self._fill)


def trainer_of(module: LightningModule) -> Trainer | None:
    """The trainer that runs a module, if one does."""
    return module._trainer


def processes_of(module: LightningModule) -> Processes:
    """Those of the trainer that runs a module; without one, as in `load_from_checkpoint`, this process alone."""
    trainer = trainer_of(module)
    return ALONE if trainer is None else Processes(rank=trainer.global_rank, size=trainer.world_size)
