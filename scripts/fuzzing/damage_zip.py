"""Damage to zip archives (PyTorch's checkpoints): members, their pickles, compression, sizes."""

import io
import pickle
import zipfile

import torch
from fuzzing.damage_bytes import BYTES, Damage, Draw
from fuzzing.damage_json import damage_tree
from hypothesis import strategies as st


class _Call:
    """Pickles as a call of a function; reading it with an open unpickler would run it."""

    def __init__(self, module: str, name: str, *arguments: object) -> None:
        self.call = (module, name, arguments)

    def opcodes(self) -> bytes:
        module, name, arguments = self.call
        return f"c{module}\n{name}\n".encode() + pickle.dumps(arguments, protocol=2)[2:-1] + b"R."


_CALLS = (
    _Call("os", "system", "true"),
    _Call("builtins", "exec", "raise SystemExit"),
    _Call("builtins", "open", "/etc/passwd"),
    _Call("torch.hub", "load", "evil/evil", "evil"),
    _Call("torch", "load", "evil.pt"),
    _Call("torch.serialization", "load", "evil.pt"),
    _Call("collections", "OrderedDict"),
    _Call("torch._utils", "_rebuild_tensor_v2"),
    _Call("lightning_moe.files", "write_json", "/tmp/evil", 1),
)


def members(content: bytes) -> dict[str, bytes] | None:
    """Name -> content; None if it is damaged already."""
    try:
        with zipfile.ZipFile(io.BytesIO(content)) as archive:
            return {name: archive.read(name) for name in archive.namelist()}
    except Exception:  # whatever a damaged file makes it raise
        return None


def pack(files: dict[str, bytes], *, compression: int = zipfile.ZIP_STORED) -> bytes:
    """The inverse of `members`."""
    target = io.BytesIO()
    with zipfile.ZipFile(target, "w", compression) as archive:
        for name, content in files.items():
            archive.writestr(name, content)
    return target.getvalue()


def change_member(content: bytes, draw: Draw) -> bytes:
    """One member damaged, gone, doubled, renamed or grown; or the pickle replaced by a call."""
    files = members(content)
    if not files:
        return draw(st.sampled_from(BYTES))(content, draw)
    name = draw(st.sampled_from(sorted(files)))
    pickled = [own for own in files if own.endswith("data.pkl")]
    match draw(st.sampled_from(("damage", "pickle", "pickle", "call", "drop", "rename", "grow", "bomb", "empty"))):
        case "damage":
            files[name] = draw(st.sampled_from(BYTES))(files[name], draw)
        case "pickle" if pickled:
            files[pickled[0]] = draw(st.sampled_from(BYTES))(files[pickled[0]], draw)
        case "call" if pickled:
            files[pickled[0]] = b"\x80\x02" + draw(st.sampled_from(_CALLS)).opcodes()
        case "drop":
            del files[name]
        case "rename":
            files[draw(st.sampled_from(("../../outside", "/etc/passwd", f"{name}x", "archive/data/0")))] = files.pop(
                name
            )
        case "grow":
            files[name] += bytes(draw(st.integers(1, 4096)))
        case "bomb":
            files[name] = bytes(64 * 2**20)
            return pack(files, compression=zipfile.ZIP_DEFLATED)
        case _:
            files[name] = b""
    return pack(files)


def change_content(content: bytes, draw: Draw) -> bytes:
    """Another value, key or nesting in what the checkpoint says."""
    try:
        tree = torch.load(io.BytesIO(content), weights_only=True)
    except Exception:  # whatever a damaged file makes it raise
        return draw(st.sampled_from(BYTES))(content, draw)
    target = io.BytesIO()
    torch.save(damage_tree(tree, draw), target)
    return target.getvalue()


ZIP: tuple[Damage, ...] = (change_member, change_content)
