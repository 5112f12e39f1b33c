"""Two processes of a node that load the same model (started by `test_node_loading.py`): FOLDER RANK SIZE."""

import os
import sys
import tempfile
from datetime import timedelta
from functools import partial
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[1]), str(Path(__file__).parent)]

import torch  # noqa: E402
from torch import distributed  # noqa: E402

from lightning_moe.calibration.processes import Processes  # noqa: E402
from lightning_moe.models.loading import load_model  # noqa: E402
from lightning_moe.training.distillation import load_teacher  # noqa: E402
from lightning_moe.training.node_loading import load_shared  # noqa: E402


def own_bytes():
    """Memory of this process that is its own: neither mapped from a file nor shared."""
    lines = Path("/proc/self/smaps_rollup").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("Anonymous"))


def same_model(one, other):
    """Bit for bit, in type and mode."""
    mine, theirs = ({**dict(m.named_parameters()), **dict(m.named_buffers())} for m in (one, other))
    assert mine.keys() == theirs.keys()
    for name, value in mine.items():
        assert value.dtype == theirs[name].dtype, name
        assert torch.equal(value, theirs[name]), name
    assert one.config.name_or_path == other.config.name_or_path
    assert one.training == other.training


def loads(folder, processes):
    """Every kind of source gives what one process gets."""
    for name in ("stock", "ragged", "nf4", "tied"):
        for dtype in ("auto", "float32"):
            source = str(folder / name)
            shared, alone = load_shared(source, dtype=dtype, processes=processes), load_model(source, dtype=dtype)
            same_model(shared, alone)
            assert shared.name_or_path == alone.name_or_path
            assert shared.config.to_dict().keys() == alone.config.to_dict().keys()
    for name, dtype in (("stock", "bfloat16"), ("ragged", "auto"), ("nf4", "auto")):
        teacher = partial(load_teacher, str(folder / name), quantize="nf4", dtype=dtype)
        same_model(teacher(processes=processes), teacher())
    return sorted(os.listdir(tempfile.gettempdir()))


def growth(folder, processes, load):
    """Own memory that a loaded model took, every byte of it read, in bytes; and the model's size."""
    before = own_bytes()
    model = load(str(folder / "large"), processes)
    tensors = list(model.state_dict().values())
    sum(int(tensor.reshape(-1).view(torch.uint8).max()) for tensor in tensors)
    return own_bytes() - before, sum(tensor.nbytes for tensor in tensors)


def message(source, processes):
    try:
        load_shared(str(source), dtype="auto", processes=processes)
    except ValueError as error:
        return str(error)
    raise AssertionError(f"'{source}' was not refused")


def main(folder, rank, size):
    store = distributed.FileStore(str(folder / "store"), size)
    distributed.init_process_group("gloo", store=store, rank=rank, world_size=size, timeout=timedelta(seconds=60))
    processes = Processes.of_default_group()
    tempfile.tempdir = str(folder / "temporary")
    found = {"left": loads(folder, processes)}
    shared = partial(load_shared, dtype="auto")
    growth(folder, processes, lambda source, _: load_model(str(folder / "stock")))  # imports on first use
    found["alone"] = growth(folder, processes, lambda source, _: load_model(source))
    found["shared"] = growth(folder, processes, lambda source, processes: shared(source, processes=processes))
    cases = ("missing", "truncated", "other", "retrained")
    found |= {case: message(folder / f"rank{rank}" / case, processes) for case in cases}
    torch.save(found, folder / f"rank{rank}.pt")
    distributed.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3]))
