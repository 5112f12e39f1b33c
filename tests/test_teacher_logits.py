"""Logits of a teacher on disk: what is written, read, resumed and refused."""

import json
import logging
from collections import Counter

import pytest
import torch
from cli_runs import run, save_job
from text_data import data_module
from tiny_runs import SHIPPED_VOCABULARY, save_model, save_text, text_module

from lightning_moe.files import read_tensors, write_tensors
from lightning_moe.models.loading import load_model
from lightning_moe.training import teach
from lightning_moe.training.corpora import Corpus
from lightning_moe.training.distillation import load_teacher
from lightning_moe.training.teach import make_manifest, prepare_folder, top_k_log_probabilities, write_teacher_logits
from lightning_moe.training.teacher_logits import TeacherLogits, TeacherManifest, rows_digest

SHARD_ROWS = 3


@pytest.fixture(scope="module")
def job(tmp_path_factory):
    folder = save_text(tmp_path_factory.mktemp("teacher"))
    save_model(folder / "model")
    return folder


def manifest_of(rows, **overrides):
    settings = {"teacher": "model", "quantize": "none", "vocab_size": SHIPPED_VOCABULARY, "k": 4}
    return make_manifest(rows, **(settings | {"shard_rows": SHARD_ROWS} | overrides))


def write(job, out, *, data=None, **overrides):
    rows = (text_module(job) if data is None else data).rows("train")
    manifest = manifest_of(rows, **overrides)
    prepare_folder(out, manifest=manifest)
    model = load_model(str(job / "model"))
    write_teacher_logits(model, rows=rows, manifest=manifest, folder=out, batch_size=2, progress=False)
    return TeacherLogits(out)


@pytest.fixture(scope="module")
def written(job, tmp_path_factory):
    out = tmp_path_factory.mktemp("written")
    write(job, out)
    return out


def shards(folder):
    return sorted(folder.glob("*.safetensors"))


def test_every_row_has_the_teachers_likeliest_tokens(job, written):
    rows = text_module(job).rows("train")["a"]
    taught, model = TeacherLogits(written).of_rows(rows, corpus="a"), load_model(str(job / "model"))
    assert len(taught) == len(rows) > 2 * SHARD_ROWS
    for index in (0, SHARD_ROWS, len(rows) - 1):
        row = taught[index]
        assert all(torch.equal(row[key], value) for key, value in rows[index].items())
        logits_SV = model(row["input_ids"][None], attention_mask=row["attention_mask"][None]).logits[0].detach()
        values_Sk, token_Sk = logits_SV.log_softmax(-1).topk(4)
        assert torch.equal(row["teacher_ids"].long(), token_Sk)
        torch.testing.assert_close(row["teacher_logprobs"].float(), values_Sk, rtol=2e-3, atol=1e-3)
    assert (row["teacher_ids"].dtype, row["teacher_logprobs"].dtype) == (torch.int16, torch.float16)


def test_single_precision_and_large_vocabularies(job, tmp_path):
    rows = text_module(job).rows("train")
    manifest = manifest_of(rows, vocab_size=151_936, k=8, log_prob_dtype="float32", shard_rows=None)
    assert manifest.dtypes == (torch.int32, torch.float32)
    # 32 tokens x 8 x (4 + 4) bytes; a shard has 64 MiB.
    assert (manifest.row_bytes, manifest.shard_rows) == (2048, 2**26 // 2048)
    logits = write(job, tmp_path / "out", log_prob_dtype="float32")
    row = logits.of_rows(rows["a"], corpus="a")[1]
    model = load_model(str(job / "model"))
    expected_Sk = model(row["input_ids"][None]).logits[0].log_softmax(-1).topk(4).values
    torch.testing.assert_close(row["teacher_logprobs"], expected_Sk, rtol=0, atol=1e-5)


@pytest.mark.parametrize("positions", [1, 4, 100])
def test_top_k_in_pieces_is_that_of_the_whole(positions, monkeypatch):
    monkeypatch.setattr(teach, "CHUNK_NUMBERS", 9 * positions)
    logits_BSV = torch.randn(3, 5, 9)
    token_BSk, log_prob_BSk = top_k_log_probabilities(logits_BSV, k=9)
    torch.testing.assert_close(log_prob_BSk.exp().sum(-1), torch.ones(3, 5))
    torch.testing.assert_close(log_prob_BSk, logits_BSV.log_softmax(-1).gather(-1, token_BSk))


def test_targets_follow_their_rows_through_mixing_and_shuffling(job, tmp_path):
    corpora = {name: Corpus(source=str(job / f"{name}.jsonl")) for name in ("a", "b")}
    logits = write(job, tmp_path / "out", data=text_module(job, train=corpora))
    with_targets, plain = text_module(job, train=corpora, batch_size=3), text_module(job, train=corpora, batch_size=3)
    with_targets.attach_teacher(logits)
    of_tokens = {}
    for name, rows in plain.rows("train").items():
        taught = logits.of_rows(rows, corpus=name)
        of_tokens |= {tuple(taught[index]["input_ids"].tolist()): taught[index] for index in range(len(rows))}
    batches, plain_batches = list(with_targets.train_dataloader()), list(plain.train_dataloader())
    assert Counter(key for batch in batches for key in batch) == Counter(
        {key: len(batches) for key in ("input_ids", "attention_mask", "labels", "teacher_ids", "teacher_logprobs")}
    )
    for batch, other in zip(batches, plain_batches, strict=True):
        assert all(torch.equal(batch[key], value) for key, value in other.items())
        for row, ids_S in enumerate(batch["input_ids"]):
            expected = of_tokens[tuple(ids_S.tolist())]
            assert torch.equal(batch["teacher_ids"][row], expected["teacher_ids"])
            assert torch.equal(batch["teacher_logprobs"][row], expected["teacher_logprobs"])
    with_targets.attach_teacher(None)
    assert "teacher_ids" not in next(iter(with_targets.train_dataloader()))
    assert all("teacher_ids" not in batch for loader in with_targets.val_dataloader() for batch in loader)


def test_worker_processes_read_the_same(job, written):
    batches = []
    for num_workers in (0, 1):
        data = text_module(job, num_workers=num_workers)
        data.attach_teacher(TeacherLogits(written))
        batches.append(list(data.train_dataloader()))
    for mine, theirs in zip(*batches, strict=True):
        assert all(torch.equal(mine[key], value) for key, value in theirs.items())


def test_the_name_of_a_corpus_and_what_of_it_is_learned_do_not_matter(job, written):
    data = text_module(job, train={"other name": Corpus(source=str(job / "a.jsonl"))})
    data.attach_teacher(TeacherLogits(written))
    assert "teacher_ids" in next(iter(data.train_dataloader()))
    rows = data.rows("train")["other name"]
    before = rows_digest(rows)
    rows.learn_NS = torch.zeros_like(rows.input_ids_NS, dtype=torch.bool)
    assert rows_digest(rows) == before
    rows.length_N[0] -= 1
    assert rows_digest(rows) != before


def test_an_interrupted_run_goes_on_after_the_last_whole_shard(job, tmp_path, monkeypatch):
    whole = tmp_path / "whole"
    write(job, whole)
    out, calls = tmp_path / "out", []
    write_shard = teach.write_tensors

    def fail_at_the_third(*arguments, **settings):
        calls.append(1)
        if len(calls) == 3:
            raise KeyboardInterrupt
        write_shard(*arguments, **settings)

    monkeypatch.setattr(teach, "write_tensors", fail_at_the_third)
    with pytest.raises(KeyboardInterrupt):
        write(job, out)
    assert len(shards(out)) == 2
    with pytest.raises(ValueError, match=r"not complete: .*-00000006.safetensors of corpus 'a' is missing. Run the"):
        TeacherLogits(out)
    changed = [path.stat().st_mtime_ns for path in shards(out)]
    write(job, out)
    assert [path.stat().st_mtime_ns for path in shards(out)][:2] == changed
    assert [path.name for path in shards(out)] == [path.name for path in shards(whole)]
    assert [path.read_bytes() for path in shards(out)] == [path.read_bytes() for path in shards(whole)]
    assert not list(out.glob(".*"))


def test_a_damaged_shard_is_refused_and_written_again(job, tmp_path):
    write(job, tmp_path)
    rows, shard = text_module(job).rows("train")["a"], shards(tmp_path)[1]
    content = shard.read_bytes()
    shard.write_bytes(content[:-5])
    with pytest.raises(ValueError, match="is not a readable shard of teacher logits"):
        TeacherLogits(tmp_path)
    write(job, tmp_path)
    assert shard.read_bytes() == content
    tensors, _ = read_tensors(shard, what="shard")
    for name, value in (("ids.3", 5000), ("ids.4", -1), ("log_probs.5", 1), ("log_probs.3", float("nan"))):
        write_tensors(shard, tensors | {name: torch.full_like(tensors[name], value)}, metadata={})
        with pytest.raises(ValueError, match=rf"Row {name[-1]} of the teacher logits .* is damaged. Run `teach` again"):
            TeacherLogits(tmp_path).of_rows(rows, corpus="a")[int(name[-1])]
    write_tensors(shard, {name: tensors[name] for name in list(tensors)[1:]}, metadata={})
    with pytest.raises(ValueError, match=r"does not hold rows 3 to 5. Write it again"):
        TeacherLogits(tmp_path)


def test_logits_of_other_rows_are_refused(job, written):
    other_text = text_module(job, train={"a": Corpus(source=str(job / "b.jsonl"))})
    with pytest.raises(ValueError, match=r"of other rows than training corpus 'a': its text, .* those of \['a'\]"):
        other_text.attach_teacher(TeacherLogits(written))
    with pytest.raises(ValueError, match=r"of rows of 32 tokens, and `data.sequence_length` is 16"):
        text_module(job, sequence_length=16).attach_teacher(TeacherLogits(written))
    with pytest.raises(ValueError, match="of a vocabulary of 4096 tokens, and the student has 128: 'model' is not its"):
        TeacherLogits(written).check_vocabulary(128)
    with pytest.raises(ValueError, match=r"`data.train` names no corpora"):
        data_module(validation={"b": Corpus(source=str(job / "b.jsonl"))}).attach_teacher(TeacherLogits(written))


def test_a_folder_of_other_logits_is_left_alone(job, written):
    rows = text_module(job).rows("train")
    with pytest.raises(ValueError, match=r"holds other teacher logits: `k` is 4 there and 8 here. Name another folder"):
        prepare_folder(written, manifest=manifest_of(rows, k=8))
    with pytest.raises(ValueError, match="`quantize` is none there and nf4 here"):
        prepare_folder(written, manifest=manifest_of(rows, quantize="nf4"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"k": "4"}, r"not a manifest of teacher logits: \['k'\] do not fit"),
        ({"more": 1}, "not a manifest of teacher logits"),
        ({"num_rows": {}}, "not a manifest of teacher logits"),
        ({"shard_rows": 0}, "not a manifest of teacher logits"),
    ],
)
def test_a_damaged_manifest_is_refused(written, tmp_path, change, message):
    content = json.loads((written / "manifest.json").read_text())
    (tmp_path / "manifest.json").write_text(json.dumps(content | change))
    with pytest.raises(ValueError, match=message):
        TeacherManifest.load(tmp_path)
    with pytest.raises(ValueError, match="There is no manifest of teacher logits at"):
        TeacherLogits(tmp_path / "missing")


def test_settings_are_checked(job):
    rows = text_module(job).rows("train")
    with pytest.raises(ValueError, match="`k` must be between 1 and the vocabulary's size, 4096, got 4097"):
        manifest_of(rows, k=4097)
    with pytest.raises(ValueError, match=r"`k` must be between 1 .* got 0"):
        manifest_of(rows, k=0)
    with pytest.raises(ValueError, match="`shard_rows` must be at least 1, got -1"):
        manifest_of(rows, shard_rows=-1)
    with pytest.raises(ValueError, match=r"There are no training corpora: a teacher needs rows"):
        manifest_of({})


@pytest.mark.parametrize("quantize", ["none", "nf4"])
def test_teach_from_the_command_line(tmp_path, caplog, quantize):
    job = save_job(tmp_path)
    flags = ("--config", job / "data.yaml", "--model", job / "model", "--out", job / "taught", "--k", 3)
    with caplog.at_level(logging.INFO):
        run("teach", *flags, "--quantize", quantize)
    logits = TeacherLogits(job / "taught")
    num_rows = logits.manifest.num_rows["a"]
    # 32 positions x 3 tokens x (2 + 2) bytes.
    assert f"{num_rows} rows, 3 tokens of each position: {num_rows * 32 * 3 * 4 / 1e6:.1f} MB" in caplog.text
    row = logits.of_rows(text_module(job).rows("train")["a"], corpus="a")[2]
    teacher = load_teacher(str(job / "model"), quantize=quantize)
    expected_Sk = teacher(row["input_ids"][None]).logits[0].detach().log_softmax(-1).topk(3).values
    torch.testing.assert_close(row["teacher_logprobs"].float(), expected_Sk, rtol=2e-3, atol=5e-3)
