"""What is done to a sample: one to three kinds of damage that fit the files they are done to."""

import os
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from fuzzing.damage_bytes import BYTES, Damage, Draw
from fuzzing.damage_json import JSON, LINES
from fuzzing.damage_tensors import TENSORS
from fuzzing.damage_zip import ZIP
from fuzzing.readers import Sample, empty
from hypothesis import strategies as st

# By the end of a file's name; others take damage to their bytes alone.
_OWN: Mapping[str, tuple[Damage, ...]] = {
    ".safetensors": TENSORS,
    ".json": JSON,
    ".jsonl": LINES,
    ".txt": LINES,
    ".yaml": LINES,
    ".ckpt": ZIP,
}
_PLACES = ("missing", "directory", "fifo", "dangling")


@dataclass(frozen=True, kw_only=True)
class DamagedSample:
    """A sample as a reader will find it.

    Args:
        files: path -> content.
        odd: path -> what stands there in place of a file: nothing, a directory, a FIFO, a link to nowhere.
        story: what was done, in order.
    """

    files: Mapping[str, bytes] = field(repr=False)
    odd: Mapping[str, str]
    story: tuple[str, ...]

    def write(self, folder: Path) -> None:
        """Puts it into `folder`, which is emptied before."""
        empty(folder)
        for name, content in self.files.items():
            path = folder / name
            path.parent.mkdir(parents=True, exist_ok=True)
            match self.odd.get(name):
                case None:
                    path.write_bytes(content)
                case "directory":
                    path.mkdir()
                case "fifo":
                    os.mkfifo(path)
                case "dangling":
                    path.symlink_to(folder / "nowhere")
                case _:
                    pass


@st.composite
def damaged(draw: Draw, sample: Sample) -> DamagedSample:
    """A sample with one to three kinds of damage."""
    files, odd, story = dict(sample.files), {}, []
    for _ in range(draw(st.sampled_from((1, 1, 1, 1, 2, 3)))):
        name = draw(st.sampled_from(sample.damaged))
        kind = draw(st.sampled_from(("own",) * 13 + ("bytes",) * 5 + ("place", "other")))
        if kind == "place":
            odd[name] = draw(st.sampled_from(_PLACES))
            story.append(f"{name}: {odd[name]}")
        elif kind == "other":
            other = draw(st.sampled_from(sorted(sample.files)))
            files[name] = sample.files[other]
            story.append(f"{name}: content of {other}")
        else:
            own = _OWN.get(Path(name).suffix, BYTES) if kind == "own" else BYTES
            damage = draw(st.sampled_from(own))
            files[name] = damage(files[name], draw)
            story.append(f"{name}: {damage.__name__}")
    return DamagedSample(files=files, odd=odd, story=tuple(story))
