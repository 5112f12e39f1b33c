"""Text through a checkpoint that need not fit in memory: one decoder layer there, hidden states on disk.

B sequences, S tokens of one, H hidden.
"""

import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import AbstractContextManager, ExitStack, nullcontext
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from tqdm.auto import tqdm

from lightning_moe.calibration.decoder_layer import DecoderLayers
from lightning_moe.calibration.hidden_states import read_hidden_states, writing_hidden_states
from lightning_moe.calibration.memory import HEAP_SHARE, KERNEL_BYTES, LIBRARY_BYTES, give_back_freed, keep_few_kernels
from lightning_moe.calibration.observer import evaluating
from lightning_moe.calibration.processes import ALONE, Processes
from lightning_moe.calibration.text import Batch, CalibrationText, vocab_size
from lightning_moe.models.discovery import MoeLayer, moe_layers
from lightning_moe.models.folders import LayerFolder
from lightning_moe.progress import hidden

BatchContext = Callable[[str, Mapping[str, Tensor]], AbstractContextManager[Any]]

_GB = 1e9
# A layer is read in parts of its experts: what one of them takes beside the layer.
_PARTS = 8


def _unwatched(corpus: str, inputs: Mapping[str, Tensor]) -> AbstractContextManager[None]:
    del corpus, inputs
    return nullcontext()


class LayerWalk:
    """Runs text through a folder's model one decoder layer after the other, of which one at a time is in memory.

    Iterate over it; each step is a loaded layer. A step must be run once with `keep` before the next one (the last
    layer needs none). What goes into a layer lies in a file of `workspace` until the step after it begins, by when
    every process must have written what it wants to keep of the layer: so a walk that was interrupted anywhere goes on
    with `first` set to the first layer of which that is missing.

    Args:
        folder: the checkpoint; its model is on the meta device.
        loaders: corpus name -> batches with `input_ids` [B, S] and, where there is padding, `attention_mask` [B, S].
        workspace: folder of the hidden states, two files at most; all processes have to see it.
        device: where a layer and its batches go.
        processes: those that share the batches; each loads every layer.
        progress: show a bar over layers and batches, with an estimate.
        first: position of the decoder layer to begin with; may be set until the walk begins.
        title: what stands before the bar.

    Raises:
        ValueError: no corpus, an empty loader, a corpus of padding only, or not enough room on the disk.
    """

    def __init__(
        self,
        folder: LayerFolder,
        *,
        loaders: Mapping[str, Iterable[Batch]],
        workspace: str | Path,
        device: torch.device | str = "cpu",
        processes: Processes = ALONE,
        progress: bool = True,
        first: int = 0,
        title: str = "Calibrating",
    ) -> None:
        keep_few_kernels()
        self.folder, self.workspace = folder, Path(workspace)
        self.device, self.processes, self.first = torch.device(device), processes, first
        self.text = CalibrationText.read(loaders, processes=processes, vocab_size=vocab_size(folder.model))
        self.names = folder.decoder_names
        self._title = title
        self._shown = progress and processes.rank == 0
        self._bar: tqdm[Any] = tqdm(disable=True)
        self._has_run = False
        self._decoder = DecoderLayers(folder.model, names=self.names)
        with processes.together():
            self.check_room()

    @property
    def num_tokens(self) -> Mapping[str, int]:
        """Tokens of each corpus that count, of all processes together."""
        return self.text.num_tokens

    @property
    def digest(self) -> str:
        """SHA-256 of the text of all processes."""
        return self.text.digest

    @property
    def buffer_bytes(self) -> int:
        """Bytes on the disk while a layer runs, of all processes: what goes into it and what comes out."""
        hidden_size = int(self.folder.model.config.get_text_config().hidden_size)
        num_files = min(2, len(self.names))
        return num_files * self.text.num_positions * hidden_size * self.folder.model.dtype.itemsize

    def peak_bytes(self, *, extra_bytes: int = 0) -> int:
        """Expected peak of memory on `device`, beside interpreter and libraries.

        Args:
            extra_bytes: what the caller holds while a layer runs, activations included.
        """
        sizes = [self.folder.decoder_bytes(name) for name in self.names]
        layer, kept = max(sizes), int(HEAP_SHARE * sum(sizes))
        embeddings = sum(value.nbytes for value in self.folder.model.get_input_embeddings().parameters())
        running = layer + KERNEL_BYTES + max(layer // _PARTS, extra_bytes)
        return LIBRARY_BYTES + kept + max(embeddings, running)

    def describe(self, *, extra_bytes: int = 0) -> str:
        """What the walk will cost, in a line."""
        sizes = [self.folder.decoder_bytes(name) for name in self.names]
        tokens = ", ".join(f"{corpus} {count:,}" for corpus, count in self.num_tokens.items())
        start = f", from layer {self.first} on" if self.first else ""
        return (
            f"{self._title} {len(sizes)} decoder layers of '{self.folder.source}' one at a time{start}: "
            f"{sum(sizes) / _GB:.3g} GB, the largest {max(sizes) / _GB:.3g} GB; tokens: {tokens}; hidden states of "
            f"{self.buffer_bytes / _GB:.3g} GB in '{self.workspace}'; expected peak memory "
            f"{self.peak_bytes(extra_bytes=extra_bytes) / _GB:.3g} GB beside interpreter and libraries."
        )

    def __iter__(self) -> Iterator["DecoderStep"]:
        """Loads each decoder layer, yields it on the device, then releases it and removes what went into it.

        Raises:
            ValueError: a weight or a file of hidden states cannot be read, in any of the processes.
        """
        self._remove_inputs(but=self.first)
        num_batches = len(self.text.batches)
        total, initial = len(self.names) * num_batches, self.first * num_batches
        with tqdm(total=total, initial=initial, disable=hidden(progress=self._shown), leave=False) as self._bar:
            with self.processes.together():
                self._prepare()
            for index in range(self.first, len(self.names)):
                name = self.names[index]
                self._bar.set_description(f"{self._title}: layer {index + 1} of {len(self.names)}")
                self._has_run = False
                with ExitStack() as stack:
                    stack.callback(self._release, name)
                    with self.processes.together():
                        self.folder.load_decoder(name)
                        self.folder.model.get_submodule(name).to(self.device)
                    give_back_freed()
                    yield DecoderStep(index=index, name=name, moe=self._moe_layer(name), _walk=self)
                self.processes.gather(None)  # all have kept what they want of this layer
                self._remove_inputs(but=index + 1)

    def run_layer(self, index: int, *, batch: BatchContext, keep: bool) -> None:
        """See `DecoderStep.run`."""
        keep = keep and index + 1 < len(self.names)
        if self._has_run and self._bar.total is not None:
            self._bar.total += len(self.text.batches)  # a further pass
        self._has_run = True
        with ExitStack() as stack:
            stack.enter_context(torch.inference_mode(mode=False))
            stack.enter_context(torch.no_grad())
            stack.enter_context(evaluating(self.folder.model))
            append = stack.enter_context(writing_hidden_states(self._inputs(index + 1))) if keep else None
            for corpus, inputs, hidden_BSH in self._read(index):
                with batch(corpus, inputs):
                    output_BSH = self._decoder.run(
                        index, hidden_BSH.to(self.device), attention_mask=inputs.get("attention_mask")
                    )
                if append is not None:
                    append(output_BSH)
                del hidden_BSH, output_BSH
                give_back_freed()
                self._bar.update()

    def _release(self, name: str) -> None:
        """Frees the layer's memory, also where a module of it is still held (by the step, for one)."""
        layer = self.folder.model.get_submodule(name)
        for value in (*layer.parameters(), *layer.buffers()):
            value.data = value.data.new_empty(0)
        self.folder.release(name)
        give_back_freed()

    def _moe_layer(self, name: str) -> MoeLayer | None:
        layers = moe_layers(self.folder.model)
        return next((layer for layer in layers if layer.block_name.rpartition(".")[0] == name), None)

    def _prepare(self) -> None:
        """What all layers need; and, at the start of the text, what goes into the first one."""
        self.folder.compute_buffers()
        if self.first == 0:
            self._write_first_inputs()
        for name, buffer in list(self.folder.model.named_non_persistent_buffers()):
            owner, _, own_name = name.rpartition(".")
            module = self.folder.model.get_submodule(owner)
            module.register_buffer(own_name, buffer.to(self.device), persistent=False)

    def _write_first_inputs(self) -> None:
        """On the CPU: the embeddings are read, used once and released."""
        model = self.folder.model
        embeddings = model.get_input_embeddings()
        name = next(name for name, module in model.named_modules() if module is embeddings)
        self.folder.load(name)
        with torch.no_grad(), writing_hidden_states(self._inputs(0)) as append:
            for _, inputs in self.text.batches:
                append(self._decoder.first_input(inputs))
        self.folder.release(name)

    def _read(self, index: int) -> Iterator[tuple[str, dict[str, Tensor], Tensor]]:
        """Corpus, inputs and what goes into the layer, of each batch."""
        path = self._inputs(index)
        states = read_hidden_states(path)
        for corpus, inputs in self.text.batches:
            hidden_BSH = next(states, None)
            if hidden_BSH is None or hidden_BSH.shape[:2] != inputs["input_ids"].shape:
                raise ValueError(
                    f"The hidden states in '{path}' are not those of the text. Remove its folder and run again."
                )
            yield corpus, {key: value.to(self.device) for key, value in inputs.items()}, hidden_BSH

    def _inputs(self, index: int) -> Path:
        return self.workspace / f"inputs_{index:05d}.rank{self.processes.rank}.bin"

    def _remove_inputs(self, *, but: int) -> None:
        for path in self.workspace.glob(f"inputs_*.rank{self.processes.rank}.bin"):
            if path != self._inputs(but):
                path.unlink()

    def check_room(self, *, more_bytes: int = 0) -> None:
        """Looks whether `workspace` has room for the hidden states.

        Args:
            more_bytes: what the caller will write there beside them.

        Raises:
            ValueError: there is too little.
        """
        folder = self.workspace.absolute()
        used = sum(path.stat().st_size for path in folder.glob("inputs_*"))
        while not folder.is_dir():
            folder = folder.parent
        free = shutil.disk_usage(folder).free + used
        if free < self.buffer_bytes + more_bytes:
            more = f" beside {more_bytes / _GB:.3g} GB of finished layers" if more_bytes else ""
            raise ValueError(
                f"The hidden states of this text need {self.buffer_bytes / _GB:.3g} GB in '{self.workspace}'{more}, "
                f"and {free / _GB:.3g} GB are free there. Give another working folder (`workspace`), or less text."
            )


@dataclass(frozen=True, kw_only=True)
class DecoderStep:
    """One decoder layer of a walk, in memory until the next step.

    Args:
        index: position among the decoder layers, dense ones included.
        name: full name of the layer.
        moe: its MoE layer; None for a dense one.
    """

    index: int
    name: str
    moe: MoeLayer | None
    _walk: LayerWalk = field(repr=False)

    def run(self, *, batch: BatchContext = _unwatched, keep: bool = True) -> None:
        """Every batch of this process through the layer, in the order of the text, without gradients.

        Args:
            batch: entered around each batch with its corpus and its inputs, on the device.
            keep: write the outputs, as what goes into the next layer; false for further passes over the same layer.

        Raises:
            ValueError: what `batch` raises, or a file of hidden states cannot be read or written, in any process.
        """
        with self._walk.processes.together():
            self._walk.run_layer(self.index, batch=batch, keep=keep)
