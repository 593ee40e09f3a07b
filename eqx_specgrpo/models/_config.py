"""The shape of a decoder-only transformer, in words of our own; `_hf_config.py` translates `config.json` to and fro."""

import dataclasses
from typing import Literal


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """Positions divided by `factor` (Chen et al. 2023, position interpolation)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class DynamicRope:
    """The base grows with the length, beyond `max_position_embeddings` only (NTK scaling; bloc97 and emozilla 2023).

    No row becomes longer than that here, so nothing is scaled: what is kept is what the file said.
    """

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's scaling: low frequencies divided by `factor`, high ones kept, the band between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


@dataclasses.dataclass(frozen=True)
class YarnRope:
    """Frequencies divided by `factor` where a turn takes long, kept where it is quick, a ramp between; what turns is
    multiplied by `attention_factor` (Peng et al. 2023, YaRN, arXiv:2309.00071, sections 3.2 and 3.4).

    The ramp is from the dimension that turns `beta_fast` times in the original length to the one that turns `beta_slow`
    times, both rounded outwards if `truncate`.
    """

    factor: float
    original_max_position_embeddings: int
    attention_factor: float
    beta_fast: float = 32.0
    beta_slow: float = 1.0
    truncate: bool = True


@dataclasses.dataclass(frozen=True)
class LongRope:
    """A divisor for each frequency, of one set up to the original length and of another beyond; what turns is
    multiplied by `attention_factor` (Ding et al. 2024, LongRoPE, arXiv:2402.13753, section 3.2).

    Which set holds would change under way, with the length of a row, and with it what its first tokens mean. So rows
    stay within the original length here, and `long_factor` is only kept.
    """

    short_factor: tuple[float, ...]
    long_factor: tuple[float, ...]
    original_max_position_embeddings: int
    attention_factor: float


RopeScaling = LinearRope | DynamicRope | Llama3Rope | YarnRope | LongRope | None


@dataclasses.dataclass(frozen=True)
class TransformerConfig:
    """Everything static about a `Transformer`. Hashable, so that it can be a static field.

    **Arguments:**

    - `vocab_size`, `hidden_size`, `intermediate_size`, `num_layers`, `num_heads`, `num_kv_heads`, `head_dim`: sizes.
    - `max_position_embeddings`: the longest sequence, prompt and completion together.
    - `rope_theta`, `rope_scaling`: rotary embedding (Su et al. 2021, RoFormer).
    - `norm_eps`: of RMSNorm.
    - `qkv_bias`, `output_bias`, `mlp_bias`: which linear layers carry a bias (Qwen2: the first).
    - `qk_norm`: RMSNorm over each head of queries and keys (Qwen3).
    - `tie_embeddings`: the unembedding is the embedding's matrix.
    - `sliding_window`: how many positions back attention sees (Mistral 7B v0.1); `None` for all.
    - `full_attention_layers`: those that see all in spite of `sliding_window` (Gemma).
    - `sliding_rope_theta`: of the layers with a window, unscaled (Gemma 3); `None` if it is that of the others.
    - `no_rope_layers`: those whose queries and keys do not turn (SmolLM3).
    - `rotary_dim`: how many dimensions of a head turn (Phi-4-mini); `None` for all.
    - `qk_norm_across_heads`: `qk_norm` is over all heads at once (OLMo 2).
    - `norm_placement`: RMSNorm before attention and MLP, after them (OLMo 2), or before and after (Gemma).
    - `norm_offset`: added to the weights of RMSNorm (Gemma: 1).
    - `activation`: of the gate of the MLP; `"gelu_tanh"` is the approximate form (Gemma).
    - `embedding_multiplier`, `residual_multiplier`: factors on embeddings, and on what attention and MLP add.
    - `attention_multiplier`: what scores are multiplied by; `None` for `1 / sqrt(head_dim)`.
    - `logits_scaling`: what logits are divided by (Granite).
    - `attn_logit_softcapping`, `final_logit_softcapping`: scores or logits `x` become `cap * tanh(x / cap)` (Gemma 2).
    """

    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_position_embeddings: int
    rope_theta: float = 10000.0
    rope_scaling: RopeScaling = None
    norm_eps: float = 1e-6
    qkv_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    qk_norm: bool = False
    tie_embeddings: bool = False
    sliding_window: int | None = None
    full_attention_layers: tuple[int, ...] = ()
    sliding_rope_theta: float | None = None
    no_rope_layers: tuple[int, ...] = ()
    rotary_dim: int | None = None
    qk_norm_across_heads: bool = False
    norm_placement: Literal["before", "after", "around"] = "before"
    norm_offset: float = 0.0
    activation: Literal["silu", "gelu_tanh"] = "silu"
    embedding_multiplier: float = 1.0
    residual_multiplier: float = 1.0
    attention_multiplier: float | None = None
    logits_scaling: float = 1.0
    attn_logit_softcapping: float | None = None
    final_logit_softcapping: float | None = None

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}): each "
                "key/value head serves an equal group of query heads"
            )
        if self.head_dim % 2 != 0:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary embedding turns pairs of dimensions")
        if self.rotary_dim is not None and not (0 < self.rotary_dim <= self.head_dim and self.rotary_dim % 2 == 0):
            raise ValueError(
                f"rotary_dim ({self.rotary_dim}) must be even and at most head_dim ({self.head_dim}): rotary embedding "
                "turns pairs of a head's dimensions"
            )
        turning = self.rotary_dim or self.head_dim
        if isinstance(self.rope_scaling, LongRope) and {2 * len(self.rope_scaling.short_factor)} != {turning}:
            raise ValueError(
                f"short_factor has {len(self.rope_scaling.short_factor)} numbers, but {turning // 2} pairs of "
                "dimensions turn"
            )

    @property
    def max_length(self) -> int:
        """The longest sequence that the model is the same function for."""
        if isinstance(self.rope_scaling, LongRope):
            return min(self.max_position_embeddings, self.rope_scaling.original_max_position_embeddings)
        return self.max_position_embeddings

    @property
    def ropes(self) -> tuple[tuple[float, RopeScaling], ...]:
        """Base and scaling of each rotary embedding that layers have: of all, or of those without and with a window."""
        full = (self.rope_theta, self.rope_scaling)
        return (full,) if self.sliding_rope_theta is None else (full, (self.sliding_rope_theta, None))

    def window(self, layer: int) -> int | None:
        """How many positions back a layer sees."""
        return None if layer in self.full_attention_layers else self.sliding_window

    def rope(self, layer: int) -> int | None:
        """Which of `ropes` a layer has; `None` if nothing turns."""
        if layer in self.no_rope_layers:
            return None
        return 0 if self.sliding_rope_theta is None or self.window(layer) is None else 1
