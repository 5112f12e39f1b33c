"""A pruned folder in 16 bit trains like any model: plain loops, transformers' Trainer, PEFT on its attention."""

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from pruned_models import loaded, logits, pruned_folder
from random_plans import random_plan
from tiny_models import FAMILY_NAMES, random_tokens, tiny_model
from transformers import PreTrainedModel, Trainer, TrainingArguments

from lightning_moe.export.huggingface import save_ragged
from lightning_moe.models.channel_experts import PROJECTIONS
from lightning_moe.models.discovery import moe_layers
from lightning_moe.records import PrunePlan
from lightning_moe.surgery.cut import apply_plan, to_channel_experts

IDS = random_tokens()
pytestmark = pytest.mark.filterwarnings("ignore:.*falling back.*")


def masked(name: str, plan: PrunePlan) -> PreTrainedModel:
    """The unpruned model with zeros in every row that the plan removes; they get no gradients, so they stay zero."""
    model = tiny_model(name)
    for layer, keep_C in zip(moe_layers(model), plan.keep, strict=True):
        keep_EI1 = keep_C.view(8, 32, 1)
        gate_up, down = (layer.experts.get_parameter(key).data for key in ("gate_up_proj", "down_proj"))
        gate_up.mul_(keep_EI1.repeat(1, 2, 1))
        down.mul_(keep_EI1.transpose(1, 2))
    return model


def values(model: PreTrainedModel, plan: PrunePlan, *, of_gradients: bool = False) -> dict[str, torch.Tensor]:
    """Every parameter or its gradient by name; expert rows kept by the plan, expert by expert, for both layouts."""

    def value(parameter: torch.nn.Parameter) -> torch.Tensor:
        found = parameter.grad if of_gradients else parameter.detach()
        return torch.zeros_like(parameter) if found is None else found

    found = {name: value(p) for name, p in model.named_parameters() if ".experts." not in name}
    for layer, keep_C in zip(moe_layers(model), plan.keep, strict=True):
        parameters = dict(layer.experts.named_parameters())
        if "gate_up_proj" in parameters:
            gate_EnH, up_EnH = value(parameters["gate_up_proj"]).chunk(2, dim=1)
            stacked = (gate_EnH, up_EnH, value(parameters["down_proj"]).transpose(1, 2))
            rows = [rows_EnH.reshape(-1, 64)[keep_C] for rows_EnH in stacked]
        else:
            order_C = to_channel_experts(layer.experts).storage_order()
            rows = [value(parameters[f"{name}.weight"])[order_C] for name in PROJECTIONS]
        found |= {f"{layer.name}.{name}": part for name, part in zip(PROJECTIONS, rows, strict=True)}
    return found


def step(model: PreTrainedModel, *, seed: int) -> float:
    ids_BS = random_tokens(seed=seed)
    loss = model(input_ids=ids_BS, labels=ids_BS, use_cache=False).loss
    loss.backward()
    return float(loss.detach())


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("name", FAMILY_NAMES)
def test_gradients_and_three_steps_equal_the_masked_model(name, checkpointing, tmp_path):
    dense = tiny_model(name)
    plan = random_plan(dense)
    apply_plan(dense, plan=plan)
    save_ragged(dense, tmp_path)
    ours, reference = loaded(str(tmp_path)).train(), masked(name, plan).train()
    if checkpointing:
        ours.gradient_checkpointing_enable()
    optimizers = [torch.optim.SGD(model.parameters(), lr=0.1) for model in (ours, reference)]
    for seed in range(3):
        losses = [step(model, seed=seed) for model in (ours, reference)]
        assert losses[0] == pytest.approx(losses[1], rel=1e-5)
        found, expected = (values(model, plan, of_gradients=True) for model in (ours, reference))
        assert found.keys() == expected.keys()
        for key, value in found.items():
            torch.testing.assert_close(
                value, expected[key], rtol=1e-3, atol=1e-5, msg=lambda text, k=key: f"{k}: {text}"
            )
        for optimizer in optimizers:
            optimizer.step()
            optimizer.zero_grad()
    found, expected = (values(model, plan) for model in (ours, reference))
    for key, value in found.items():
        torch.testing.assert_close(value, expected[key], rtol=1e-4, atol=1e-5)
    ours.eval().save_pretrained(tmp_path / "trained")
    assert torch.equal(logits(loaded(str(tmp_path / "trained")), IDS), logits(ours, IDS))


def test_only_routers(tmp_path):
    model = loaded(pruned_folder(tmp_path / "model", "qwen3_moe")).train().requires_grad_(False)
    routers = [layer.router.requires_grad_(True) for layer in moe_layers(model)]
    before = {name: value.clone() for name, value in model.state_dict().items()}
    step(model, seed=0)
    torch.optim.AdamW([p for router in routers for p in router.parameters()], lr=1e-2).step()
    changed = {name for name, value in model.state_dict().items() if not torch.equal(value, before[name])}
    assert changed == {f"{layer.router_name}.weight" for layer in moe_layers(model)}


def trainer_of(model, folder, **settings):
    rows = [{"input_ids": row, "labels": row} for row in random_tokens(batch=16, length=16)]
    fixed = {
        "report_to": "none",
        "disable_tqdm": True,
        "use_cpu": True,
        "per_device_train_batch_size": 2,
        "max_steps": 4,
    }
    arguments = TrainingArguments(output_dir=str(folder), **(fixed | {"save_strategy": "no"} | settings))
    return Trainer(model=model, args=arguments, train_dataset=rows)


@pytest.mark.parametrize("settings", [{}, {"gradient_checkpointing": True}, {"bf16": True}], ids=str)
def test_a_trainer_trains_all_parameters_and_its_folder_loads(settings, tmp_path):
    model = loaded(pruned_folder(tmp_path / "model", "qwen3_moe"))
    before = {name: value.clone() for name, value in model.named_parameters()}
    trainer = trainer_of(model, tmp_path / "run", learning_rate=1e-2, **settings)
    trainer.train()
    same = [name for name, value in model.named_parameters() if torch.equal(value, before[name])]
    assert same == []
    trainer.save_model(str(tmp_path / "trained"))
    trained = dict(model.named_parameters())
    for name, value in loaded(str(tmp_path / "trained")).named_parameters():
        assert torch.equal(value, trained[name])


def test_a_trainer_goes_on_from_its_checkpoint(tmp_path):
    folder, finals = pruned_folder(tmp_path / "model", "qwen3_moe"), []
    for checkpoint in (None, str(tmp_path / "run" / "checkpoint-2")):
        model = loaded(folder)
        trainer = trainer_of(model, tmp_path / "run", save_strategy="steps", save_steps=2, lr_scheduler_type="constant")
        trainer.train(resume_from_checkpoint=checkpoint)
        finals.append(logits(model.eval(), IDS))
    torch.testing.assert_close(finals[1], finals[0], rtol=1e-5, atol=1e-6)


def test_training_packed_weights_is_refused_by_the_trainer(tmp_path):
    model = loaded(pruned_folder(tmp_path / "model", "qwen3_moe", packed=True))
    with pytest.raises(ValueError, match="cannot perform fine-tuning on purely quantized models"):
        trainer_of(model, tmp_path / "run")


@pytest.mark.parametrize("packed", [False, True])
@pytest.mark.parametrize("name", ["qwen3_moe", "mixtral", "deepseek_v3"])
def test_stock_lora_on_attention(name, packed, tmp_path):
    folder = pruned_folder(tmp_path / "model", name, packed=packed)
    model = loaded(folder)
    plain = logits(model, IDS)
    peft_model = get_peft_model(model, LoraConfig(r=4, target_modules=r".*self_attn\.(q_proj|o_proj)"))
    trainable = [name for name, p in peft_model.named_parameters() if p.requires_grad]
    assert trainable
    assert all("lora_" in name for name in trainable)
    step(peft_model.train(), seed=0)
    torch.optim.AdamW([p for p in peft_model.parameters() if p.requires_grad], lr=1e-2).step()
    adapted = logits(peft_model.eval(), IDS)
    assert not torch.allclose(adapted, plain, atol=1e-4)
    peft_model.save_pretrained(tmp_path / "adapter")
    again = PeftModel.from_pretrained(loaded(folder), tmp_path / "adapter")
    assert torch.equal(logits(again, IDS), adapted)
    if not packed:
        merged = peft_model.merge_and_unload()
        merged.save_pretrained(tmp_path / "merged")
        torch.testing.assert_close(logits(loaded(str(tmp_path / "merged")), IDS), adapted, rtol=1e-3, atol=1e-4)
