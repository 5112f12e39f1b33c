"""Teachers of a recovery: in memory, in 4 bit, on disk."""

from types import SimpleNamespace

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from random_plans import random_plan
from tiny_runs import (
    SHIPPED_VOCABULARY,
    loader_of,
    quiet_trainer,
    save_model,
    save_text,
    text_module,
    token_batches,
)

from callbacks import Recovery
from lightning_moe.adapters.inject import AdapterConfig
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.loading import load_model
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import apply_plan, convert_experts
from lightning_moe.training.distillation import ModelTeacher, load_teacher
from lightning_moe.training.losses import distillation_loss, next_token_loss
from lightning_moe.training.module import RecoveryModule
from lightning_moe.training.teach import make_manifest, prepare_folder, write_teacher_logits
from lightning_moe.training.teacher_logits import TeacherLogits

pytestmark = [
    pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero"),
    pytest.mark.filterwarnings("ignore:The dirpath has changed"),
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_text(tmp_path_factory.mktemp("distillation"))
    save_model(folder / "model")
    pruned = load_model(str(folder / "model"))
    apply_plan(pruned, plan=random_plan(pruned, evicted=[[0, 3], [5]]))
    save_ragged(pruned, folder / "pruned")
    write_logits(folder, folder / "whole", k=SHIPPED_VOCABULARY, log_prob_dtype="float32")
    return folder


def write_logits(folder, out, **settings):
    data, teacher = text_module(folder), load_model(str(folder / "model"))
    rows = data.rows("train")
    manifest = make_manifest(rows, teacher="model", quantize="none", vocab_size=SHIPPED_VOCABULARY, **settings)
    prepare_folder(out, manifest=manifest)
    write_teacher_logits(teacher, rows=rows, manifest=manifest, folder=out, batch_size=4, progress=False)


def fit(folder, *, callbacks=(), source="pruned", max_steps=3, data=None, resume=None, **settings):
    torch.manual_seed(0)
    module = RecoveryModule(
        source=str(folder / source), expert_learning_rate=1e-2, gradient_checkpointing=False, **settings
    )
    recovery = Recovery(quantize="none", adapter=AdapterConfig(expert_rank=2, router_rank=2))
    trainer = quiet_trainer([recovery, *callbacks], max_steps=max_steps, enable_checkpointing=bool(callbacks))
    trainer.fit(module, datamodule=data or text_module(folder, validation=None), ckpt_path=resume)
    return module, {name: float(value) for name, value in trainer.callback_metrics.items()}


def trained(module):
    return {name: value.detach() for name, value in module.named_parameters() if value.requires_grad}


def test_an_unpruned_student_equals_its_teacher(folder):
    module, metrics = fit(folder, source="model", teacher=str(folder / "model"), max_steps=1)
    assert metrics["distillation_loss"] == pytest.approx(0, abs=1e-5)
    assert module._teacher is None


@pytest.mark.parametrize("weight", [0.25, 1.0])
def test_the_two_losses_are_mixed(folder, weight):
    teacher = load_model(str(folder / "model"))
    module = RecoveryModule(source=str(folder / "pruned"), teacher=str(folder / "model"), distillation=weight)
    module.configure_model()
    module.on_fit_start()
    logged = {}
    module.log = lambda name, value, **_: logged.update({name: value})
    module.log_dict = lambda values, **_: logged.update(values)
    batch = next(iter(text_module(folder).train_dataloader()))
    loss = module.training_step(batch, 0)
    student, labels = module.language_model, batch.pop("labels")
    expected = distillation_loss(student(**batch).logits, teacher(**batch).logits, labels)
    next_token = next_token_loss(student(**batch).logits, labels)
    torch.testing.assert_close(loss, (1 - weight) * next_token + weight * expected)
    torch.testing.assert_close(logged["train_loss"], next_token)
    torch.testing.assert_close(logged["distillation_loss"], expected)
    assert expected > 1e-3
    assert not any(value.requires_grad for value in module._teacher.model.parameters())
    assert not module._teacher.model.training


def test_a_teacher_on_disk_with_every_token_trains_like_the_one_in_memory(folder):
    in_memory, metrics = fit(folder, teacher=str(folder / "model"), distillation=1.0)
    on_disk, metrics_on_disk = fit(folder, teacher_logits=str(folder / "whole"), distillation=1.0)
    alone, _ = fit(folder)
    assert metrics_on_disk == pytest.approx(metrics, rel=1e-4)
    for name, value in trained(in_memory).items():
        torch.testing.assert_close(trained(on_disk)[name], value, rtol=1e-3, atol=1e-4)
    assert any((trained(alone)[name] - value).abs().max() > 1e-3 for name, value in trained(in_memory).items())


def test_a_packed_teacher_is_streamed_and_the_same_as_one_packed_in_memory(folder, monkeypatch):
    with monkeypatch.context() as only_streaming:
        only_streaming.delattr("lightning_moe.training.distillation.load_model")
        streamed = load_teacher(str(folder / "model"), quantize="nf4")
    packed = load_model(str(folder / "model"))
    convert_experts(packed)
    quantize_model(packed)
    save_ragged(packed, folder / "packed")
    stored = load_teacher(str(folder / "packed"), quantize="nf4")
    monkeypatch.setattr("lightning_moe.training.distillation.can_stream", lambda _: False)
    loaded = load_teacher(str(folder / "model"), quantize="nf4")
    batch = {key: value for key, value in token_batches(1)[0].items() if key != "labels"}
    expected = packed(**batch).logits
    for teacher in (streamed, stored, loaded):
        assert torch.equal(teacher(**batch).logits, expected)
        assert not teacher.training
        assert not any(value.requires_grad for value in teacher.parameters())
    assert not torch.equal(load_teacher(str(folder / "model"), quantize="none")(**batch).logits, expected)


def test_the_packed_teacher_is_the_one_that_teaches(folder):
    module = RecoveryModule(source=str(folder / "model"), teacher=str(folder / "model"), teacher_quantize="nf4")
    module.configure_model()
    module.on_fit_start()
    assert isinstance(module._teacher, ModelTeacher)
    batch = token_batches(1)[0]
    student_BSV = module.language_model(input_ids=batch["input_ids"]).logits
    teacher_BSV = load_teacher(str(folder / "model"), quantize="nf4")(input_ids=batch["input_ids"]).logits
    expected = distillation_loss(student_BSV, teacher_BSV, batch["labels"])
    torch.testing.assert_close(module._teacher.loss(student_BSV, batch), expected)
    assert expected > 1e-4


def test_a_teacher_is_given_what_the_student_is_given(folder):
    module = RecoveryModule(source=str(folder / "model"), teacher=str(folder / "model"))
    module.configure_model()
    module.on_fit_start()
    batch = token_batches(1)[0]
    del batch["attention_mask"]
    batch["position_ids"] = torch.arange(100, 100 + batch["input_ids"].shape[1]).expand_as(batch["input_ids"])
    inputs = {name: value for name, value in batch.items() if name != "labels"}
    student_BSV = module.language_model.eval()(**inputs).logits
    assert module._teacher.loss(student_BSV, batch).item() == pytest.approx(0.0, abs=1e-6)


def test_no_teacher_in_checkpoints_or_among_the_parameters(folder, tmp_path):
    class Look(ModelCheckpoint):
        def on_train_batch_end(self, trainer, pl_module, *arguments):
            super().on_train_batch_end(trainer, pl_module, *arguments)
            teacher = {id(value) for value in pl_module._teacher.model.parameters()}
            assert not teacher & {id(value) for value in pl_module.parameters()}

    look = Look(dirpath=tmp_path, filename="last", every_n_train_steps=1)
    module, _ = fit(folder, callbacks=[look], teacher=str(folder / "model"), max_steps=1)
    checkpoint = torch.load(tmp_path / "last.ckpt", weights_only=True)
    assert set(trained(module)) <= set(checkpoint["state_dict"]) <= set(module.state_dict())


@pytest.mark.resume
def test_a_resumed_run_reads_the_targets_of_its_rows(folder, tmp_path):
    settings = {"teacher_logits": str(folder / "whole"), "distillation": 1.0, "max_steps": 3}
    keep = ModelCheckpoint(dirpath=tmp_path, filename="{step}", every_n_train_steps=1, save_top_k=-1)
    whole, metrics = fit(folder, callbacks=[keep], **settings)
    again = ModelCheckpoint(dirpath=tmp_path / "again", every_n_train_steps=1)
    resumed, metrics_resumed = fit(folder, callbacks=[again], resume=str(tmp_path / "step=2.ckpt"), **settings)
    assert metrics_resumed == metrics
    assert all(torch.equal(trained(resumed)[name], value) for name, value in trained(whole).items())


@pytest.mark.parametrize("rank", [0, 1])
def test_each_process_reads_its_rows_as_it_would_without_targets(folder, rank):
    batches = []
    for logits in (None, TeacherLogits(folder / "whole")):
        data = text_module(folder, batch_size=1)
        data.trainer = SimpleNamespace(global_rank=rank, world_size=2)
        data.attach_teacher(logits)
        batches.append(list(data.train_dataloader()))
    taught = TeacherLogits(folder / "whole").of_rows(data.rows("train")["a"], corpus="a")
    targets = {tuple(row["input_ids"].tolist()): row["teacher_logprobs"] for row in map(taught.__getitem__, range(6))}
    found = 0
    for plain, with_targets in zip(*batches, strict=True):
        assert all(torch.equal(with_targets[key], value) for key, value in plain.items())
        expected = targets.get(tuple(plain["input_ids"][0].tolist()))
        if expected is not None:
            assert torch.equal(with_targets["teacher_logprobs"][0], expected)
            found += 1
    assert found > 0


def test_every_loss_at_once_on_a_model_whose_layers_have_other_expert_counts(folder):
    module, metrics = fit(folder, teacher_logits=str(folder / "whole"), distillation=0.5, router_loss=0.01)
    assert {"train_loss", "distillation_loss", "router_loss"} <= set(metrics)
    widths = [layer.router.weight.shape[0] for layer in moe_layers(module.language_model)]
    assert widths == [6, 7]
    without, _ = fit(folder, teacher_logits=str(folder / "whole"), distillation=0.5)
    routers = [name for name in trained(module) if ".gate." in name]
    assert any(not torch.equal(trained(module)[name], trained(without)[name]) for name in routers)


def test_another_model_is_no_teacher(folder):
    with pytest.raises(ValueError, match=r"`teacher: asset:small_moe` is not the unpruned model .* 6 there and 2"):
        fit(folder, teacher="asset:small_moe")


def no_batch(module):
    def training_step(batch, batch_idx):
        raise AssertionError("a batch was trained on")

    module.training_step = training_step
    return module


def test_logits_that_do_not_fit_are_refused_before_the_first_batch(folder, tmp_path):
    module = no_batch(RecoveryModule(source=str(folder / "pruned"), teacher_logits=str(folder / "whole")))
    with pytest.raises(ValueError, match=r"of rows of 32 tokens, and `data.sequence_length` is 16"):
        quiet_trainer().fit(module, datamodule=text_module(folder, sequence_length=16, validation=None))
    with pytest.raises(ValueError, match=r"`teacher_logits` belong to the rows of a TextDataModule: train with one"):
        quiet_trainer().fit(module, train_dataloaders=loader_of(token_batches(1)))
    settings = {"teacher": "other", "quantize": "none", "vocab_size": 5000, "k": 1}
    rows = text_module(folder).rows("train")
    manifest = make_manifest(rows, **settings)
    prepare_folder(tmp_path, manifest=manifest)
    write_teacher_logits(
        load_model(str(folder / "model")), rows=rows, manifest=manifest, folder=tmp_path, batch_size=8, progress=False
    )
    recovery = Recovery(quantize="none", adapter=AdapterConfig(expert_rank=2, router_rank=2))
    module = no_batch(RecoveryModule(source=str(folder / "pruned"), teacher_logits=str(tmp_path)))
    with pytest.raises(ValueError, match="of a vocabulary of 5000 tokens, and the student has 4096"):
        quiet_trainer([recovery]).fit(module, datamodule=text_module(folder, validation=None))


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"distillation": 0}, r"`distillation` is the weight of the distillation loss, in \(0, 1\], got 0"),
        ({"distillation": 1.5}, r"in \(0, 1\], got 1.5"),
        ({"teacher_quantize": "int8"}, "`teacher_quantize` must be 'nf4' or 'none', got 'int8'"),
        ({"teacher_quantize": "nf4"}, r"`teacher_quantize: nf4` packs a model that teaches: name it in `teacher`"),
        ({"teacher": "a", "teacher_logits": "b"}, r"Give one teacher: `teacher: a` .* `teacher_logits: b` replaces it"),
    ],
)
def test_settings_are_checked_at_once(settings, message):
    with pytest.raises(ValueError, match=message):
        RecoveryModule(source="model", **settings)
