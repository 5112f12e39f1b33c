"""Going through a folder layer by layer holds the packed model and one layer."""

import subprocess
import sys
from pathlib import Path

import pytest
import torch
from tiny_models import tiny_model

CHILD = """
import sys
from pathlib import Path
import torch
from lightning_moe.surgery.streaming import quantize_folder

def high_water():
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith("VmHWM"))

torch.set_num_threads(1)
quantize_folder(sys.argv[1])  # modules that are imported on first use
before = high_water()
model = quantize_folder(sys.argv[2])
print(high_water() - before, sum(t.nbytes for t in (*model.parameters(), *model.buffers())))
"""


@pytest.mark.parametrize("fused", [False, True], ids=["by_expert", "fused"])
@pytest.mark.skipif(not Path("/proc/self/status").is_file(), reason="reads the high-water mark that Linux keeps")
def test_memory_is_the_packed_model_and_one_layer(fused, tmp_path) -> None:
    """8 layers of 25 MB each in 16 bit, 201 MB in all; 20 MB are for allocators and threads."""
    size = {"num_hidden_layers": 8, "num_experts": 16, "moe_intermediate_size": 512, "hidden_size": 512}
    tiny_model(dtype=torch.bfloat16, **size).save_pretrained(tmp_path / "large", save_original_format=not fused)
    layer_bytes = 16 * 512 * 512 * 3 * 2
    tiny_model().save_pretrained(tmp_path / "tiny")
    command = [sys.executable, "-c", CHILD, str(tmp_path / "tiny"), str(tmp_path / "large")]
    peak, packed = map(int, subprocess.run(command, check=True, capture_output=True, text=True).stdout.split())
    assert packed < 8 * layer_bytes / 3
    assert peak < packed + layer_bytes + 20e6
