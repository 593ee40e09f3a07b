from ._adapted_linear import AdaptedLinear as AdaptedLinear, LowRank as LowRank
from ._adapter_files import (
    describe_adapter as describe_adapter,
    load_adapter as load_adapter,
    save_adapter as save_adapter,
)
from ._base import (
    AbstractLanguageModel as AbstractLanguageModel,
    Features as Features,
    caches_can_grow as caches_can_grow,
)
from ._cache import (
    AbstractLayerCache as AbstractLayerCache,
    Cache as Cache,
    KVCache as KVCache,
    take_rows as take_rows,
)
from ._checkpoint import (
    load_model as load_model,
    load_model_config as load_model_config,
    load_pretrained as load_pretrained,
    load_tokenizer as load_tokenizer,
    save_model as save_model,
)
from ._checkpoint_keys import CHECKPOINT_KEYS as CHECKPOINT_KEYS
from ._config import (
    DynamicRope as DynamicRope,
    LinearRope as LinearRope,
    Llama3Rope as Llama3Rope,
    LongRope as LongRope,
    RopeScaling as RopeScaling,
    TransformerConfig as TransformerConfig,
    YarnRope as YarnRope,
)
from ._dtype import default_cache_dtype as default_cache_dtype, matrix_dtype as matrix_dtype
from ._keys import CheckpointWarning as CheckpointWarning, KeyRule as KeyRule
from ._linear import AbstractLinear as AbstractLinear, Linear as Linear, matmul as matmul
from ._locate import could_be_downloaded as could_be_downloaded, locate as locate
from ._lora import (
    ALL_LINEAR as ALL_LINEAR,
    AdaptedTransformer as AdaptedTransformer,
    Adapters as Adapters,
    adapted_layers as adapted_layers,
    are_factors as are_factors,
    with_low_rank_gradients as with_low_rank_gradients,
)
from ._norm import RMSNorm as RMSNorm, rms_normalize as rms_normalize
from ._platform import Platform as Platform, platform_of as platform_of
from ._prefix import NoCache as NoCache, PrefixCache as PrefixCache, PrefixPass as PrefixPass
from ._program import Program as Program
from ._prompt_pass import fill_cache as fill_cache
from ._rope import (
    RopeTable as RopeTable,
    rope_frequencies as rope_frequencies,
    rope_table as rope_table,
    rope_tables as rope_tables,
)
from ._sequence_attention import attend_with_normalizers as attend_with_normalizers
from ._shared_prompt import SharedPromptCache as SharedPromptCache
from ._tokenizer import Tokenizer as Tokenizer, check_tokenizer as check_tokenizer
from ._transformer import (
    Block as Block,
    Transformer as Transformer,
    cast_weights as cast_weights,
    sequence_features as sequence_features,
    with_grouped_outputs as with_grouped_outputs,
)
