"""A decoder as an ONNX graph, written from its config; no weight is in it.

    decoder       input_ids (b, s), attention_mask (b, past + s), past_key_values.N.key/value (b, kv, past, head_dim)
                  -> logits (b, s, vocabulary), present.N.key/value (b, kv, past + s, head_dim)
    classifier    input_ids (b, s), attention_mask (b, s) -> probabilities (b, classes), of each row's last token

Operators are standard ones, but for products of codes in blocks, for which onnxruntime has an operator of its own
(MatMulNBits). Names of inputs and outputs are those that other exporters give. Hidden states are kept flat,
(b*s, width), so that a linear reads its weight as it is stored, (out, in). Norms, softmax and rotary positions are
computed in fp32 whatever the weights are.
"""

from __future__ import annotations

import hashlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

import numpy as np
from onnx import TensorProto, helper, numpy_helper

from edgezo.errors import UsageError

OPSET, IR_VERSION = 21, 10
OWN_DOMAIN = "com.microsoft"  # of onnxruntime's own operators
SCALE_END, ZERO_END, BLOCKS_END = "_scale", "_zero", "_blocks"  # of names of a matrix's parts
_INT8_PRODUCTS = 4  # MatMulNBits rounds blocks of its inputs to 8 bits as well, where it can
_FP32_PRODUCTS = 1  # it does not: the two sides of a step would differ by that rounding
_MASKED_SCORE = -3e38  # a score that softmax turns into 0
_COMPUTED_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "relu": "relu",
    "gelu": "gelu",
    "gelu_new": "gelu tanh",
    "gelu_pytorch_tanh": "gelu tanh",
}
_USE_HF = "Use --format hf, which writes the model for transformers."


class Codes(NamedTuple):
    """How a matrix (out, in) is coded: ``bits`` a weight, and one scale for each ``block`` weights of a row."""

    source: str  # the parameter
    bits: int
    block: int | None  # None: one scale a row, and signed codes; else codes in MatMulNBits' order


@dataclass
class Graph:
    """Nodes and constants; weights are named only."""

    float_type: int  # TensorProto.FLOAT or FLOAT16: of weights and hidden states
    bits: int | None = None  # of the codes of matrices; None: matrices have float_type
    block: int | None = (
        None  # weights that share a scale, for onnxruntime's own products; None: standard operators
    )
    exact: bool = False  # products in blocks are computed in fp32, and their zero points are codes
    nodes: list[Any] = field(default_factory=list)
    constants: dict[str, Any] = field(default_factory=dict)
    weights: dict[str, tuple[int, ...]] = field(default_factory=dict)  # shapes, by name
    codes: dict[str, Codes] = field(default_factory=dict)  # of the weights that are codes
    zeros: dict[str, str] = field(
        default_factory=dict
    )  # a zero that is known once an input is, by input
    inputs: list[Any] = field(default_factory=list)
    outputs: list[Any] = field(default_factory=list)

    def op(self, kind: str, *inputs: str, outputs: int = 1, **attributes: Any) -> Any:
        """The name of a node's output, or their names."""
        number = len(self.nodes)
        names = [f"{kind}_{number}" + (f"_{i}" if outputs > 1 else "") for i in range(outputs)]
        self.nodes.append(helper.make_node(kind, list(inputs), names, **attributes))
        return names[0] if outputs == 1 else names

    def const(self, value: Any, dtype: Any = np.int64) -> str:
        """The name of a small constant."""
        array = np.asarray(value, dtype=dtype)
        # The hash of Python differs from process to process, and so would the file.
        digest = hashlib.sha256(array.tobytes()).hexdigest()[:12]
        name = f"c_{array.dtype}_{array.shape}_{digest}"
        if name not in self.constants:
            self.constants[name] = numpy_helper.from_array(array, name)
        return name

    def weight(self, name: str, shape: Sequence[int]) -> str:
        self.weights[name] = tuple(shape)
        return name

    def product(self, x: str, name: str, shape: Sequence[int], bias: str | None = None) -> str:
        """``x`` (n, in) times a matrix (out, in), (n, out)."""
        more = [] if bias is None else [bias]
        if self.bits is None:
            return str(self.op("Gemm", x, self.weight(name, shape), *more, transB=1))
        if self.block is None:
            self.coded(name, shape)
            expanded = self.op(
                "DequantizeLinear", name, name + SCALE_END, self.zeros_of(x, shape[0]), axis=0
            )
            return str(self.op("Gemm", x, expanded, *more, transB=1))
        (rows, cols), name = shape, name + BLOCKS_END
        count = -(-cols // self.block)
        self.codes[name] = Codes(name.removesuffix(BLOCKS_END), self.bits, self.block)
        self.weight(name, (rows, count, self.block * self.bits // 8))
        self.weight(name + SCALE_END, (rows * count,))
        zero = ""
        if self.bits == 4:
            size = (count + 1) // 2 if self.exact else count  # two codes in a byte
            zero = self.weight(name + ZERO_END, (rows * size,))
        inputs = [x, name, name + SCALE_END, zero, "", bias or ""]
        while not inputs[-1]:
            inputs.pop()
        sizes = {"K": cols, "N": rows, "bits": self.bits, "block_size": self.block}
        sizes["accuracy_level"] = _FP32_PRODUCTS if self.exact else _INT8_PRODUCTS
        return str(self.op("MatMulNBits", *inputs, domain=OWN_DOMAIN, **sizes))

    def zeros_of(self, x: str, count: int) -> str:
        """Zero points (count,) that are known once ``x`` is.

        Without them every matrix could be expanded before the first product, and onnxruntime does so.
        """
        if x not in self.zeros:
            rows = self.op("Slice", self.op("Shape", x), self.const([0]), self.const([1]))
            none = self.op("Mul", rows, self.const([0]))
            self.zeros[x] = self.op("Cast", none, to=TensorProto.INT8)
        return str(self.op("Expand", self.zeros[x], self.const([count])))

    def coded(self, name: str, shape: Sequence[int]) -> str:
        """Name a matrix whose codes of 8 bits have one scale a row."""
        self.codes[name] = Codes(name, 8, None)
        self.weight(name, shape)
        self.weight(name + SCALE_END, (shape[0],))
        return name

    def gather(self, name: str, shape: Sequence[int], ids: str) -> str:
        """Rows of a matrix."""
        if self.bits is None:
            return str(self.op("Gather", self.weight(name, shape), ids))
        self.coded(name, shape)
        codes = self.op("Cast", self.op("Gather", name, ids), to=self.float_type)
        scales = self.op("Unsqueeze", self.op("Gather", name + SCALE_END, ids), self.const([-1]))
        return str(self.op("Mul", codes, scales))

    def wide(self, x: str) -> str:
        """``x`` in fp32."""
        if self.float_type == TensorProto.FLOAT:
            return x
        return str(self.op("Cast", x, to=TensorProto.FLOAT))

    def narrow(self, x: str) -> str:
        """``x`` in the type of the weights."""
        if self.float_type == TensorProto.FLOAT:
            return x
        return str(self.op("Cast", x, to=self.float_type))

    def scaled(self, x: str, factor: float) -> str:
        return x if factor == 1.0 else str(self.op("Mul", x, self.const(factor, np.float32)))


class Decoder:
    """The blocks of a causal model, by its config and the shapes of its parameters."""

    def __init__(self, graph: Graph, module: Any, cached: bool):
        self.g, self.c, self.module, self.cached = graph, module.config, module, cached
        self.shapes = {
            n: tuple(p.shape) for n, p in module.named_parameters(remove_duplicate=False)
        }
        c = self.c
        self.classic = c.model_type in ("gpt2", "opt")
        self.layers = c.num_hidden_layers
        self.heads = c.num_attention_heads
        self.kv_heads = getattr(c, "num_key_value_heads", None) or self.heads
        self.width = getattr(c, "head_dim", None) or c.hidden_size // self.heads
        self.base = {"gpt2": "transformer", "opt": "model.decoder"}.get(c.model_type, "model")
        self._check()

    def _check(self) -> None:
        """UsageError for what this graph does not compute."""
        c, refused = self.c, list[str]()
        if self._activation_name() not in _COMPUTED_ACTIVATIONS:
            refused.append(f"the activation {self._activation_name()}")
        if c.model_type == "phi3" and c.rope_parameters.get("rope_type", "default") != "default":
            refused.append("rotary factors that change with the length")
        if c.model_type == "gpt2" and c.scale_attn_by_inverse_layer_idx:
            refused.append("attention scaled by the number of a layer")
        if refused:
            raise UsageError(f"--format onnx has no place for {', '.join(refused)}.\n{_USE_HF}")

    def _activation_name(self) -> str:
        names = ("hidden_activation", "hidden_act", "activation_function")
        return str(next(v for n in names if (v := getattr(self.c, n, None)) is not None))

    # -- parts --------------------------------------------------------------------------------------------

    def has(self, name: str) -> bool:
        return name in self.shapes

    def linear(self, x: str, name: str) -> str:
        """(n, in) -> (n, out)."""
        shape = self.shapes[f"{name}.weight"]
        if self.is_turned(f"{name}.weight"):
            shape = shape[::-1]
        bias = None
        if self.has(f"{name}.bias"):
            bias = self.g.weight(f"{name}.bias", self.shapes[f"{name}.bias"])
        return self.g.product(x, f"{name}.weight", shape, bias)

    def is_turned(self, name: str) -> bool:
        """Whether transformers stores the matrix as (in, out): GPT-2's linears."""
        return self.c.model_type == "gpt2" and ".h." in name and len(self.shapes[name]) == 2

    def norm(self, x: str, name: str) -> str:
        """A norm over the last axis."""
        g, x = self.g, self.g.wide(x)
        if self.classic:
            inputs = [x, self._vector(f"{name}.weight"), self._vector(f"{name}.bias")]
            eps = getattr(self.c, "layer_norm_epsilon", 1e-5)
            return g.narrow(str(g.op("LayerNormalization", *inputs, axis=-1, epsilon=eps)))
        mean = g.op("ReduceMean", g.op("Mul", x, x), g.const([-1]), keepdims=1)
        root = g.op("Sqrt", g.op("Add", mean, g.const(self.c.rms_norm_eps, np.float32)))
        weight = self._vector(f"{name}.weight")
        if "gemma" in self.c.model_type:
            weight = g.op("Add", weight, g.const(1.0, np.float32))
        return g.narrow(str(g.op("Mul", g.op("Div", x, root), weight)))

    def _vector(self, name: str) -> str:
        """A vector of weights in fp32; ones or zeros where a norm has none."""
        if not self.has(name):
            fill = 1.0 if name.endswith("weight") else 0.0
            return self.g.const(np.full(self.c.hidden_size, fill), np.float32)
        return self.g.wide(self.g.weight(name, self.shapes[name]))

    def activation(self, x: str) -> str:
        g, kind = self.g, _COMPUTED_ACTIVATIONS[self._activation_name()]
        if kind == "silu":
            return str(g.op("Mul", x, g.op("Sigmoid", x)))
        if kind == "relu":
            return str(g.op("Relu", x))
        approximate = "tanh" if kind == "gelu tanh" else "none"
        return g.narrow(str(g.op("Gelu", g.wide(x), approximate=approximate)))

    # -- inputs -------------------------------------------------------------------------------------------

    def embed(self) -> str:
        """The hidden states before the first block, (b*s, width)."""
        g, c = self.g, self.c
        names = {"gpt2": "transformer.wte.weight"}
        table = names.get(c.model_type, f"{self.base}.embed_tokens.weight")
        x = g.gather(table, self.shapes[table], "input_ids")
        x = g.op("Reshape", x, g.const([-1, self.shapes[table][1]]))
        if "gemma" in c.model_type:
            # transformers rounds the scale to the type of the weights.
            scale = np.float16 if g.float_type == TensorProto.FLOAT16 else np.float32
            x = g.op("Mul", x, g.const(c.hidden_size**0.5, scale))
        if self.has(f"{self.base}.project_in.weight"):
            x = self.linear(x, f"{self.base}.project_in")
        if self.classic:
            place = "transformer.wpe" if c.model_type == "gpt2" else f"{self.base}.embed_positions"
            shape = self.shapes[f"{place}.weight"]
            at = self.positions
            if c.model_type == "opt":  # its table begins with two rows that no position has
                at = g.op("Add", at, g.const(2))
            where = g.op("Gather", g.weight(f"{place}.weight", shape), at)
            x = g.op("Add", x, g.op("Reshape", where, g.const([-1, shape[1]])))
        return str(x)

    def begin(self) -> None:
        """What all blocks share: sizes, positions, which keys a query may see."""
        g = self.g
        shape = g.op("Shape", "input_ids")
        self.batch, self.length = (g.op("Gather", shape, g.const([i])) for i in (0, 1))
        total = g.op("Gather", g.op("Shape", "attention_mask"), g.const([1]))
        past = g.op("Sub", total, self.length)
        counted = g.op("CumSum", "attention_mask", g.const(1))
        counted = g.op("Max", g.op("Sub", counted, g.const(1)), g.const(0))
        self.positions = g.op("Slice", counted, past, total, g.const([1]))
        scalar = [g.op("Squeeze", x) for x in (past, total)]
        queries = g.op("Unsqueeze", g.op("Range", *scalar, g.const(1)), g.const([1]))
        keys = g.op("Unsqueeze", g.op("Range", g.const(0), scalar[1], g.const(1)), g.const([0]))
        behind = g.op("Sub", queries, keys)  # (s, total)
        given = g.op("Cast", "attention_mask", to=TensorProto.BOOL)
        self._given = g.op("Unsqueeze", given, g.const([1, 2]))
        self._behind = behind
        self._masks: dict[int, str] = {}
        self._rotations: dict[str, tuple[str, str]] = {}

    def mask(self, window: int) -> str:
        """What is added to scores, (b, 1, s, total) fp32; ``window`` 0: none."""
        if window not in self._masks:
            g = self.g
            seen = g.op("GreaterOrEqual", self._behind, g.const(0))
            if window:
                seen = g.op("And", seen, g.op("Less", self._behind, g.const(window)))
            seen = g.op("And", seen, self._given)
            zero, least = g.const(0.0, np.float32), g.const(_MASKED_SCORE, np.float32)
            self._masks[window] = g.op("Where", seen, zero, least)
        return self._masks[window]

    def rotation(self, kind: str) -> tuple[str, str]:
        """Cosine and sine of the positions, (b, 1, s, rotated) fp32, for layers of a kind."""
        if kind not in self._rotations:
            g, rotary = self.g, self.module.base_model.rotary_emb
            prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
            inverse = getattr(rotary, f"{prefix}inv_freq").double().numpy()
            scaling = float(getattr(rotary, f"{prefix}attention_scaling", 1.0))
            at = g.op("Cast", self.positions, to=TensorProto.FLOAT)
            at = g.op("Unsqueeze", at, g.const([1, 3]))
            angles = g.op("Mul", at, g.const(np.concatenate([inverse, inverse]), np.float32))
            cosine, sine = (g.scaled(str(g.op(kind_, angles)), scaling) for kind_ in ("Cos", "Sin"))
            self._rotations[kind] = (cosine, sine)
        return self._rotations[kind]

    # -- blocks -------------------------------------------------------------------------------------------

    def split(self, x: str, heads: int) -> str:
        """(b*s, heads*width) -> (b, heads, s, width)."""
        g = self.g
        shape = g.op(
            "Concat", self.batch, self.length, g.const([heads]), g.const([self.width]), axis=0
        )
        return str(g.op("Transpose", g.op("Reshape", x, shape), perm=[0, 2, 1, 3]))

    def rotate(self, x: str, kind: str) -> str:
        g, (cosine, sine) = self.g, self.rotation(kind)
        rotary = self.module.base_model.rotary_emb
        prefix = f"{kind}_" if hasattr(rotary, f"{kind}_inv_freq") else ""
        rotated = 2 * len(getattr(rotary, f"{prefix}inv_freq"))
        x, axis = g.wide(x), g.const([3])

        def part(start: int, stop: int) -> str:
            return str(g.op("Slice", x, g.const([start]), g.const([stop]), axis))

        first, second = part(0, rotated // 2), part(rotated // 2, rotated)
        turned = g.op("Concat", g.op("Neg", second), first, axis=3)
        inside = x if rotated == self.width else part(0, rotated)
        y = g.op("Add", g.op("Mul", inside, cosine), g.op("Mul", turned, sine))
        if rotated != self.width:
            y = g.op("Concat", y, part(rotated, self.width), axis=3)
        return g.narrow(str(y))

    def queries_keys_values(self, x: str, at: str) -> list[str]:
        """(b, heads, s, width) each."""
        g, kv = self.g, self.kv_heads
        fused = {"gpt2": f"{at}.c_attn", "phi3": f"{at}.qkv_proj"}.get(self.c.model_type)
        if fused is not None:
            sizes = [n * self.width for n in (self.heads, kv, kv)]
            parts = g.op("Split", self.linear(x, fused), g.const(sizes), outputs=3, axis=1)
        else:
            parts = [self.linear(x, f"{at}.{name}_proj") for name in "qkv"]
        made = [self.split(p, n) for p, n in zip(parts, (self.heads, kv, kv), strict=True)]
        for i, name in enumerate(("q_norm", "k_norm")):
            if self.has(f"{at}.{name}.weight"):
                made[i] = self.norm(made[i], f"{at}.{name}")
        return made

    def attention(self, x: str, layer: int, at: str) -> str:
        g, c = self.g, self.c
        kinds = getattr(c, "layer_types", None)
        kind = kinds[layer] if kinds else "full_attention"
        query, key, value = self.queries_keys_values(x, at)
        if not self.classic:
            query, key = self.rotate(query, kind), self.rotate(key, kind)
        if self.cached:
            past, present = self.kept_names(layer)
            key, value = (
                g.op("Concat", name, new, axis=2)
                for name, new in zip(past, (key, value), strict=True)
            )
            for made, name in zip((key, value), present, strict=True):
                g.nodes.append(helper.make_node("Identity", [made], [name]))
        if self.kv_heads != self.heads:
            key, value = self.repeated(key), self.repeated(value)
        scores = g.op("MatMul", query, g.op("Transpose", key, perm=[0, 1, 3, 2]))
        scores = g.scaled(g.wide(scores), self.scale())
        cap = getattr(c, "attn_logit_softcapping", None)
        if cap:
            scores = g.scaled(str(g.op("Tanh", g.scaled(str(scores), 1 / cap))), cap)
        scores = g.op("Add", scores, self.mask(self.window(kind)))
        shares = g.narrow(str(g.op("Softmax", scores, axis=-1)))
        y = g.op("Transpose", g.op("MatMul", shares, value), perm=[0, 2, 1, 3])
        y = self.tokens(str(g.op("Reshape", y, g.const([-1, self.heads * self.width]))))
        out = {"gpt2": "c_proj", "opt": "out_proj"}.get(c.model_type, "o_proj")
        return self.linear(str(y), f"{at}.{out}")

    def kept_names(self, layer: int) -> tuple[Sequence[str], Sequence[str]]:
        """The inputs with keys and values of the tokens before, and the outputs with those of all tokens."""
        parts = ("key", "value")
        past = [f"past_key_values.{layer}.{part}" for part in parts]
        return past, [f"present.{layer}.{part}" for part in parts]

    def tokens(self, y: str) -> str:
        """What attention gives the tokens, (n, width) again, of its rows (b*s, width)."""
        return y

    def scale(self) -> float:
        scalar = getattr(self.c, "query_pre_attn_scalar", None)
        if self.c.model_type == "gpt2" and not self.c.scale_attn_weights:
            return 1.0
        return float(scalar or self.width) ** -0.5

    def window(self, kind: str) -> int:
        window = getattr(self.c, "sliding_window", None)
        if not window or self.classic:
            return 0
        kinds = getattr(self.c, "layer_types", None)
        uses = kind == "sliding_attention" if kinds else self.c.model_type in ("mistral", "phi3")
        return int(window) if uses else 0

    def repeated(self, x: str) -> str:
        """Each key head once for every query head that reads it."""
        g, times = self.g, self.heads // self.kv_heads
        x = g.op("Unsqueeze", x, g.const([2]))
        x = g.op("Tile", x, g.const([1, 1, times, 1, 1]))
        return str(g.op("Reshape", x, g.const([0, self.heads, -1, self.width])))

    def block(self, x: str, layer: int) -> str:
        """One decoder layer, (b*s, width) -> (b*s, width)."""
        if self.c.model_type == "gpt2":
            return self._gpt2_block(x, f"{self.base}.h.{layer}", layer)
        at = f"{self.base}.layers.{layer}"
        if self.c.model_type == "opt":
            return self._opt_block(x, at, layer)
        g, gemma = self.g, "gemma" in self.c.model_type
        y = self.attention(self.norm(x, f"{at}.input_layernorm"), layer, f"{at}.self_attn")
        if gemma:
            y = self.norm(y, f"{at}.post_attention_layernorm")
        x = g.op("Add", x, y)
        before = "pre_feedforward_layernorm" if gemma else "post_attention_layernorm"
        y = self.mlp(self.norm(x, f"{at}.{before}"), f"{at}.mlp")
        if gemma:
            y = self.norm(y, f"{at}.post_feedforward_layernorm")
        return str(g.op("Add", x, y))

    def mlp(self, x: str, at: str) -> str:
        g = self.g
        if self.c.model_type == "phi3":
            size = self.c.intermediate_size
            both = self.linear(x, f"{at}.gate_up_proj")
            gate, up = g.op("Split", both, g.const([size, size]), outputs=2, axis=1)
        else:
            gate, up = self.linear(x, f"{at}.gate_proj"), self.linear(x, f"{at}.up_proj")
        return self.linear(str(g.op("Mul", self.activation(gate), up)), f"{at}.down_proj")

    def _gpt2_block(self, x: str, at: str, layer: int) -> str:
        g = self.g
        x = g.op("Add", x, self.attention(self.norm(x, f"{at}.ln_1"), layer, f"{at}.attn"))
        y = self.activation(self.linear(self.norm(x, f"{at}.ln_2"), f"{at}.mlp.c_fc"))
        return str(g.op("Add", x, self.linear(y, f"{at}.mlp.c_proj")))

    def _opt_block(self, x: str, at: str, layer: int) -> str:
        g, first = self.g, self.c.do_layer_norm_before
        norms = [f"{at}.self_attn_layer_norm", f"{at}.final_layer_norm"]
        y = self.norm(x, norms[0]) if first else x
        x = g.op("Add", x, self.attention(y, layer, f"{at}.self_attn"))
        x = x if first else self.norm(x, norms[0])
        y = self.norm(x, norms[1]) if first else x
        y = self.linear(self.activation(self.linear(y, f"{at}.fc1")), f"{at}.fc2")
        x = g.op("Add", x, y)
        return str(x if first else self.norm(x, norms[1]))

    def end(self, x: str) -> str:
        """What the head reads, (b*s, width)."""
        name = {"gpt2": "transformer.ln_f", "opt": f"{self.base}.final_layer_norm"}
        norm = name.get(self.c.model_type, "model.norm")
        if self.c.model_type != "opt" or self.has(f"{norm}.weight"):
            x = self.norm(x, norm)
        if self.has(f"{self.base}.project_out.weight"):
            x = self.linear(x, f"{self.base}.project_out")
        return x

    def capped(self, logits: str) -> str:
        """Logits in fp32, with the model's soft cap."""
        g, cap = self.g, getattr(self.c, "final_logit_softcapping", None)
        logits = g.wide(logits)
        return g.scaled(str(g.op("Tanh", g.scaled(logits, 1 / cap))), cap) if cap else logits
