"""Train the small mixture-of-experts decoder that edgeflex ships, on the standard library's own prose.

python benchmarks/tiny_decoder_train.py --steps 1200 --out edgeflex/models/data
python benchmarks/tiny_decoder_train.py --steps 70 --out /tmp/on-the-spot      # what 20 s on one core would give

Prints one table: held-out loss of a unigram model and of the trained one, before and after packing, and a sample.
"""

from __future__ import annotations

import argparse
import math
import time
from collections import Counter
from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import OlmoeConfig, OlmoeForCausalLM

from edgeflex.models.tiny_decoder import END_OF_TEXT, library_text, pack_weights, tiny_config, unpack_weights

_WINDOW = 192
_BALANCE = 0.02
_ROUTER_RATE = 0.2  # at the full rate a few experts win in the first steps and keep winning
_PROMPTS = ("Return the number of", "This module provides", "The file is")


def byte_pairs(texts: tuple[str, ...], vocabulary: int) -> Tokenizer:
    """Train byte-level BPE; token 0 ends a text."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    trainer = trainers.BpeTrainer(
        vocab_size=vocabulary, special_tokens=[END_OF_TEXT], initial_alphabet=alphabet, show_progress=False
    )
    tokenizer.train_from_iterator(texts, trainer)
    return tokenizer


def encode(tokenizer: Tokenizer, texts: tuple[str, ...]) -> np.ndarray:
    """Return all texts as one row of tokens, each ended by token 0."""
    return np.concatenate([np.array([*one.ids, 0]) for one in tokenizer.encode_batch(list(texts))])


def orthogonalised(update: torch.Tensor) -> torch.Tensor:
    """Return the nearest semi-orthogonal matrices by five Newton-Schulz steps (Muon, Jordan et al. 2024)."""
    a, b, c = 3.4445, -4.7750, 2.0315
    x = update / (update.norm(dim=(-2, -1), keepdim=True) + 1e-7)
    tall = x.shape[-2] > x.shape[-1]
    x = x.mT if tall else x
    for _ in range(5):
        square = x @ x.mT
        x = a * x + (b * square + c * square @ square) @ x
    return x.mT if tall else x


class Muon(torch.optim.Optimizer):
    """Momentum whose update is orthogonalised, for matrices and stacks of them."""

    def __init__(self, parameters, *, lr: float, momentum: float = 0.95, weight_decay: float = 0.0) -> None:
        held = {"lr": lr, "momentum": momentum, "weight_decay": weight_decay, "stacked": False}
        super().__init__(parameters, held)

    @torch.no_grad()
    def step(self, closure=None) -> None:  # noqa: ARG002 - the base class's name
        for group in self.param_groups:
            for weight in group["params"]:
                held = self.state[weight].setdefault("momentum", torch.zeros_like(weight))
                held.lerp_(weight.grad, 1 - group["momentum"])
                blended = weight.grad.lerp(held, group["momentum"])
                halves = blended.unflatten(-2, (2, -1)) if group["stacked"] else blended  # gate and up rows
                update = orthogonalised(halves).reshape(weight.shape)
                scale = 0.2 * math.sqrt(max(halves.shape[-2:]))  # the size of an Adam update (Liu et al. 2025)
                weight.mul_(1 - group["lr"] * group["weight_decay"]).add_(update, alpha=-group["lr"] * scale)


def optimisers(model: OlmoeForCausalLM, lr: float) -> list[torch.optim.Optimizer]:
    """Muon for hidden matrices, AdamW for embedding, routers and vectors."""
    hidden, stacked, routers, rest = [], [], [], []
    for name, weight in model.named_parameters():
        if "mlp.gate.weight" in name:
            routers.append(weight)
        elif weight.ndim < 2 or "embed" in name:
            rest.append(weight)
        else:
            (stacked if "gate_up" in name else hidden).append(weight)
    muon = Muon([{"params": hidden}, {"params": stacked, "stacked": True}], lr=lr, weight_decay=0.1)
    slow = {"params": routers, "slower": _ROUTER_RATE}
    return [muon, torch.optim.AdamW([{"params": rest}, slow], lr=lr, betas=(0.9, 0.95), weight_decay=0.0)]


@torch.no_grad()
def held_out_loss(model: OlmoeForCausalLM, tokens: np.ndarray) -> float:
    """Mean negative log-likelihood in nats per token, over whole windows."""
    model.eval()
    windows = torch.from_numpy(tokens[: len(tokens) // _WINDOW * _WINDOW].reshape(-1, _WINDOW))
    losses = [model(input_ids=part, labels=part).loss.item() * len(part) for part in windows.split(32)]
    model.train()
    return sum(losses) / len(windows)


def unigram_loss(train: np.ndarray, heldout: np.ndarray, vocabulary: int) -> float:
    """Mean negative log-likelihood of the held-out tokens under the training frequencies, one added to each."""
    counts = np.bincount(train, minlength=vocabulary) + 1.0
    return float(-np.log(counts / counts.sum())[heldout].mean())


def imbalance(router_logits: tuple[torch.Tensor, ...], top_k: int) -> torch.Tensor:
    """Return the load-balancing loss (Fedus et al. 2021, section 2.2) summed over layers; top_k is even use in each.

    transformers' own pools the layers before it compares, so that each may starve most of its experts.
    """
    total = torch.zeros(())
    for logits in router_logits:
        shares = logits.float().softmax(-1)
        uses = torch.zeros_like(shares).scatter_(1, shares.topk(top_k).indices, 1.0).mean(0)
        total = total + shares.shape[1] * (uses * shares.mean(0)).sum()
    return total


def train(model, tokens: np.ndarray, *, steps: int, batch: int, lr: float, heldout: np.ndarray) -> float:
    """Train, learning rate up over the first 2 % and down linearly at the end; return the seconds of processor."""
    chosen, rng = optimisers(model, lr), np.random.default_rng(0)
    start = time.process_time()
    for step in range(steps):
        share = step / steps
        rate = lr * min(share / 0.02 + 0.02, 1.0, (1 - share) / 0.7 + 0.005)
        for group in (group for one in chosen for group in one.param_groups):
            group["lr"] = rate * group.get("slower", 1.0)
        begins = rng.integers(0, len(tokens) - _WINDOW, batch)
        rows = torch.from_numpy(np.stack([tokens[begin : begin + _WINDOW] for begin in begins]))
        with torch.autocast("cpu", torch.bfloat16):
            told = model(input_ids=rows, labels=rows, output_router_logits=True)
        (told.loss + _BALANCE * imbalance(told.router_logits, model.config.num_experts_per_tok)).backward()
        for one in chosen:
            one.step()
        model.zero_grad(set_to_none=True)
        if step % 100 == 99:
            print(
                f"step {step + 1}, {time.process_time() - start:.0f} s: {held_out_loss(model, heldout[:6000]):.3f}",
                flush=True,
            )
    return time.process_time() - start


def fused(model: OlmoeForCausalLM) -> dict[str, np.ndarray]:
    """Return the model's tensors without the tied head."""
    return {n: v.detach().float().numpy() for n, v in model.state_dict().items() if n != "lm_head.weight"}


def packed_copy(model: OlmoeForCausalLM) -> tuple[dict[str, np.ndarray], OlmoeForCausalLM]:
    """Return the packed weights, and a model that computes with them in bfloat16 precision."""
    packed = pack_weights(fused(model))
    unpacked = {name: torch.from_numpy(v).bfloat16().float() for name, v in unpack_weights(packed).items()}
    copy = OlmoeForCausalLM(model.config)
    with torch.no_grad():
        for name, value in copy.state_dict().items():
            prefix, _, last = name.rpartition(".")
            if name == "lm_head.weight":
                continue
            if last == "gate_up_proj":
                both = ("gate_proj", "up_proj")
                parts = [torch.cat([unpacked[f"{prefix}.{e}.{one}.weight"] for one in both]) for e in range(len(value))]
                value.copy_(torch.stack(parts))
            elif last == "down_proj":
                value.copy_(torch.stack([unpacked[f"{prefix}.{e}.down_proj.weight"] for e in range(len(value))]))
            else:
                value.copy_(unpacked[name])
    return packed, copy.eval()


@torch.no_grad()
def expert_shares(model: OlmoeForCausalLM, tokens: np.ndarray) -> list[str]:
    """Return each layer's largest and smallest share of expert uses."""
    rows = torch.from_numpy(tokens[: 20 * _WINDOW].reshape(20, _WINDOW))
    logits = model(input_ids=rows, output_router_logits=True).router_logits
    shares = []
    for layer in logits:
        uses = Counter(layer.topk(model.config.num_experts_per_tok).indices.flatten().tolist())
        total = sum(uses.values())
        values = [uses[expert] / total for expert in range(model.config.num_experts)]
        shares.append(f"{max(values):.3f}/{min(values):.3f}")
    return shares


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=1200)
    parser.add_argument("--batch", type=int, default=12)
    parser.add_argument("--lr", type=float, default=6e-3)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--out", type=Path, required=True)
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    torch.manual_seed(0)
    config = OlmoeConfig(
        **{k: v for k, v in tiny_config().items() if k not in {"architectures", "model_type", "dtype"}}
    )
    texts, held = library_text("train"), library_text("heldout")
    tokenizer = byte_pairs(texts, config.vocab_size)
    tokens, heldout = encode(tokenizer, texts), encode(tokenizer, held)
    length = sum(map(len, texts)) / len(tokens)
    print(f"{len(tokens):,} training tokens, {len(heldout):,} held out, {length:.2f} characters each")
    model = OlmoeForCausalLM(config).train()
    model.set_experts_implementation("grouped_mm")
    model.router_aux_loss_coef = 0.0  # see imbalance
    spent = train(model, tokens, steps=arguments.steps, batch=arguments.batch, lr=arguments.lr, heldout=heldout)
    packed, shipped = packed_copy(model)
    arguments.out.mkdir(parents=True, exist_ok=True)
    save_file(packed, arguments.out / "tiny_decoder.safetensors")
    tokenizer.save(str(arguments.out / "tiny_decoder.tokenizer.json"), pretty=False)
    size = (arguments.out / "tiny_decoder.safetensors").stat().st_size
    print("what                         value")
    print(f"parameters                   {sum(p.numel() for p in model.parameters()):,}")
    print(f"steps                        {arguments.steps}, {spent:.0f} s of one core")
    print(f"held out, unigram            {unigram_loss(tokens, heldout, config.vocab_size):.3f} nats per token")
    print(f"held out, trained fp32       {held_out_loss(model, heldout):.3f}")
    print(f"held out, as shipped         {held_out_loss(shipped, heldout):.3f}")
    print(f"busiest/idlest expert        {', '.join(expert_shares(shipped, heldout))}")
    print(f"weights file                 {size:,} bytes")
    for prompt in _PROMPTS:
        begin = torch.tensor([tokenizer.encode(prompt).ids])
        written = shipped.generate(
            begin, attention_mask=torch.ones_like(begin), max_new_tokens=40, do_sample=False, pad_token_id=0
        )
        print(f"greedy: {tokenizer.decode(written[0].tolist())!r}")


if __name__ == "__main__":
    main()
