from ._base import AbstractLanguageModel as AbstractLanguageModel, Features as Features
from ._cache import (
    AbstractLayerCache as AbstractLayerCache,
    Cache as Cache,
    KVCache as KVCache,
    take_rows as take_rows,
)
from ._checkpoint import (
    load_model as load_model,
    load_pretrained as load_pretrained,
    load_tokenizer as load_tokenizer,
    save_model as save_model,
)
from ._config import LinearRope as LinearRope, Llama3Rope as Llama3Rope, TransformerConfig as TransformerConfig
from ._dtype import default_cache_dtype as default_cache_dtype, matrix_dtype as matrix_dtype
from ._linear import Linear as Linear, matmul as matmul
from ._locate import could_be_downloaded as could_be_downloaded, locate as locate
from ._norm import RMSNorm as RMSNorm, rms_normalize as rms_normalize
from ._prefix import NoCache as NoCache, PrefixCache as PrefixCache, PrefixPass as PrefixPass
from ._rope import rope_frequencies as rope_frequencies, rope_table as rope_table
from ._shared_prompt import SharedPromptCache as SharedPromptCache
from ._tokenizer import Tokenizer as Tokenizer, check_tokenizer as check_tokenizer
from ._transformer import (
    Block as Block,
    RopeTable as RopeTable,
    Transformer as Transformer,
    cast_weights as cast_weights,
    sequence_features as sequence_features,
)
