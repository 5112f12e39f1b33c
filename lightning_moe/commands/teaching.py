"""The command `teach`."""

from lightning_moe.commands._shared import Device, resolve_device
from lightning_moe.models.loading import DtypeName, read_config
from lightning_moe.training.data import TextDataModule
from lightning_moe.training.distillation import TeacherQuantize, load_teacher
from lightning_moe.training.teach import make_manifest, prepare_folder, write_teacher_logits
from lightning_moe.training.teacher_logits import LogProbDtype


def teach(
    *,
    model: str,
    out: str,
    data: TextDataModule,
    k: int = 64,
    quantize: TeacherQuantize = "none",
    log_prob_dtype: LogProbDtype = "float16",
    dtype: DtypeName = "auto",
    device: Device = "auto",
) -> None:
    """Run the unpruned model over the training rows and keep its likeliest next tokens, to distil from disk.

    `fit --model.teacher_logits OUT` then needs no teacher in memory. Started again, it goes on after the last whole
    shard. Bytes: rows x tokens in a row x k x 4 (6 where the vocabulary is larger than 32,768).

    Args:
        model: Folder, `asset:small_moe` or hub name of the unpruned model.
        out: Folder to write.
        data: The data module; its `train` corpora and sequence length must be those of the later `fit`.
        k: Tokens kept of each position; the probability of all others is one number.
        quantize: `nf4` packs the teacher as it is loaded; `none` takes it as it is stored.
        log_prob_dtype: Stored type of the log-probabilities.
        dtype: Type of the teacher's unpacked weights; `auto` is the stored one.
        device: Where it runs; `auto` is the GPU if there is one.
    """
    rows = data.rows("train")
    vocab_size = int(read_config(model).get_text_config().vocab_size)
    data.check_vocabulary(vocab_size=vocab_size)
    manifest = make_manifest(
        rows, teacher=model, quantize=quantize, vocab_size=vocab_size, k=k, log_prob_dtype=log_prob_dtype
    )
    prepare_folder(out, manifest=manifest)
    teacher = load_teacher(model, quantize=quantize, dtype=dtype)
    teacher.to(resolve_device(device))  # pyright: ignore[reportArgumentType]: transformers wraps `to` without its types
    write_teacher_logits(teacher, rows=rows, manifest=manifest, folder=out, batch_size=data.batch_size)
