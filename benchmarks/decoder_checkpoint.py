"""Generate a mixture-of-experts checkpoint of a given shape, and the same numbers as GGUF for llama.cpp.

python benchmarks/decoder_checkpoint.py /tmp/olmoe --gguf              # OLMoE-1B-7B's shape: 13.8 GB and 3.9 GB
python benchmarks/decoder_checkpoint.py /tmp/olmoe4 --layers 4 --gguf

Weights are random but sane: unit variance through every projection, logits with a spread of 2, routers whose rows
have different lengths, so that some experts are used more than others. One block of random numbers is repeated,
from another place for every tensor, so that memory stays at a few hundred megabytes and the disk is the limit; its
length is no multiple of a row's, so that no two rows are equal. GGUF holds every matrix in Q4_0, also embedding and
head, norms and routers in fp32: what edgeflex's int4 in groups of 32 takes, 4.5 bits a weight.
"""

from __future__ import annotations

import argparse
import json
import shutil
import time
from dataclasses import dataclass, replace
from pathlib import Path

import gguf
import numpy as np

_GROUP = 32
_BLOCK_GROUPS = 131_071  # a prime, so that rows of any usual width never fall on the same phase: 4.2 M numbers
_WRITE_GROUPS = 65_536
_DOWN_GAIN = 3.0  # routing weights of a softmax over 64 sum to about a third over the chosen eight
_LOGIT_SPREAD = 2.0
_ROUTER_SPREAD = 2.0
_ROUTER_SKEW = 0.25


@dataclass(frozen=True)
class Shape:
    """A decoder of family OLMoE; the defaults are those of allenai/OLMoE-1B-7B-0924."""

    layers: int = 16
    hidden: int = 2048
    heads: int = 16
    experts: int = 64
    top_k: int = 8
    expert_dim: int = 1024
    vocabulary: int = 50304
    context: int = 4096

    def config(self) -> dict[str, object]:
        """Return ``config.json``."""
        return {
            "architectures": ["OlmoeForCausalLM"],
            "model_type": "olmoe",
            "attention_bias": False,
            "attention_dropout": 0.0,
            "bos_token_id": 0,
            "clip_qkv": None,
            "dtype": "bfloat16",
            "eos_token_id": self.vocabulary - 1,
            "hidden_act": "silu",
            "hidden_size": self.hidden,
            "initializer_range": 0.02,
            "intermediate_size": self.expert_dim,
            "max_position_embeddings": self.context,
            "norm_topk_prob": False,
            "num_attention_heads": self.heads,
            "num_experts": self.experts,
            "num_experts_per_tok": self.top_k,
            "num_hidden_layers": self.layers,
            "num_key_value_heads": self.heads,
            "output_router_logits": False,
            "pad_token_id": None,
            "rms_norm_eps": 1e-5,
            "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default"},
            "router_aux_loss_coef": 0.01,
            "tie_word_embeddings": False,
            "use_cache": True,
            "vocab_size": self.vocabulary,
        }


@dataclass(frozen=True)
class Tensor:
    """One tensor of the checkpoint: a stretch of a repeated block, or (norms, routers) its own numbers.

    ``start`` counts groups of 32 numbers into the block.
    """

    name: str
    shape: tuple[int, ...]
    scale: float = 0.0
    start: int = 0
    values: np.ndarray | None = None

    @property
    def numbers(self) -> int:
        """How many numbers."""
        return int(np.prod(self.shape))


def to_bf16(values: np.ndarray) -> np.ndarray:
    """Round fp32 to the 16 bits of bfloat16, half to even."""
    bits = values.astype(np.float32).view(np.uint32)
    return ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)


def from_bf16(bits: np.ndarray) -> np.ndarray:
    """Return bfloat16 bits as fp32."""
    return (bits.astype(np.uint32) << 16).view(np.float32)


class Blocks:
    """One random block for each scale, in both formats.

    Each has numbers of its own: if embedding and head shared theirs, a token's row would be some token's answer.
    """

    def __init__(self, seed: int) -> None:
        self._seed = seed
        self._bf16: dict[float, np.ndarray] = {}
        self._q4: dict[float, np.ndarray] = {}

    def bf16(self, scale: float) -> np.ndarray:
        """Return ``[groups, 64]`` bytes."""
        if scale not in self._bf16:
            rng = np.random.default_rng((self._seed, len(self._bf16)))
            normal = rng.standard_normal(_BLOCK_GROUPS * _GROUP, dtype=np.float32)
            self._bf16[scale] = to_bf16(normal * np.float32(scale)).view(np.uint8).reshape(-1, 2 * _GROUP)
        return self._bf16[scale]

    def q4_0(self, scale: float) -> np.ndarray:
        """Return ``[groups, 18]`` bytes: the same numbers, rounded from bfloat16 by gguf's own quantiser."""
        if scale not in self._q4:
            numbers = from_bf16(self.bf16(scale).reshape(-1).view(np.uint16)).reshape(-1, _GROUP)
            self._q4[scale] = gguf.quants.quantize(numbers, gguf.GGMLQuantizationType.Q4_0)
        return self._q4[scale]


def stretches(block: np.ndarray, start: int, groups: int):
    """Yield slices of ``block``, read round and round from ``start``, that hold ``groups`` rows together."""
    place = start % len(block)
    while groups > 0:
        count = min(groups, len(block) - place, _WRITE_GROUPS)
        yield block[place : place + count]
        groups, place = groups - count, (place + count) % len(block)


class Checkpoint:
    """Names, scales and starts of all tensors, in the order of the files."""

    def __init__(self, shape: Shape, seed: int) -> None:
        self.shape = shape
        self._rng = np.random.default_rng(seed + 1)
        self._unit = shape.hidden**-0.5

    def _matrix(self, name: str, *shape: int, scale: float) -> Tensor:
        return Tensor(name, shape, scale, int(self._rng.integers(_BLOCK_GROUPS)))

    def _ones(self, name: str) -> Tensor:
        return Tensor(name, (self.shape.hidden,), values=np.ones(self.shape.hidden, np.float32))

    def _router(self, name: str) -> Tensor:
        """Rows of different lengths: a longer row wins more often."""
        shape = (self.shape.experts, self.shape.hidden)
        lengths = np.exp(_ROUTER_SKEW * self._rng.standard_normal((shape[0], 1)))
        rows = self._rng.standard_normal(shape) * lengths * self._unit * _ROUTER_SPREAD
        return Tensor(name, shape, values=from_bf16(to_bf16(rows)))

    def first(self) -> list[Tensor]:
        """Return the embedding."""
        return [self._matrix("model.embed_tokens.weight", self.shape.vocabulary, self.shape.hidden, scale=1.0)]

    def last(self) -> list[Tensor]:
        """Return the norm and the head."""
        scale = _LOGIT_SPREAD * self._unit
        head = self._matrix("lm_head.weight", self.shape.vocabulary, self.shape.hidden, scale=scale)
        return [self._ones("model.norm.weight"), head]

    def layer(self, index: int) -> list[Tensor]:
        """Return one layer's tensors, named as published."""
        hidden, inner, at = self.shape.hidden, self.shape.expert_dim, f"model.layers.{index}"
        norms = ("input_layernorm", "post_attention_layernorm", "self_attn.q_norm", "self_attn.k_norm")
        found = [self._ones(f"{at}.{name}.weight") for name in norms]
        found += [
            self._matrix(f"{at}.self_attn.{name}_proj.weight", hidden, hidden, scale=self._unit) for name in "qkvo"
        ]
        found.append(self._router(f"{at}.mlp.gate.weight"))
        for expert in range(self.shape.experts):
            one = f"{at}.mlp.experts.{expert}"
            found.append(self._matrix(f"{one}.gate_proj.weight", inner, hidden, scale=self._unit))
            found.append(self._matrix(f"{one}.up_proj.weight", inner, hidden, scale=self._unit))
            found.append(self._matrix(f"{one}.down_proj.weight", hidden, inner, scale=_DOWN_GAIN * inner**-0.5))
        return found


def write_shard(path: Path, tensors: list[Tensor], blocks: Blocks) -> int:
    """Write one safetensors file in bfloat16; return the bytes of its tensors."""
    header: dict[str, object] = {"__metadata__": {"format": "pt"}}
    offset = 0
    for tensor in tensors:
        end = offset + 2 * tensor.numbers
        header[tensor.name] = {"dtype": "BF16", "shape": list(tensor.shape), "data_offsets": [offset, end]}
        offset = end
    raw = json.dumps(header, separators=(",", ":")).encode()
    raw += b" " * (-len(raw) % 8)
    with path.open("wb") as file:
        file.write(len(raw).to_bytes(8, "little") + raw)
        for tensor in tensors:
            if tensor.values is not None:
                file.write(to_bf16(tensor.values).tobytes())
                continue
            for part in stretches(blocks.bf16(tensor.scale), tensor.start, tensor.numbers // _GROUP):
                file.write(part.data)
    return offset


def write_tokenizer(path: Path, vocabulary: int) -> None:
    """Write a byte-level tokenizer of ``vocabulary`` tokens without merges: 0 ends, then bytes, then fillers."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers

    pieces = ["<|endoftext|>", *sorted(pre_tokenizers.ByteLevel.alphabet())]
    pieces += [f"Ġw{number}" for number in range(len(pieces), vocabulary)]
    tokenizer = Tokenizer(models.BPE({piece: number for number, piece in enumerate(pieces)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(["<|endoftext|>"])
    tokenizer.save(str(path), pretty=False)


def write_folder(folder: Path, checkpoint: Checkpoint, tensors: list[list[Tensor]], blocks: Blocks) -> None:
    """Write the Hugging Face folder, one shard for the ends and one for each layer."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(checkpoint.shape.config(), indent=1, sort_keys=True) + "\n")
    write_tokenizer(folder / "tokenizer.json", checkpoint.shape.vocabulary)
    total, where = 0, {}
    for index, shard in enumerate(tensors):
        name = f"model-{index + 1:05d}-of-{len(tensors):05d}.safetensors"
        total += write_shard(folder / name, shard, blocks)
        where.update({tensor.name: name for tensor in shard})
    listing = {"metadata": {"total_size": total}, "weight_map": where}
    (folder / "model.safetensors.index.json").write_text(json.dumps(listing))


_PLAIN = {
    "model.embed_tokens": "token_embd",
    "model.norm": "output_norm",
    "lm_head": "output",
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "mlp.gate": "ffn_gate_inp",
    "gate_proj": "ffn_gate_exps",
    "up_proj": "ffn_up_exps",
    "down_proj": "ffn_down_exps",
}


def gguf_order(tensors: list[list[Tensor]]) -> list[tuple[str, list[Tensor]]]:
    """Return llama.cpp's names with the tensors that each holds, one after another (all experts of a projection)."""
    found: dict[str, list[Tensor]] = {}
    for tensor in (tensor for shard in tensors for tensor in shard):
        plain, block = tensor.name.removesuffix(".weight"), ""
        if plain.startswith("model.layers."):
            _, _, layer, plain = plain.split(".", 3)
            block = f"blk.{layer}."
        if plain.startswith("mlp.experts."):
            plain = plain.rsplit(".", 1)[1]
        found.setdefault(f"{block}{_PLAIN[plain]}.weight", []).append(tensor)
    return list(found.items())


def write_gguf(path: Path, shape: Shape, tensors: list[list[Tensor]], blocks: Blocks) -> None:
    """Write the same numbers for llama.cpp, matrices in Q4_0, the rest in fp32, without a vocabulary."""
    writer = gguf.GGUFWriter(path, "olmoe")
    writer.add_name("generated")
    writer.add_block_count(shape.layers)
    writer.add_context_length(shape.context)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.expert_dim)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.heads)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    writer.add_expert_count(shape.experts)
    writer.add_expert_used_count(shape.top_k)
    writer.add_vocab_size(shape.vocabulary)
    writer.add_tokenizer_model("no_vocab")
    writer.add_file_type(gguf.LlamaFileType.MOSTLY_Q4_0)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    ordered = gguf_order(tensors)
    for name, parts in ordered:
        whole = parts[0].shape if len(parts) == 1 else (len(parts), *parts[0].shape)
        numbers = int(np.prod(whole))
        if parts[0].values is not None:
            writer.add_tensor_info(name, whole, np.dtype(np.float32), 4 * numbers)
        else:
            q4 = gguf.GGMLQuantizationType.Q4_0
            writer.add_tensor_info(name, whole, np.dtype(np.float16), numbers // _GROUP * 18, raw_dtype=q4)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_ti_data_to_file()
    file = writer.fout[0]
    for _, parts in ordered:
        writer.write_padding(file, file.tell())
        for part in parts:
            if part.values is not None:
                file.write(part.values.astype(np.float32).tobytes())
                continue
            for stretch in stretches(blocks.q4_0(part.scale), part.start, part.numbers // _GROUP):
                file.write(stretch.data)
        writer.write_padding(file, file.tell())
    writer.close()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--gguf", action="store_true", help="also write FOLDER.gguf in Q4_0")
    for name, default in vars(Shape()).items():
        parser.add_argument(f"--{name.replace('_', '-')}", type=int, default=default)
    arguments = parser.parse_args()
    shape = replace(Shape(), **{name: getattr(arguments, name) for name in vars(Shape())})
    checkpoint, blocks = Checkpoint(shape, arguments.seed), Blocks(arguments.seed)
    ends = [checkpoint.first() + checkpoint.last()]
    tensors = ends + [checkpoint.layer(index) for index in range(shape.layers)]
    numbers = sum(tensor.numbers for shard in tensors for tensor in shard)
    needed = 2 * numbers + (numbers * 18 // _GROUP if arguments.gguf else 0)
    arguments.folder.parent.mkdir(parents=True, exist_ok=True)
    free = shutil.disk_usage(arguments.folder.parent).free
    if needed > 0.9 * free:
        raise SystemExit(f"{needed / 1e9:.1f} GB are to be written and {free / 1e9:.1f} GB are free")
    start = time.monotonic()
    write_folder(arguments.folder, checkpoint, tensors, blocks)
    seconds = time.monotonic() - start
    print(f"{numbers:,} parameters, {2 * numbers / 1e9:.2f} GB in {arguments.folder} after {seconds:.0f} s")
    if arguments.gguf:
        path = arguments.folder.with_name(f"{arguments.folder.name}.gguf")
        write_gguf(path, shape, tensors, blocks)
        print(f"{path.stat().st_size / 1e9:.2f} GB in {path} after {time.monotonic() - start:.0f} s")


if __name__ == "__main__":
    main()
