"""The nano policy as an ONNX graph: Hugging Face files in, next-token logits out, no torch.

The graph is derived in memory from `config.json` and `model.safetensors` at start, so there is one
set of weights and nothing exported to go stale. Attention is ONNX Runtime's GroupQueryAttention
with past and present in the same buffer: it computes each row over that row's own length only.
Together with one thread and a constant decode shape this makes a request's logits independent of
its neighbours (batching otherwise changes floats: a padded key/value length did in 48 of 213
trials, shared design notes, "Later measurements").
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import onnxruntime as ort
from onnx import TensorProto, helper, numpy_helper

from shared.errors import InputError

Array = npt.NDArray[Any]
Float32 = npt.NDArray[np.float32]


_FLOATS = {"F32": "<f4", "F16": "<f2"}


@dataclass(frozen=True)
class Qwen3Config:
    """The part of a Qwen3 `config.json` that decides the graph."""

    vocab: int
    hidden: int
    layers: int
    heads: int
    kv_heads: int
    head_dim: int
    intermediate: int
    max_positions: int
    rope_theta: float
    norm_eps: float
    tied: bool

    @classmethod
    def read(cls, path: Path) -> Qwen3Config:
        """Raises InputError if the file is missing or names an architecture we do not build."""
        raw = read_json(path)
        rope = raw.get("rope_parameters") or raw.get("rope_scaling") or {}
        problems = [
            message
            for wrong, message in (
                (raw.get("model_type") != "qwen3", f"model_type {raw.get('model_type')!r}"),
                (rope.get("rope_type", "default") != "default", f"rope_type {rope}"),
                (raw.get("attention_bias", False), "attention_bias"),
                (raw.get("use_sliding_window", False), "use_sliding_window"),
                (raw.get("hidden_act", "silu") != "silu", f"hidden_act {raw.get('hidden_act')!r}"),
            )
            if wrong
        ]
        if problems:
            raise InputError(
                f"the nano server builds plain Qwen3 graphs only, not {', '.join(problems)}",
                where=str(path),
                remedy="serve this model with vLLM",
            )
        return cls(
            vocab=raw["vocab_size"],
            hidden=raw["hidden_size"],
            layers=raw["num_hidden_layers"],
            heads=raw["num_attention_heads"],
            kv_heads=raw["num_key_value_heads"],
            head_dim=raw["head_dim"],
            intermediate=raw["intermediate_size"],
            max_positions=raw["max_position_embeddings"],
            rope_theta=float(rope.get("rope_theta", raw.get("rope_theta", 10000.0))),
            norm_eps=raw["rms_norm_eps"],
            tied=raw.get("tie_word_embeddings", False),
        )


def read_json(path: Path) -> dict[str, Any]:
    """A JSON object from a model folder; InputError names the file that is missing or broken."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise InputError(
            f"cannot read {path.name}: {error}",
            where=str(path),
            remedy="point --model at a Hugging Face model folder",
        ) from error
    if not isinstance(value, dict):
        raise InputError(f"{path.name} is not a JSON object", where=str(path))
    return value


def read_safetensors(path: Path) -> dict[str, Float32]:
    """All tensors of a file as float32; the format is a length, a JSON header and raw bytes."""
    try:
        blob = path.read_bytes()
        size = int.from_bytes(blob[:8], "little")
        header = json.loads(blob[8 : 8 + size])
    except (OSError, ValueError) as error:
        raise InputError(f"cannot read weights: {error}", where=str(path)) from error
    tensors: dict[str, Float32] = {}
    for name, entry in header.items():
        if name == "__metadata__":
            continue
        begin, end = entry["data_offsets"]
        raw = blob[8 + size + begin : 8 + size + end]
        if entry["dtype"] == "BF16":  # the upper half of a float32
            flat = (np.frombuffer(raw, "<u2").astype(np.uint32) << 16).view(np.float32)
        elif entry["dtype"] in _FLOATS:
            flat = np.frombuffer(raw, _FLOATS[entry["dtype"]]).astype(np.float32)
        else:
            raise InputError(f"{name}: unsupported dtype {entry['dtype']}", where=str(path))
        tensors[name] = flat.reshape(entry["shape"])
    return tensors


def read_weights(folder: Path) -> dict[str, Float32]:
    """All tensors of a model folder, in one file or in several."""
    parts = sorted(folder.glob("model-*.safetensors")) or [folder / "model.safetensors"]
    return {name: tensor for part in parts for name, tensor in read_safetensors(part).items()}


class _Graph:
    """Collects nodes and constants; `op` returns the name of the (first) output."""

    def __init__(self) -> None:
        self.nodes: list[Any] = []
        self.constants: dict[str, Any] = {}

    def op(self, kind: str, *inputs: str, to: tuple[str, ...] | None = None, **attrs: Any) -> str:
        outputs = to or (f"{kind}_{len(self.nodes)}",)
        self.nodes.append(helper.make_node(kind, list(inputs), list(outputs), **attrs))
        return outputs[0]

    def const(self, name: str, value: Array) -> str:
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(np.asarray(value, order="C"), name)
        return name


def build_graph(cfg: Qwen3Config, weights: dict[str, Float32]) -> bytes:
    """The serialized ONNX model.

    Inputs: `ids` int64 [B, T]; `seqlens` int32 [B], valid keys of each row after this call less
    one; `total` int32 [1], T for a prefill, greater than T for a decode step; `past_k_i` and
    `past_v_i` float32 [B, kv_heads, P, head_dim]. Outputs: `logits` [B, V] of each row's last
    position, `present_k_i` and `present_v_i`, to be bound to the same memory as the past.
    """
    g = _Graph()
    w = weights
    f32, i32, i64 = TensorProto.FLOAT, TensorProto.INT32, TensorProto.INT64
    inputs = [
        helper.make_tensor_value_info("ids", i64, ["B", "T"]),
        helper.make_tensor_value_info("seqlens", i32, ["B"]),
        helper.make_tensor_value_info("total", i32, [1]),
    ]
    outputs = [helper.make_tensor_value_info("logits", f32, ["B", cfg.vocab])]
    frequencies = cfg.rope_theta ** -(
        np.arange(0, cfg.head_dim, 2, dtype=np.float32) / cfg.head_dim
    )
    angles = np.outer(np.arange(cfg.max_positions, dtype=np.float32), frequencies)
    g.const("cos", np.cos(angles).astype(np.float32))
    g.const("sin", np.sin(angles).astype(np.float32))

    def norm(x: str, weight: str) -> str:
        g.const(weight, w[weight])
        return g.op("SimplifiedLayerNormalization", x, weight, epsilon=cfg.norm_eps, axis=-1)

    def add_norm(x: str, residual: str, weight: str) -> tuple[str, str]:
        g.const(weight, w[weight])
        n = len(g.nodes)
        g.op(
            "SkipSimplifiedLayerNormalization",
            x,
            residual,
            weight,
            to=(f"normed_{n}", "", "", f"sum_{n}"),
            domain="com.microsoft",
            epsilon=cfg.norm_eps,
        )
        return f"normed_{n}", f"sum_{n}"

    def linear(x: str, name: str, *sources: str) -> str:
        stacked = np.concatenate([w[source] for source in sources], axis=0)
        return g.op("MatMul", x, g.const(name, stacked.T))

    def head_norm(x: str, heads: int, weight: str) -> str:
        split = g.const(f"shape_{heads}", np.array([0, 0, heads, cfg.head_dim], np.int64))
        merged = g.const(f"flat_{heads}", np.array([0, 0, heads * cfg.head_dim], np.int64))
        return g.op("Reshape", norm(g.op("Reshape", x, split), weight), merged)

    q_size, kv_size = cfg.heads * cfg.head_dim, cfg.kv_heads * cfg.head_dim
    qkv_sizes = g.const("qkv_sizes", np.array([q_size, kv_size, kv_size], np.int64))
    g.const("model.embed_tokens.weight", w["model.embed_tokens.weight"])
    residual = g.op("Gather", "model.embed_tokens.weight", "ids")
    normed = norm(residual, "model.layers.0.input_layernorm.weight")
    for i in range(cfg.layers):
        layer = f"model.layers.{i}"
        projections = [f"{layer}.self_attn.{p}_proj.weight" for p in "qkv"]
        qkv = linear(normed, f"{layer}.qkv", *projections)
        g.op("Split", qkv, qkv_sizes, to=(f"q_{i}", f"k_{i}", f"v_{i}"), axis=-1)
        cache = [f"past_k_{i}", f"past_v_{i}", f"present_k_{i}", f"present_v_{i}"]
        shape = ["B", cfg.kv_heads, "P", cfg.head_dim]
        inputs += [helper.make_tensor_value_info(name, f32, shape) for name in cache[:2]]
        outputs += [helper.make_tensor_value_info(name, f32, shape) for name in cache[2:]]
        attended = g.op(
            "GroupQueryAttention",
            head_norm(f"q_{i}", cfg.heads, f"{layer}.self_attn.q_norm.weight"),
            head_norm(f"k_{i}", cfg.kv_heads, f"{layer}.self_attn.k_norm.weight"),
            f"v_{i}",
            *cache[:2],
            "seqlens",
            "total",
            "cos",
            "sin",
            to=(f"attended_{i}", *cache[2:]),
            domain="com.microsoft",
            num_heads=cfg.heads,
            kv_num_heads=cfg.kv_heads,
            do_rotary=1,
        )
        projected = linear(attended, f"{layer}.o", f"{layer}.self_attn.o_proj.weight")
        normed, residual = add_norm(projected, residual, f"{layer}.post_attention_layernorm.weight")
        mlp = [f"{layer}.mlp.{p}_proj.weight" for p in ("gate", "up")]
        g.op("Split", linear(normed, f"{layer}.gate_up", *mlp), to=(f"gate_{i}", f"up_{i}"),
             axis=-1, num_outputs=2)  # fmt: skip
        silu = g.op("QuickGelu", f"gate_{i}", domain="com.microsoft", alpha=1.0)
        down = linear(
            g.op("Mul", silu, f"up_{i}"), f"{layer}.down", f"{layer}.mlp.down_proj.weight"
        )
        last = i + 1 == cfg.layers
        after = "model.norm.weight" if last else f"model.layers.{i + 1}.input_layernorm.weight"
        normed, residual = add_norm(down, residual, after)
    final = g.op("Gather", normed, g.const("last", np.array(-1, np.int64)), axis=1)
    head = "model.embed_tokens.weight" if cfg.tied else "lm_head.weight"
    g.op("MatMul", final, g.const("head", w[head].T), to=("logits",))

    graph = helper.make_graph(g.nodes, "qwen3", inputs, outputs, list(g.constants.values()))
    opsets = [helper.make_opsetid("", 18), helper.make_opsetid("com.microsoft", 1)]
    model = helper.make_model(graph, opset_imports=opsets, ir_version=10)
    return bytes(model.SerializeToString())


class NanoModel:
    """Weights, key/value memory of `slots` rows, and the two calls of the engine.

    Not thread-safe: one engine thread owns it. Memory: 2 * layers * slots * kv_heads * max_len *
    head_dim floats (84 MB for the packaged model at 32 slots).
    """

    def __init__(self, folder: Path, *, slots: int, max_len: int | None = None) -> None:
        self.config = cfg = Qwen3Config.read(folder / "config.json")
        self.slots = slots
        self.max_len = min(max_len or cfg.max_positions, cfg.max_positions)
        options = ort.SessionOptions()
        # One thread: the order of every sum is fixed, and the other cores belong to the workers.
        options.intra_op_num_threads = options.inter_op_num_threads = 1
        options.log_severity_level = 3
        # On rows this short the blockwise kernel costs a third more per prefill than the plain one.
        os.environ.setdefault("ORT_GQA_DISABLE_FLASH_ATTENTION", "1")
        weights = read_weights(folder)
        try:
            graph = build_graph(cfg, weights)
        except KeyError as error:
            raise InputError(f"the weights lack tensor {error}", where=str(folder)) from error
        self._session = ort.InferenceSession(graph, options, providers=["CPUExecutionProvider"])
        shape = (slots, cfg.kv_heads, self.max_len, cfg.head_dim)
        self._cache = {
            f"{part}_{i}": np.zeros(shape, np.float32)
            for i in range(cfg.layers)
            for part in ("k", "v")
        }
        self._ids = np.zeros((slots, 1), np.int64)
        self._lengths = np.zeros(slots, np.int32)
        self._logits = np.zeros((slots, cfg.vocab), np.float32)
        self._decode = self._bind(self._cache, self._ids, self._lengths, self._logits)

    def _bind(
        self, cache: dict[str, Float32], ids: Array, lengths: Array, logits: Float32
    ) -> ort.IOBinding:
        """Bind numpy memory; ONNX Runtime reads and writes it in place, nothing is copied.

        `total` > T marks a decode step, `total` = T a prefill; its value matters no further, since
        every row attends over its own length.
        """
        tokens = ids.shape[1]
        total = np.array([tokens if tokens > 1 else self.max_len], np.int32)
        binding = self._session.io_binding()
        for name, array in (("ids", ids), ("seqlens", lengths), ("total", total)):
            binding.bind_ortvalue_input(name, ort.OrtValue.ortvalue_from_numpy(array))
        for name, array in cache.items():
            value = ort.OrtValue.ortvalue_from_numpy(array)
            binding.bind_ortvalue_input(f"past_{name}", value)
            binding.bind_ortvalue_output(f"present_{name}", value)
        binding.bind_ortvalue_output("logits", ort.OrtValue.ortvalue_from_numpy(logits))
        return binding

    def prefill(self, slot: int, ids: list[int]) -> Float32:
        """Read a prompt into a slot; the logits [V] that follow its last token.

        Always one prompt at a time, so its shape depends on nothing but itself.
        """
        cache = {name: array[slot : slot + 1] for name, array in self._cache.items()}
        logits = np.empty((1, self.config.vocab), np.float32)
        lengths = np.array([len(ids) - 1], np.int32)
        binding = self._bind(cache, np.array([ids], np.int64), lengths, logits)
        self._session.run_with_iobinding(binding)
        first: Float32 = logits[0]
        return first

    def copy_prompt(self, source: int, target: int, tokens: int) -> None:
        """Give `target` the first `tokens` keys and values of `source`."""
        for array in self._cache.values():
            array[target, :, :tokens] = array[source, :, :tokens]

    def decode(self, rows: dict[int, tuple[int, int]]) -> Float32:
        """One step for every slot at once: slot -> (its newest token, that token's position).

        Returns logits [slots, V], overwritten by the next call. Slots not named compute a token at
        position 0 that nobody reads: the shape, and so every sum, is the same whoever is there.
        """
        self._ids[:], self._lengths[:] = 0, 0
        for slot, (token, position) in rows.items():
            self._ids[slot, 0], self._lengths[slot] = token, position
        self._session.run_with_iobinding(self._decode)
        return self._logits
