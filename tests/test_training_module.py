"""The two LightningModules, their optimizers and schedules."""

import math
from dataclasses import asdict

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from tiny_runs import loader_of, quiet_trainer, save_model, save_text, text_module, token_batches

from callbacks import Recovery
from lightning_moe.adapters.inject import AdapterConfig, inject_adapters
from lightning_moe.models.discovery import moe_layers
from lightning_moe.quantization.linears import quantize_model
from lightning_moe.surgery.cut import convert_experts
from lightning_moe.training.module import LanguageModelModule, RecoveryModule
from lightning_moe.training.optim import build_optimizer, build_schedule
from lightning_moe.training.router_loss import RouterLogits, load_balancing_loss

WITHOUT_VALIDATION = pytest.mark.filterwarnings("ignore:Total length of `list` across ranks is zero")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = save_text(tmp_path_factory.mktemp("module"))
    save_model(folder / "model")
    save_model(folder / "shared", "qwen2_moe")
    return folder


def recovery_module(folder, *, name="shared", **settings):
    return RecoveryModule(source=str(folder / name), **({"gradient_checkpointing": False} | settings))


def adapted(module, **ranks):
    module.configure_model()
    convert_experts(module.language_model)
    inject_adapters(module.language_model, config=AdapterConfig(**ranks))
    return module


def test_every_part_is_a_group_with_its_own_rate(folder):
    module = recovery_module(folder, expert_learning_rate=1e-3, router_learning_rate=1e-5, attention_learning_rate=1e-4)
    adapted(module, expert_rank=2, router_rank=2, attention_rank=1, train_norms=True)
    groups = module.parameter_groups()
    rates = {group["name"]: group["lr"] for group in groups}
    assert rates == {"experts": 1e-3, "shared_experts": 1e-3, "router": 1e-5, "attention": 1e-4, "norms": 1e-4}
    in_groups = [id(parameter) for group in groups for parameter in group["params"]]
    trainable = [id(parameter) for parameter in module.parameters() if parameter.requires_grad]
    assert sorted(in_groups) == sorted(trainable)


@WITHOUT_VALIDATION
def test_the_rates_really_differ(folder):
    # Adam's first step moves every number with a gradient by the rate, whatever the gradient's size.
    module = recovery_module(
        folder, expert_learning_rate=1e-3, router_learning_rate=1e-5, schedule="constant_with_warmup", warmup_ratio=0.0
    )
    before = {}

    class Start(Recovery):
        def on_train_start(self, trainer, pl_module):
            before.update({name: p.detach().clone() for name, p in pl_module.named_parameters() if p.requires_grad})

    recovery = Start(adapter=AdapterConfig(expert_rank=2, router_rank=2))
    trainer = quiet_trainer([recovery], max_steps=1)
    trainer.fit(module, datamodule=text_module(folder, validation=None))
    moved = {
        name: (p.detach() - before[name]).abs().max().item() for name, p in module.named_parameters() if name in before
    }
    experts = [step for name, step in moved.items() if ".experts.lora_B" in name]
    routers = [step for name, step in moved.items() if ".gate.lora_B" in name]
    assert experts == pytest.approx([1e-3] * len(experts), rel=1e-2)
    assert routers == pytest.approx([1e-5] * len(routers), rel=1e-2)
    assert len(experts) == 2 * 3
    assert len(routers) == 2


def naive_nll(model, loader):
    """Token by token."""
    losses = []
    for batch in loader:
        with torch.no_grad():
            log_probs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"]).logits.log_softmax(
                -1
            )
        for row in range(len(batch["labels"])):
            for position in range(batch["labels"].shape[1] - 1):
                label = batch["labels"][row, position + 1].item()
                if label != -100:
                    losses.append(-log_probs[row, position, label].item())
    return sum(losses) / len(losses)


def test_perplexity_per_corpus_is_that_of_a_loop_over_tokens(folder):
    module = LanguageModelModule(source=str(folder / "model"))
    data = text_module(folder)
    trainer = quiet_trainer(limit_val_batches=1.0)
    trainer.validate(module, datamodule=data, verbose=False)
    metrics = {name: value.item() for name, value in trainer.callback_metrics.items()}
    naive = dict(zip("ab", [naive_nll(module.model.eval(), loader) for loader in data.val_dataloader()], strict=True))
    for name, nll in naive.items():
        assert metrics[f"nll/{name}"] == pytest.approx(nll, rel=1e-5)
        assert metrics[f"perplexity/{name}"] == pytest.approx(math.exp(nll), rel=1e-4)
    assert metrics["nll"] == pytest.approx(sum(naive.values()) / 2, rel=1e-5)


def test_validation_twice_gives_the_same_and_does_not_add_up(folder):
    module, data = LanguageModelModule(source=str(folder / "model")), text_module(folder)
    trainer = quiet_trainer(limit_val_batches=1.0)
    first, second = ({}, {})
    for seen in (first, second):
        trainer.validate(module, datamodule=data, verbose=False)
        seen.update(trainer.callback_metrics)
    assert first == second


def test_loaders_without_our_data_module_are_numbered(folder):
    module = LanguageModelModule(source=str(folder / "model"))
    trainer = quiet_trainer(limit_val_batches=1.0)
    trainer.validate(module, dataloaders=[loader_of(token_batches(2)), loader_of(token_batches(1))], verbose=False)
    assert set(trainer.callback_metrics) == {"perplexity/0", "nll/0", "perplexity/1", "nll/1", "nll"}
    trainer.validate(module, dataloaders=loader_of(token_batches(2)), verbose=False)
    assert set(trainer.callback_metrics) == {"perplexity/0", "nll/0", "nll"}


def test_corpus_names_may_be_anything(folder):
    data = text_module(folder)
    data.corpora["validation"] = {"keys": data.corpora["validation"]["a"], "v1.5": data.corpora["validation"]["b"]}
    trainer = quiet_trainer(limit_val_batches=1)
    trainer.validate(LanguageModelModule(source=str(folder / "model")), datamodule=data, verbose=False)
    assert {"nll/keys", "nll/v1.5"} <= set(trainer.callback_metrics)


def factors(name, *, warmup_ratio, num_steps):
    optimizer = torch.optim.AdamW([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
    schedule = build_schedule(optimizer, name=name, warmup_ratio=warmup_ratio, num_steps=num_steps)
    values = []
    for _ in range(num_steps + 1):
        values.append(optimizer.param_groups[0]["lr"])
        optimizer.step()
        schedule.step()
    return values


def test_schedules_by_hand():
    # 10 steps, 2 of warmup: 0, 1/2, then from 1 down to 0 over the 8 that are left.
    down = [1 - step / 8 for step in range(9)]
    assert factors("linear", warmup_ratio=0.2, num_steps=10) == pytest.approx([0, 0.5, *down])
    half_cosine = [(1 + math.cos(math.pi * step / 8)) / 2 for step in range(9)]
    assert factors("cosine", warmup_ratio=0.2, num_steps=10) == pytest.approx([0, 0.5, *half_cosine], abs=1e-9)
    assert factors("constant_with_warmup", warmup_ratio=0.2, num_steps=10) == pytest.approx([0, 0.5, *[1] * 9])
    assert factors("linear", warmup_ratio=0.0, num_steps=4) == pytest.approx([1, 0.75, 0.5, 0.25, 0])


@pytest.mark.parametrize("ratio", [-0.1, 1.1])
def test_warmup_is_a_share(ratio, folder):
    with pytest.raises(ValueError, match=f"`warmup_ratio` is a share of the steps, between 0 and 1, got {ratio}"):
        factors("linear", warmup_ratio=ratio, num_steps=4)
    with pytest.raises(ValueError, match=f"between 0 and 1, got {ratio}"):
        recovery_module(folder, warmup_ratio=ratio)


def test_names_of_schedules_and_optimizers_are_checked_at_once(folder):
    with pytest.raises(ValueError, match=r"`schedule` must be one of \('linear', .*got 'step'"):
        recovery_module(folder, schedule="step")
    with pytest.raises(ValueError, match=r"`optimizer` must be one of \('adamw', .*got 'sgd'"):
        recovery_module(folder, optimizer="sgd")
    with pytest.raises(ValueError, match="got 'sgd'"):
        build_optimizer([group()], name="sgd", weight_decay=0.0, betas=(0.9, 0.999))


def test_a_run_without_an_end_has_no_schedule(folder):
    module = LanguageModelModule(source=str(folder / "model"))
    with pytest.raises(ValueError, match="The schedule needs the number of training steps: set `max_steps`"):
        quiet_trainer(max_steps=-1, max_epochs=-1).fit(module, train_dataloaders=loader_of(token_batches(1)))


def group(**overrides):
    return {"name": "experts", "params": [torch.nn.Parameter(torch.ones(64, 64))], "lr": 0.1} | overrides


@pytest.mark.parametrize("name", ["adamw", "adamw8bit"])
def test_optimizers_by_name(name):
    first = group()
    parameter = first["params"][0]
    optimizer = build_optimizer([first], name=name, weight_decay=0.5, betas=(0.8, 0.9))
    assert type(optimizer).__name__ == {"adamw": "AdamW", "adamw8bit": "AdamW8bit"}[name]
    assert optimizer.param_groups[0]["betas"] == (0.8, 0.9)
    parameter.grad = torch.ones_like(parameter)
    optimizer.step()
    # Decoupled decay first, 1 - 0.1 * 0.5, then a step of the rate.
    assert parameter.detach().flatten()[:3].tolist() == pytest.approx([0.85] * 3, abs=1e-3)


@pytest.mark.skipif(torch.cuda.is_available(), reason="a GPU is there")
def test_the_paged_optimizer_needs_a_gpu():
    with pytest.raises(ValueError, match="`optimizer: paged_adamw8bit` needs a GPU and none is visible"):
        build_optimizer([group()], name="paged_adamw8bit", weight_decay=0.0, betas=(0.9, 0.999))


def test_an_empty_group_is_refused():
    with pytest.raises(ValueError, match="Parameter group 'router' is empty"):
        build_optimizer([group(name="router", params=[])], name="adamw", weight_decay=0.0, betas=(0.9, 0.999))


def gradients(folder, *, gradient_checkpointing):
    torch.manual_seed(0)
    module = recovery_module(folder, name="model", gradient_checkpointing=gradient_checkpointing)
    module.configure_model()
    convert_experts(module.language_model)
    quantize_model(module.language_model)
    inject_adapters(module.language_model, config=AdapterConfig(expert_rank=2, router_rank=2))
    module.on_fit_start()
    assert module.language_model.training
    module.log = lambda *_, **__: None
    calls = []
    moe_layers(module.language_model)[0].experts.register_forward_pre_hook(lambda *_: calls.append(1))
    module.training_step(token_batches(1)[0], 0).backward()
    return {name: p.grad for name, p in module.named_parameters() if p.requires_grad}, len(calls)


def test_gradient_checkpointing_runs_a_layer_twice_and_gives_the_same_gradients(folder):
    plain, num_calls = gradients(folder, gradient_checkpointing=False)
    checkpointed, num_checkpointed_calls = gradients(folder, gradient_checkpointing=True)
    assert (num_calls, num_checkpointed_calls) == (1, 2)
    assert plain.keys() == checkpointed.keys()
    for name, value in plain.items():
        torch.testing.assert_close(checkpointed[name], value, rtol=1e-4, atol=1e-6)
    assert any(value.abs().max() > 0 for value in plain.values())


@WITHOUT_VALIDATION
def test_settings_survive_a_checkpoint(folder, tmp_path):
    module = LanguageModelModule(
        source=str(folder / "model"), learning_rate=3e-3, schedule="cosine", betas=(0.9, 0.95), weight_decay=0.01
    )
    checkpoint = ModelCheckpoint(dirpath=tmp_path, save_last=True)
    quiet_trainer([checkpoint], max_steps=1, enable_checkpointing=True).fit(
        module, datamodule=text_module(folder, validation=None)
    )
    loaded = LanguageModelModule.load_from_checkpoint(tmp_path / "last.ckpt")
    assert asdict(loaded.settings) == asdict(module.settings)
    assert loaded.learning_rate == 3e-3
    assert dict(loaded.hparams) == dict(module.hparams)
    expected = module.state_dict()
    assert all(torch.equal(value, expected[name]) for name, value in loaded.state_dict().items())


def test_recovery_settings_are_hyper_parameters(folder):
    module = recovery_module(folder, expert_learning_rate=5e-4, teacher="asset:small_moe", distillation=0.25)
    assert module.hparams["expert_learning_rate"] == 5e-4
    assert module.hparams["distillation"] == 0.25
    arguments = {name: module.hparams[name] for name in ("source", "schedule", "optimizer", "router_learning_rate")}
    assert arguments == {
        "source": str(folder / "shared"),
        "schedule": "linear",
        "optimizer": "adamw",
        "router_learning_rate": 1e-6,
    }


def test_the_model_is_asked_for_before_it_is_there(folder):
    with pytest.raises(ValueError, match=r"The model is not loaded yet: call `configure_model\(\)` first"):
        LanguageModelModule(source=str(folder / "model")).language_model  # noqa: B018


def test_configure_model_loads_once(folder):
    module = LanguageModelModule(source=str(folder / "model"))
    module.configure_model()
    model = module.model
    module.configure_model()
    assert module.model is model


@pytest.mark.parametrize("kind", [LanguageModelModule, RecoveryModule])
def test_the_load_balancing_loss_is_added_and_logged(folder, kind):
    batch, losses, logged = token_batches(1)[0], {}, {}
    for coefficient in (0.0, 0.5):
        module = kind(source=str(folder / "model"), router_loss=coefficient, gradient_checkpointing=False)
        module.configure_model()
        module.log = lambda name, value, **_: logged.update({name: value.item()})
        losses[coefficient] = module.training_step(batch, 0).item()
    with RouterLogits(module.language_model) as routers:
        stock = module.language_model(**batch).loss.item()
    balance = load_balancing_loss(routers.outputs).item()
    assert losses[0.0] == pytest.approx(stock, rel=1e-5)
    assert losses[0.5] == pytest.approx(stock + 0.5 * balance, rel=1e-5)
    assert logged == pytest.approx({"train_loss": stock, "router_loss": balance}, rel=1e-5)


def test_the_coefficient_of_the_load_balancing_loss_is_checked(folder):
    with pytest.raises(ValueError, match=r"`router_loss` must be a finite number, 0 or more, got -0.1"):
        LanguageModelModule(source=str(folder / "model"), router_loss=-0.1)
