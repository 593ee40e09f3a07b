import json

import jax.random as jr
import pytest
import tokenizers
from tokenizers import decoders, models, pre_tokenizers, processors, trainers
from transformers import AutoTokenizer

from eqx_specgrpo.errors import CheckpointError, UserError
from eqx_specgrpo.models import (
    CheckpointWarning,
    Tokenizer,
    Transformer,
    TransformerConfig,
    check_tokenizer,
    load_pretrained,
    load_tokenizer,
    save_model,
)

SPECIAL = ["<pad>", "<s>", "</s>", "<|end|>"]
CHAT = [
    {"role": "system", "content": " Be <brief> & 'kind'. "},
    {"role": "user", "content": "1 + 1?"},
    {"role": "assistant", "content": "2"},
    {"role": "user", "content": "naïve é"},
]
TEMPLATES = {
    "chatml": (
        "{% for m in messages %}\n"
        "    {% if m['role'] not in ['system', 'user', 'assistant'] %}\n"
        "{{ raise_exception('no role ' + m['role']) }}{% endif %}\n"
        "<s>{{ m['role'] }}: {{ m['content'] | trim }}<|end|>\n"
        "{% endfor %}\n"
        "{% if add_generation_prompt %}assistant: {% endif %}"
    ),
    "controls": (
        "{{- bos_token }}{% set ns = namespace(seen=0) %}{% for m in messages %}"
        "{% if m.role == 'system' %}{% continue %}{% endif %}{% set ns.seen = ns.seen + 1 %}"
        "{{ loop.index }}/{{ ns.seen }} {{ m | tojson }}{{ m | tojson(indent=2) }}"
        "{% if ns.seen == 2 %}{% break %}{% endif %}"
        "{% endfor %}{{ eos_token }}{{ unk_token is defined }}{{ tools is none }}{{ documents is none }}"
    ),
    "generation": (
        "{%- for m in messages -%}[{{ m.role }}] {% if m.role == 'assistant' %}"
        "{% generation %}{{ m.content }}{{ eos_token }}{% endgeneration %}"
        "{% else %}{{ m.content }}{% endif %}{%- endfor -%}{{ strftime_now('%Y') }}"
    ),
}


@pytest.fixture(scope="module")
def backend():
    backend = tokenizers.Tokenizer(models.BPE())
    backend.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    backend.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=300,
        special_tokens=SPECIAL,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    backend.train_from_iterator(["user: what is 1 + 1? assistant: 2", "system: be brief and kind"] * 3, trainer)
    backend.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return backend.to_str()


def _tokenizer(backend, template=None, eos_ids=()) -> Tokenizer:
    # One of them as transformers 4 wrote it.
    eos = {"__type": "AddedToken", "content": "</s>", "lstrip": False, "rstrip": False, "normalized": False}
    settings = {"bos_token": "<s>", "eos_token": eos, "pad_token": "<pad>"}
    return Tokenizer(tokenizers.Tokenizer.from_str(backend), settings, template, eos_ids)


@pytest.mark.parametrize("template", TEMPLATES)
def test_templates_like_transformers(backend, template, tmp_path):
    tokenizer = _tokenizer(backend, TEMPLATES[template])
    tokenizer.save(tmp_path)
    theirs, again = AutoTokenizer.from_pretrained(tmp_path), load_tokenizer(tmp_path)
    for prompt in (CHAT, CHAT[1:2]):
        for generation in (True, False):
            text = theirs.apply_chat_template(prompt, add_generation_prompt=generation, tokenize=False)
            assert tokenizer.apply_chat_template(prompt, add_generation_prompt=generation) == text
            assert again.apply_chat_template(prompt, add_generation_prompt=generation) == text
        ids = theirs.apply_chat_template(prompt, add_generation_prompt=True, return_dict=False)
        assert tokenizer.encode_prompt(prompt) == again.encode_prompt(prompt) == ids


def test_variables_of_a_template_like_transformers(backend, tmp_path):
    """Qwen3's switch for thinking, for one."""
    template = (
        "{% for m in messages %}{{ m.content }}{% endfor %}{% if add_generation_prompt %}A:"
        "{% if enable_thinking is defined and enable_thinking is false %}<think></think>{% endif %}{% endif %}"
        "{{ strftime_now('%Y') if year is defined }}"
    )
    tokenizer = _tokenizer(backend, template)
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    quick = tokenizer.with_chat_template_kwargs({"enable_thinking": False})
    text = theirs.apply_chat_template(CHAT[1:2], add_generation_prompt=True, tokenize=False, enable_thinking=False)
    assert quick.apply_chat_template(CHAT[1:2]) == text == "1 + 1?A:<think></think>"
    assert (
        tokenizer.apply_chat_template(CHAT[1:2]) == "1 + 1?A:" and tokenizer.with_chat_template_kwargs({}) is tokenizer
    )
    assert quick.encode_prompt("1") == tokenizer.encode_prompt("1") and quick.eos_ids == tokenizer.eos_ids
    both = quick.with_chat_template_kwargs({"year": 1})
    assert both.chat_template_kwargs == {"enable_thinking": False, "year": 1}
    for name in ("enable_thinkin", "messages"):
        with pytest.raises(UserError, match=f"has '{name}', but this .* asks for enable_thinking, year"):
            tokenizer.with_chat_template_kwargs({name: False})
    with pytest.raises(UserError, match="this tokenizer has none: leave them out"):
        _tokenizer(backend).with_chat_template_kwargs({"enable_thinking": False})


def test_plain_text_like_transformers(backend, tmp_path):
    # Padding and truncation belong to whoever trained the tokenizer.
    values = json.loads(backend)
    values["truncation"] = {"max_length": 4, "stride": 0, "strategy": "LongestFirst", "direction": "Right"}
    values["padding"] = {
        "strategy": {"Fixed": 50},
        "direction": "Right",
        "pad_to_multiple_of": None,
        "pad_id": 0,
        "pad_type_id": 0,
        "pad_token": "<pad>",
    }
    tokenizer = _tokenizer(json.dumps(values))
    tokenizer.save(tmp_path)
    theirs = AutoTokenizer.from_pretrained(tmp_path)
    text = "user: what is naïve </s> 日本\n  1?"
    ids = tokenizer.encode_prompt(text)
    assert ids == theirs(text)["input_ids"]
    assert ids[0] == 1 and 2 in ids  # BOS by the post-processor; a special token in the text is itself.
    assert tokenizer.encode(text, add_special_tokens=False) == ids[1:]
    assert tokenizer.decode(ids, skip_special_tokens=False) == "<s>" + text
    assert tokenizer.decode(ids) == text.replace("</s>", "")


def test_ids(backend, tmp_path):
    tokenizer = _tokenizer(backend)
    assert (tokenizer.eos_ids, tokenizer.pad_id, tokenizer.bos_token) == ((2,), 0, "<s>")
    tokenizer.save(tmp_path)
    (tmp_path / "generation_config.json").write_text(json.dumps({"eos_token_id": [3, 2], "temperature": 0.6}))
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": 4}))
    loaded = load_tokenizer(tmp_path)
    assert sorted(loaded.eos_ids) == [2, 3, 4]
    loaded.save(tmp_path)
    generation = json.loads((tmp_path / "generation_config.json").read_text())
    assert generation["temperature"] == 0.6 and sorted(generation["eos_token_id"]) == [2, 3, 4]
    (tmp_path / "config.json").write_text(json.dumps({"eos_token_id": "x"}))
    with pytest.raises(CheckpointError, match="eos_token_id is 'x'"):
        load_tokenizer(tmp_path)


def test_older_template_places(backend, tmp_path):
    tokenizer = _tokenizer(backend)
    tokenizer.save(tmp_path)
    settings = json.loads((tmp_path / "tokenizer_config.json").read_text())
    for template in ("T{{ messages[0].content }}", [{"name": "default", "template": "T{{ messages[0].content }}"}]):
        (tmp_path / "tokenizer_config.json").write_text(json.dumps({**settings, "chat_template": template}))
        assert load_tokenizer(tmp_path).apply_chat_template([{"role": "user", "content": "x"}]) == "Tx"


@pytest.mark.parametrize(
    "template, word",
    [
        ("{{ raise_exception('roles must alternate') }}", "roles must alternate"),
        ("{% for %}", "line 1"),
        ("{{ messages[0].content + 1 }}", "TypeError"),
        ("{{ messages[7].content }}", "no element 7"),
        # The sandbox: no way to Python's internals, and no changes to what it is given.
        ("{{ ''.__class__.__mro__[1].__subclasses__() }}", "unsafe"),
        ("{{ messages.append(1) }}", "unsafe"),
        ("{{ messages[0].update({'role': 'x'}) }}", "unsafe"),
    ],
)
def test_failing_templates(backend, template, word):
    prompt = [{"role": "user", "content": "x"}]
    with pytest.raises(UserError, match="chat template") as caught:
        _tokenizer(backend, template).encode_prompt(prompt)
    assert word in str(caught.value)
    assert prompt == [{"role": "user", "content": "x"}]


def test_bad_messages(backend):
    with pytest.raises(UserError, match="no chat template"):
        _tokenizer(backend).encode_prompt(CHAT)
    for bad in ({"content": "x"}, {"role": 3}, {}):
        with pytest.raises(UserError, match="message 1 of the prompt"):
            _tokenizer(backend, TEMPLATES["chatml"]).encode_prompt([CHAT[0], bad])


def test_bad_folders(backend, tmp_path):
    with pytest.raises(CheckpointError, match=r"no tokenizer \(tokenizer.json\)"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.model").touch()
    with pytest.raises(CheckpointError, match="only tokenizer.model"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(backend[:-50])
    with pytest.raises(CheckpointError, match="tokenizer.json can't be read"):
        load_tokenizer(tmp_path)
    (tmp_path / "tokenizer.json").write_text(backend)
    (tmp_path / "tokenizer_config.json").write_text(json.dumps({"eos_token": "<nope>"}))
    with pytest.raises(CheckpointError, match="eos_token is '<nope>'"):
        load_tokenizer(tmp_path)


def _beside(folder, **files):
    """A tokenizer's folder with files changed: objects are merged into what is there."""
    for name, values in files.items():
        path = folder / f"{name}.json"
        old = json.loads(path.read_text()) if path.is_file() and name == "tokenizer_config" else {}
        path.write_text(json.dumps({**old, **values}))


def _added(content, **options):
    flags = {"lstrip": False, "rstrip": False, "single_word": False, "normalized": False, "special": False}
    return {"content": content, **flags, **options}


_TOKENS_BESIDE = {
    "added_tokens_decoder": dict(tokenizer_config={"added_tokens_decoder": {"297": _added("<think>")}}),
    "two, with options": dict(
        tokenizer_config={
            "added_tokens_decoder": {"298": _added("<b>", special=True), "297": _added("<think>", lstrip=True)}
        }
    ),
    "other options": dict(
        tokenizer_config={"added_tokens_decoder": {"3": _added("<|end|>", lstrip=True, special=True)}}
    ),
    "added_tokens.json": dict(added_tokens={"<think>": 297}),
    "additional_special_tokens": dict(tokenizer_config={"additional_special_tokens": ["<think>"]}),
    "extra_special_tokens": dict(tokenizer_config={"extra_special_tokens": ["<think>", "<b>"]}),
    "by name": dict(tokenizer_config={"image_token": "<think>", "extra_special_tokens": {"boi_token": "<b>"}}),
    "special_tokens_map.json": dict(
        special_tokens_map={"additional_special_tokens": ["<think>"], "eos_token": _added("<|end|>")}
    ),
    "the map where it does not count": dict(
        tokenizer_config={"added_tokens_decoder": {}}, special_tokens_map={"eos_token": "<|end|>", "sep_token": "<b>"}
    ),
    "a word of the vocabulary": dict(tokenizer_config={"sep_token": "what", "mask_token": "<think>"}),
    "split": dict(tokenizer_config={"split_special_tokens": True}),
    "all at once": dict(
        tokenizer_config={"sep_token": "<b>", "additional_special_tokens": ["<think>", "<c>"]},
        added_tokens={"<think>": 297, "<d>": 298},
    ),
}


@pytest.mark.parametrize("case", _TOKENS_BESIDE)
def test_tokens_beside_tokenizer_json_like_transformers(case, backend, tmp_path):
    _tokenizer(backend, TEMPLATES["controls"] + "{{ image_token }}{{ boi_token }}{{ sep_token }}").save(tmp_path)
    _beside(tmp_path, **_TOKENS_BESIDE[case])
    ours, theirs = load_tokenizer(tmp_path), AutoTokenizer.from_pretrained(tmp_path)
    ours.save(tmp_path / "saved")
    again = load_tokenizer(tmp_path / "saved")
    for text in ("x<think>y", "what <think>  is</s> <b><c><d>", "a <|end|> b", "unlike what"):
        ids = ours.encode(text)
        assert ids == theirs(text)["input_ids"] == again.encode(text)
        for skip in (True, False):
            assert ours.decode(ids, skip_special_tokens=skip) == theirs.decode(ids, skip_special_tokens=skip)
    assert theirs.eos_token_id in ours.eos_ids
    assert ours.apply_chat_template(CHAT) == theirs.apply_chat_template(
        CHAT, add_generation_prompt=True, tokenize=False
    )


@pytest.mark.parametrize(
    "files, words",
    [
        # What transformers does without a word: another id than the one stated.
        (dict(tokenizer_config={"added_tokens_decoder": {"305": _added("<think>")}}), ["'<think>'", "305", "297"]),
        (dict(tokenizer_config={"added_tokens_decoder": {"1": _added("</s>")}}), ["'</s>'", "id 1", "2"]),
        (dict(added_tokens={"<think>": 296}), ["added_tokens.json", "296", "297"]),
        (
            dict(tokenizer_config={"added_tokens_decoder": {}}, added_tokens={"<think>": 297}),
            ["added_tokens.json", "'<think>'", "None"],
        ),
        (dict(tokenizer_config={"added_tokens_decoder": {"297": 7}}), ["added_tokens_decoder", "7"]),
        (dict(tokenizer_config={"added_tokens_decoder": {"297": _added("x", color=1)}}), ["unknown options", "color"]),
        (dict(tokenizer_config={"added_tokens_decoder": ["x"]}), ["object from ids to tokens"]),
        (dict(tokenizer_config={"extra_special_tokens": "x"}), ["extra_special_tokens", "list"]),
        (dict(added_tokens={"<think>": "297"}), ["added_tokens.json", "from tokens to ids"]),
        (dict(tokenizer_config={"pad_token": "[PAD]"}), ["pad_token is '[PAD]'", "not in its vocabulary"]),
        (dict(tokenizer_config={"auto_map": {"AutoTokenizer": ["x.Y", None]}}), ["auto_map", "never run"]),
        (dict(tokenizer_config={"do_lower_case": True}), ["do_lower_case"]),
        (dict(tokenizer_config={"fix_mistral_regex": True}), ["fix_mistral_regex"]),
    ],
)
def test_tokenizer_files_that_contradict(files, words, backend, tmp_path):
    _tokenizer(backend).save(tmp_path)
    _beside(tmp_path, **files)
    with pytest.raises(CheckpointError) as caught:
        load_tokenizer(tmp_path)
    for word in words:
        assert word in str(caught.value)


def test_tokenizers_that_are_not_what_they_say(backend, tmp_path):
    _tokenizer(backend).save(tmp_path)
    _beside(tmp_path, tokenizer_config={"add_prefix_space": True, "new_key": 3, "new_flag": False, "nothing": None})
    with pytest.warns(CheckpointWarning) as caught:
        load_tokenizer(tmp_path)
    about_key, about_space = [str(warning.message) for warning in caught]
    assert "'new_key' (3)" in about_key and "new_flag" not in about_key and "nothing" not in about_key
    assert "add_prefix_space is true" in about_space and "puts no space" in about_space

    values = json.loads(backend)
    values["model"]["dropout"] = 0.1
    (tmp_path / "tokenizer.json").write_text(json.dumps(values))
    with pytest.raises(CheckpointError, match="dropout is 0.1"):
        load_tokenizer(tmp_path)


def test_pairs_that_do_not_fit(backend, tmp_path):
    tokenizer = _tokenizer(backend)

    def model(vocab):
        return Transformer(TransformerConfig(vocab, 8, 8, 1, 2, 2, 4, 16), key=jr.key(0))

    small, big = model(tokenizer.vocab_size - 1), model(tokenizer.vocab_size + 5)
    check_tokenizer(big, tokenizer)
    with pytest.raises(UserError, match="ids up to 296.* 296 entries, none for 'Ġassistant'"):
        check_tokenizer(small, tokenizer)
    with pytest.raises(UserError, match="end-of-sequence id 999"):
        check_tokenizer(big, _tokenizer(backend, eos_ids=[999]))
    save_model(big, tmp_path / "m", tokenizer, source=None)
    loaded, again = load_pretrained(tmp_path / "m")
    assert again.eos_ids == tokenizer.eos_ids and again.encode("kind") == tokenizer.encode("kind")
    save_model(small, tmp_path / "n")
    tokenizer.save(tmp_path / "n")
    with pytest.raises(UserError, match="do not belong together"):
        load_pretrained(tmp_path / "n")


def test_sampling_defaults_are_kept(backend, tmp_path):
    tokenizer = _tokenizer(backend, TEMPLATES["chatml"])
    model = Transformer(TransformerConfig(400, 8, 8, 1, 2, 2, 4, 16), key=jr.key(0))
    source = tmp_path / "source"
    source.mkdir()
    (source / "generation_config.json").write_text(json.dumps({"temperature": 0.6, "eos_token_id": 9}))
    save_model(model, tmp_path / "m", tokenizer, source=source)
    values = json.loads((tmp_path / "m" / "generation_config.json").read_text())
    assert values["temperature"] == 0.6 and values["eos_token_id"] == 2
