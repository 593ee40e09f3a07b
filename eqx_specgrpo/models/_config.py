"""The shape of a decoder-only transformer, in words of our own; `_hf_config.py` translates `config.json` to and fro."""

import dataclasses


@dataclasses.dataclass(frozen=True)
class LinearRope:
    """Positions divided by `factor` (Chen et al. 2023, position interpolation)."""

    factor: float


@dataclasses.dataclass(frozen=True)
class Llama3Rope:
    """Llama 3.1's scaling: low frequencies divided by `factor`, high ones kept, the band between interpolated."""

    factor: float
    low_freq_factor: float
    high_freq_factor: float
    original_max_position_embeddings: int


RopeScaling = LinearRope | Llama3Rope | None


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

    def __post_init__(self):
        if self.num_heads % self.num_kv_heads != 0:
            raise ValueError(
                f"num_heads ({self.num_heads}) must be a multiple of num_kv_heads ({self.num_kv_heads}): each "
                "key/value head serves an equal group of query heads"
            )
        if self.head_dim % 2 != 0:
            raise ValueError(f"head_dim ({self.head_dim}) must be even: rotary embedding turns pairs of dimensions")
