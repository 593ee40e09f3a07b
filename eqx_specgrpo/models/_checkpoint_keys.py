"""All tables of keys, by what they are of: what the documentation and the tests go through."""

from ._config_keys import CONFIG_KEYS, FOLDER_FILES, GENERATION_KEYS, ROPE_KEYS
from ._gguf_keys import GGUF_KEYS
from ._tokenizer_keys import TOKENIZER_JSON_KEYS, TOKENIZER_KEYS

CHECKPOINT_KEYS = {
    "Files of a folder": FOLDER_FILES,
    "`config.json`": CONFIG_KEYS,
    "`rope_parameters` and `rope_scaling` in `config.json`, by type of rope": ROPE_KEYS,
    "`generation_config.json`": GENERATION_KEYS,
    "`tokenizer_config.json` and `special_tokens_map.json`": TOKENIZER_KEYS,
    "`tokenizer.json`": TOKENIZER_JSON_KEYS,
    "Metadata of `.gguf` files": GGUF_KEYS,
}
