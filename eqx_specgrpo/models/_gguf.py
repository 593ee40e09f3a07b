"""`.gguf` files: metadata to `TransformerConfig`, tensors under their Hugging Face names.

Reading needs the `gguf` package (extra `gguf`), whose own dequantisation is used.
"""

from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import CheckpointError
from ._config import LinearRope, Llama3Rope, RopeScaling, TransformerConfig
from ._gguf_keys import GGUF_KEYS
from ._keys import check_keys, rule_of
from ._rope import rope_frequencies
from ._safetensors import StoredTensor

if TYPE_CHECKING:
    from gguf import GGUFReader

_ARCHITECTURES = ("llama", "mistral", "qwen2", "qwen3")
_ROPE_FACTORS = "rope_freqs.weight"
_TOP_LEVEL = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "output.weight": "lm_head.weight",
}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}


class GGUFFile:
    """An open `.gguf` file.

    **Arguments:**

    - `path`: of the file. Its tensors are mapped into memory, and dequantised one at a time when read.
    """

    path: Path
    reader: "GGUFReader"

    def __init__(self, path: Path):
        try:
            import gguf
        except ImportError as error:
            raise CheckpointError(
                f'reading {path} needs the gguf package: pip install "eqx_specgrpo[gguf]" (or give a folder)'
            ) from error
        self.path = path
        try:
            self.reader = gguf.GGUFReader(path)
        except Exception as error:  # A damaged header surfaces as anything from IndexError to UnicodeDecodeError.
            raise CheckpointError(
                f"{path} is truncated, corrupt or no GGUF file ({error}); download or copy it again"
            ) from error

    def get(self, key: str, default: Any = None) -> Any:
        """A metadata value, or `default`."""
        field = self.reader.get_field(key)
        return default if field is None else field.contents()

    def require(self, key: str) -> Any:
        value = self.get(key)
        if value is None:
            raise CheckpointError(f"{self.path} has no metadata key {key!r}, so the model can't be rebuilt from it")
        return value

    def check_keys(self) -> None:
        """Raises a `CheckpointError` for metadata that are not supported, and warns of unknown ones."""
        architecture = str(self.get("general.architecture", ""))
        values = {}
        for key in self.reader.fields:
            name = key.replace(f"{architecture}.", "{arch}.", 1) if key.startswith(f"{architecture}.") else key
            rule = rule_of(name, GGUF_KEYS)
            # Reading the others would copy the vocabulary out of the file.
            if rule is None or rule.treatment == "refused":
                values[name] = self.get(key)
        check_keys(values, GGUF_KEYS, self.path)

    def config(self) -> TransformerConfig:
        """The model's shape, from metadata and from which tensors there are."""
        architecture = self.require("general.architecture")
        if architecture not in _ARCHITECTURES:
            raise CheckpointError(
                f"{self.path}: architecture {architecture!r} is not supported; supported are "
                f"{', '.join(_ARCHITECTURES)}"
            )
        shapes = {tensor.name: tuple(int(n) for n in tensor.shape) for tensor in self.reader.tensors}
        if "token_embd.weight" not in shapes:
            raise CheckpointError(f"{self.path} has no tensor 'token_embd.weight': it is not a whole model")
        self.check_keys()

        def need(key: str) -> Any:
            return self.require(f"{architecture}.{key}")

        hidden_size, num_heads = int(need("embedding_length")), int(need("attention.head_count"))
        head_dim = int(self.get(f"{architecture}.attention.key_length", hidden_size // num_heads))
        rotary = int(self.get(f"{architecture}.rope.dimension_count", head_dim))
        if rotary != head_dim:
            raise CheckpointError(
                f"{self.path}: only {rotary} of {head_dim} dimensions turn (rope.dimension_count); all must"
            )
        max_positions = int(need("context_length"))
        window = self.get(f"{architecture}.attention.sliding_window")
        theta = float(self.get(f"{architecture}.rope.freq_base", 10000.0))
        try:
            return TransformerConfig(
                vocab_size=shapes["token_embd.weight"][1],
                hidden_size=hidden_size,
                intermediate_size=int(need("feed_forward_length")),
                num_layers=int(need("block_count")),
                num_heads=num_heads,
                num_kv_heads=int(self.get(f"{architecture}.attention.head_count_kv", num_heads)),
                head_dim=head_dim,
                max_position_embeddings=max_positions,
                rope_theta=theta,
                rope_scaling=self._rope_scaling(architecture, head_dim, theta),
                norm_eps=float(need("attention.layer_norm_rms_epsilon")),
                qkv_bias="blk.0.attn_q.bias" in shapes,
                output_bias="blk.0.attn_output.bias" in shapes,
                mlp_bias="blk.0.ffn_gate.bias" in shapes,
                qk_norm="blk.0.attn_q_norm.weight" in shapes,
                tie_embeddings="output.weight" not in shapes,
                sliding_window=None if not window or window >= max_positions else int(window),
            )
        except (TypeError, ValueError) as error:
            if isinstance(error, CheckpointError):
                raise
            raise CheckpointError(f"{self.path}: metadata that can't be used ({error})") from error

    def _rope_scaling(self, architecture: str, head_dim: int, theta: float) -> RopeScaling:
        factors = next((t for t in self.reader.tensors if t.name == _ROPE_FACTORS), None)
        if factors is not None:
            # llama.cpp stores Llama 3's scaling as one divisor a frequency, without the numbers it came from. All
            # Llama 3 models share three of the four; the divisors tell whether this file is one of them.
            divisors = np.asarray(factors.data, np.float32)
            scaling = Llama3Rope(float(divisors.max()), 1.0, 4.0, 8192)
            implied = rope_frequencies(head_dim, theta, None) / rope_frequencies(head_dim, theta, scaling)
            if divisors.shape != implied.shape or not np.allclose(divisors, implied, rtol=1e-3):
                raise CheckpointError(
                    f"{self.path}: {_ROPE_FACTORS} holds a rotary scaling other than Llama 3's, which is not supported"
                )
            return scaling
        factor = self.get(f"{architecture}.rope.scaling.factor") or self.get(f"{architecture}.rope.scale_linear") or 0
        kind = self.get(f"{architecture}.rope.scaling.type", "linear" if factor else "none")
        if kind == "none":
            return None
        if kind == "linear":
            return LinearRope(float(factor or self.require(f"{architecture}.rope.scaling.factor")))
        raise CheckpointError(
            f"{self.path}: rope type {kind!r} is not supported; supported are none, linear and llama3"
        )

    def tensors(self, config: TransformerConfig) -> dict[str, StoredTensor]:
        """All tensors, under their names in Hugging Face checkpoints where they have one."""
        # llama.cpp pairs neighbouring dimensions in the rotary embedding of these architectures and permutes the rows
        # of the query and key projections for it; the Qwen ones it leaves alone.
        permuted = self.require("general.architecture") in ("llama", "mistral")
        heads = {"attn_q": config.num_heads, "attn_k": config.num_kv_heads} if permuted else {}
        return {
            _hf_name(tensor.name): self._stored(tensor, heads.get(tensor.name.split(".")[-2]))
            for tensor in self.reader.tensors
            if tensor.name != _ROPE_FACTORS
        }

    def _stored(self, tensor: Any, heads: int | None) -> StoredTensor:
        shape = tuple(int(n) for n in reversed(tensor.shape))

        def read() -> np.ndarray:
            from gguf.quants import dequantize

            try:
                # A plain view: slicing a memmap costs more than dequantising what was sliced.
                array = dequantize(np.asarray(tensor.data), tensor.tensor_type).reshape(shape)
            except (NotImplementedError, ValueError) as error:
                raise CheckpointError(
                    f"{self.path}: tensor {tensor.name!r} ({tensor.tensor_type.name}) can't be dequantised ({error})"
                ) from error
            if heads is None:
                return array
            pairs = array.reshape(heads, shape[0] // heads // 2, 2, *shape[1:])
            return pairs.swapaxes(1, 2).reshape(shape)

        return StoredTensor(shape, read)


def _hf_name(name: str) -> str:
    parts = name.split(".")
    if len(parts) == 4 and parts[0] == "blk" and parts[2] in _LAYER:
        return f"model.layers.{parts[1]}.{_LAYER[parts[2]]}.{parts[3]}"
    return _TOP_LEVEL.get(name, name)
