"""Routing by hand, and RouterMonitor in runs: tables before and after, scalars in training, nothing left behind."""

import csv
import json
import math

import pytest
import torch
from lightning.pytorch.callbacks import ModelCheckpoint
from lightning.pytorch.loggers import CSVLogger
from random_plans import random_plan
from tiny_models import MODEL_NAMES, random_tokens, tiny_model
from tiny_runs import ForeignModule, loader_of, quiet_trainer, save_model, save_text, text_module, token_batches

from callbacks import ChannelPruning, ExpertCalibration, Recovery, RouterMonitor
from lightning_moe.evaluation.routing import (
    LayerRouting,
    RoutingMeter,
    RoutingTable,
    layer_routing,
    measure_routing,
    routing_scalars,
    routing_sums,
)
from lightning_moe.models.discovery import moe_layers
from lightning_moe.models.router_logits import RouterLogits, RouterOutput
from lightning_moe.reporting.figures import entropy_depth, png_bytes
from lightning_moe.surgery.cut import apply_plan
from lightning_moe.training.module import LanguageModelModule, RecoveryModule


class Validated(ForeignModule):
    """Somebody's module with validation, too."""

    def validation_step(self, batch, batch_idx, dataloader_idx=0):
        self.log("val_loss", self.lm(**batch).loss)


def hooks_in(module):
    return sum(len(part._forward_hooks) + len(part._forward_pre_hooks) for part in module.modules())


def output_of(probability_TE, index_TK, *, masked_E=None):
    return RouterOutput(
        index=0,
        logits_TE=torch.tensor(probability_TE).log(),
        index_TK=torch.tensor(index_TK),
        score="softmax",
        with_gradients=False,
        masked_E=masked_E,
    )


def test_sums_by_hand():
    # Entropies over log 4: uniform 1, half and half 1/2, padding not counted. Pairs: expert 0 twice, 1 and 2 once.
    output = output_of([[0.25, 0.25, 0.25, 0.25], [0.5, 0.5, 0.0, 0.0], [1.0, 0.0, 0.0, 0.0]], [[0, 2], [0, 1], [3, 3]])
    routing = layer_routing(routing_sums(output, counted_T=torch.tensor([True, True, False])))
    assert routing.load == (0.5, 0.25, 0.25, 0.0)
    assert routing.entropy == pytest.approx((1 + 0.5) / 2)
    assert (routing.dead_experts, routing.num_experts, routing.num_tokens) == (1, 4, 2)
    assert routing.max_load == 2.0


def test_evicted_experts_are_not_dead():
    # Two experts are left, alike: entropy log 2 / log 2 = 1. The mean load is 1/2.
    output = output_of([[0.3, 0.3, 0.4]], [[0, 1]], masked_E=torch.tensor([False, False, True]))
    routing = layer_routing(routing_sums(output))
    assert routing.entropy == pytest.approx(1)
    assert (routing.dead_experts, routing.num_experts, routing.evicted, routing.max_load) == (0, 2, (2,), 1.0)


def test_one_expert_left_has_no_entropy():
    routing = layer_routing(routing_sums(output_of([[1.0], [1.0]], [[0], [0]])))
    assert (routing.entropy, routing.load, routing.max_load) == (0.0, (1.0,), 1.0)


def test_nothing_routed():
    meter = RoutingMeter(tiny_model())
    assert [(layer.entropy, layer.num_tokens, layer.dead_experts) for layer in meter.compute()] == [(0.0, 0, 8)] * 2


@pytest.mark.parametrize("name", MODEL_NAMES)
def test_a_meter_counts_what_the_routers_chose(name):
    model, tokens_BS = tiny_model(name), random_tokens()
    mask_BS = torch.ones_like(tokens_BS)
    mask_BS[1, :6] = 0
    meter = RoutingMeter(model)
    before = hooks_in(model)
    with meter.watch(model):
        model(input_ids=tokens_BS, attention_mask=mask_BS)
    assert hooks_in(model) == before
    with RouterLogits(model) as routers:
        model(input_ids=tokens_BS, attention_mask=mask_BS)
    counted_T = mask_BS.reshape(-1).bool()
    for layer, output in zip(meter.compute(), routers.outputs, strict=True):
        count_E = torch.bincount(output.index_TK[counted_T].reshape(-1), minlength=8)
        assert layer.load == pytest.approx((count_E / count_E.sum()).tolist())
        assert layer.num_tokens == 26
        # log-sum-exp form of the entropy; sigmoid scores as they are normalised.
        score_TE = output.logits_TE.sigmoid() if output.score == "sigmoid" else output.logits_TE.exp()
        entropy_T = score_TE.sum(-1).log() - (score_TE * score_TE.log()).sum(-1) / score_TE.sum(-1)
        assert layer.entropy == pytest.approx(entropy_T[counted_T].mean().item() / math.log(8), abs=1e-5)


def test_two_batches_and_two_ranks_add_up():
    model, halves = tiny_model(), [random_tokens(seed=1), random_tokens(seed=2)]
    whole, parts = RoutingMeter(model), [RoutingMeter(model), RoutingMeter(model)]
    for meter, tokens in [(whole, torch.cat(halves)), *zip(parts, halves, strict=True)]:
        with meter.watch(model):
            model(input_ids=tokens)
    flat = []
    parts[1].compute(reduce=lambda value: flat.append(value) or value)
    summed = parts[0].compute(reduce=lambda value: value + flat[0])
    for layer, expected in zip(summed, whole.compute(), strict=True):
        assert layer.load == pytest.approx(expected.load)
        assert layer.entropy == pytest.approx(expected.entropy)
        assert (layer.num_tokens, layer.dead_experts) == (expected.num_tokens, expected.dead_experts)


def test_grouped_routers_after_a_cut():
    model = tiny_model("deepseek_v2_grouped", n_group=2, topk_group=1, num_experts_per_tok=2)
    apply_plan(model, plan=random_plan(model, evicted=[[0, 3], [5]]))
    meter = RoutingMeter(model)
    with meter.watch(model):
        model(input_ids=random_tokens())
    assert [layer.evicted for layer in meter.compute()] == [(0, 3), (5,)]
    assert all(layer.load[expert] == 0 for layer in meter.compute() for expert in layer.evicted)


def test_a_table_survives_json():
    layer = LayerRouting(entropy=0.5, load=(0.5, 0.5, 0.0), evicted=(2,), num_tokens=7)
    table = RoutingTable(step=3, corpora={"a": (layer, layer)})
    assert RoutingTable.from_dict(json.loads(json.dumps(table.to_dict()))) == table
    assert table.to_dict()["corpora"]["a"][0]["max_load"] == 1.0


def test_scalars():
    first = LayerRouting(entropy=0.5, load=(0.75, 0.25), evicted=(), num_tokens=2)
    second = LayerRouting(entropy=0.7, load=(1.0, 0.0), evicted=(), num_tokens=2)
    scalars = routing_scalars([first, second], per_layer=False)
    assert scalars == pytest.approx({"router/entropy": 0.6, "router/dead_experts": 1.0, "router/max_load": 2.0})
    everything = routing_scalars([first, second], per_layer=True)
    assert len(everything) == 9
    assert everything["router/max_load/0"] == 1.5


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """Our recovery of a pruned model, with a validation before (whole) and after."""
    folder = save_text(tmp_path_factory.mktemp("monitor"))
    module = RecoveryModule(source=save_model(folder / "model"), router_learning_rate=0.05, expert_learning_rate=0.05)
    callbacks = [ExpertCalibration(), ChannelPruning(prune_ratio=0.25, method="reap", repair=False), Recovery()]
    monitor = RouterMonitor(folder=str(folder / "out"), every_n_steps=2, num_batches=3, per_layer=True)
    trainer = quiet_trainer(
        [*callbacks, monitor],
        max_steps=5,
        accumulate_grad_batches=2,
        logger=CSVLogger(folder / "logs", version=0),
    )
    trainer.fit(module, datamodule=text_module(folder))
    return folder, module, monitor


def test_the_file_has_both_tables_of_the_same_text(run):
    folder, module, monitor = run
    content = json.loads((folder / "out" / "router.json").read_text(encoding="utf-8"))
    assert RoutingTable.from_dict(content["before"]) == monitor.before
    assert RoutingTable.from_dict(content["after"]) == monitor.after
    assert (monitor.before.step, monitor.after.step) == (0, 5)
    assert set(monitor.before.corpora) == {"a", "b"}
    left = [layer.base_experts.num_experts for layer in moe_layers(module.model)]
    assert left == [6, 6]
    for name, before in monitor.before.corpora.items():
        after = monitor.after.corpora[name]
        assert [layer.num_tokens for layer in before] == [layer.num_tokens for layer in after] == [3 * 4 * 32] * 2
        assert [layer.num_experts for layer in before] == left
        assert all(sum(layer.load) == pytest.approx(1) for layer in before)
        assert [layer.entropy for layer in before] != [layer.entropy for layer in after]


def test_the_table_after_is_that_of_the_model_after(run):
    folder, module, monitor = run
    data = text_module(folder)
    data.setup("validate")
    module.eval()
    meter = RoutingMeter(module.model)
    with meter.watch(module.model), torch.no_grad():
        for batch in list(data.val_dataloader()[1])[:3]:
            module.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
    for layer, expected in zip(monitor.after.corpora["b"], meter.compute(), strict=True):
        assert layer.load == pytest.approx(expected.load)
        assert layer.entropy == pytest.approx(expected.entropy)


def test_scalars_of_every_second_step_reach_the_logger(run):
    folder, *_ = run
    with (folder / "logs" / "lightning_logs" / "version_0" / "metrics.csv").open(encoding="utf-8") as file:
        rows = [row for row in csv.DictReader(file) if row.get("router/entropy")]
    assert [row["step"] for row in rows] == ["1", "3", "5"]
    assert all(0 < float(row["router/entropy"]) < 1 for row in rows)
    mean = [(float(row["router/entropy/0"]) + float(row["router/entropy/1"])) / 2 for row in rows]
    assert mean == pytest.approx([float(row["router/entropy"]) for row in rows])


def test_the_figure_is_a_picture_and_no_hook_stays(run):
    folder, module, monitor = run
    assert (folder / "out" / "router.png").read_bytes()[:4] == b"\x89PNG"
    assert not any(layer.router._forward_hooks for layer in moe_layers(module.model))
    assert not module.model.base_model._forward_pre_hooks
    assert monitor._step_meter is None


def test_lines_of_the_figure():
    figure = entropy_depth({"a": [0.2, 0.4], "b": [0.3, 0.5]}, after={"a": [0.1, 0.2]}, labels=("then", "now"))
    lines = [list(line.get_ydata()) for line in figure.axes[0].lines if len(line.get_ydata())]
    assert lines == [[0.2, 0.4], [0.1, 0.2], [0.3, 0.5]]
    assert [text.get_text() for text in figure.legends[0].get_texts()] == ["then", "now", "a", "b"]
    only = entropy_depth({"a": [0.2, 0.4]}, after={}, labels=("then", "now"))
    assert [text.get_text() for text in only.legends[0].get_texts()] == ["then", "a"]
    assert png_bytes(figure)[:4] == b"\x89PNG"


def test_any_module_and_a_cut_during_training(tmp_path):
    """Expert counts change between the tables; two loaders are numbered."""
    module, monitor = Validated(), RouterMonitor(folder=str(tmp_path), every_n_steps=1)
    pruning = ChannelPruning(schedule=[(2, 0.25)], method="reap")
    trainer = quiet_trainer([ExpertCalibration(num_batches=1), pruning, monitor], max_steps=4, limit_val_batches=2)
    loaders = [loader_of(token_batches(3, seed=1)), loader_of(token_batches(3, seed=2))]
    trainer.fit(module, train_dataloaders=loader_of(token_batches(4)), val_dataloaders=loaders)
    assert {name: layers[0].num_experts for name, layers in monitor.before.corpora.items()} == {"0": 8, "1": 8}
    assert {name: layers[0].num_experts for name, layers in monitor.after.corpora.items()} == {"0": 6, "1": 6}
    assert [layer.num_tokens for layer in monitor.after.corpora["0"]] == [3 * 2 * 16] * 2
    assert hooks_in(module) == 0


def test_checkpointed_layers_are_counted_once():
    seen = []

    class Spying(RouterMonitor):
        def _log(self, scalars, *, trainer):
            seen.append(scalars)

        def _compute(self, meter, *, trainer):
            layers = super()._compute(meter, trainer=trainer)
            seen.append([layer.num_tokens for layer in layers])
            return layers

    module = ForeignModule()
    module.lm.gradient_checkpointing_enable({"use_reentrant": False})
    quiet_trainer([Spying(every_n_steps=1)], max_steps=1).fit(module, loader_of(token_batches(1)))
    assert seen[0] == [32, 32]
    assert set(seen[1]) == {"router/entropy", "router/dead_experts", "router/max_load"}


@pytest.mark.filterwarnings("ignore:The dirpath has changed")
def test_the_table_before_survives_a_checkpoint(tmp_path):
    def fit(max_steps, *, ckpt_path=None):
        module, monitor = Validated(), RouterMonitor(folder=str(tmp_path / "out"), every_n_steps=3)
        checkpoint = ModelCheckpoint(dirpath=tmp_path / str(max_steps), save_last=True)
        trainer = quiet_trainer(
            [monitor, checkpoint], max_steps=max_steps, limit_val_batches=2, enable_checkpointing=True, max_epochs=-1
        )
        batches = loader_of(token_batches(2))
        trainer.fit(module, train_dataloaders=batches, val_dataloaders=batches, ckpt_path=ckpt_path)
        return monitor

    first = fit(2)
    resumed = fit(4, ckpt_path=tmp_path / "2" / "last.ckpt")
    assert resumed.before == first.before
    assert resumed.before.step == 0
    assert resumed.after.step == 4
    assert torch.load(tmp_path / "4" / "last.ckpt", weights_only=True)["callbacks"][resumed.state_key]["next_step"] == 6


def test_validation_alone_measures_nothing(tmp_path):
    module, monitor = Validated(), RouterMonitor(folder=str(tmp_path))
    trainer = quiet_trainer([monitor], limit_val_batches=2)
    trainer.validate(module, dataloaders=loader_of(token_batches(2)), verbose=False)
    assert monitor.before is None
    assert not list(tmp_path.iterdir())


def test_measuring_moves_no_random_number(tmp_path):
    def fit(**settings):
        torch.manual_seed(0)
        module = Validated()
        trainer = quiet_trainer([RouterMonitor(**settings)], limit_val_batches=1, max_steps=3)
        batches = loader_of(token_batches(4), shuffle=True)
        trainer.fit(module, train_dataloaders=batches, val_dataloaders=loader_of(token_batches(2)))
        return module.losses

    assert fit(folder=str(tmp_path)) == fit()


def test_two_monitors_keep_their_states_apart():
    assert RouterMonitor(folder="a").state_key != RouterMonitor(folder="b").state_key
    assert RouterMonitor(every_n_steps=2).state_key != RouterMonitor().state_key


class Failing(Validated):
    def training_step(self, batch, batch_idx):
        super().training_step(batch, batch_idx)
        raise RuntimeError("in the middle")


def test_hooks_are_gone_after_an_exception():
    module, batches = Failing(), loader_of(token_batches(2))
    trainer = quiet_trainer([RouterMonitor(every_n_steps=1)])
    with pytest.raises(RuntimeError, match="in the middle"):
        trainer.fit(module, train_dataloaders=batches)
    assert hooks_in(module) == 0


def test_no_logger_and_no_validation():
    monitor = RouterMonitor(every_n_steps=1)
    quiet_trainer([monitor]).fit(ForeignModule(), loader_of(token_batches(2)))
    assert monitor.before is None


def test_our_own_module_trained_whole(tmp_path):
    folder = save_text(tmp_path)
    monitor = RouterMonitor(folder=str(tmp_path / "out"), every_n_steps=1)
    trainer = quiet_trainer([monitor])
    trainer.fit(LanguageModelModule(source=save_model(folder / "model")), datamodule=text_module(folder))
    assert set(monitor.before.corpora) == {"a", "b"}


def test_what_is_refused():
    with pytest.raises(ValueError, match=r"`every_n_steps` must be at least 1, got 0\."):
        RouterMonitor(every_n_steps=0)
    with pytest.raises(ValueError, match=r"`num_batches` must be at least 1, got 0\."):
        RouterMonitor(num_batches=0)
    with pytest.raises(ValueError, match=r"RouterMonitor measures held-out text .* give validation corpora or loaders"):
        quiet_trainer([RouterMonitor(folder="unused")]).fit(ForeignModule(), loader_of(token_batches(2)))
    pairs = torch.utils.data.DataLoader([torch.zeros(2)], batch_size=None)
    with pytest.raises(ValueError, match=r"measured on batches that are dicts with `input_ids`, got Tensor\."):
        measure_routing(tiny_model(), loaders={"a": pairs})
    late = [ExpertCalibration(num_batches=1), RouterMonitor(), ChannelPruning(schedule=[(1, 0.25)])]
    with pytest.raises(ValueError, match=r"ChannelPruning must stand before RouterMonitor in `trainer\.callbacks`\."):
        quiet_trainer(late).fit(ForeignModule(), loader_of(token_batches(2)))
