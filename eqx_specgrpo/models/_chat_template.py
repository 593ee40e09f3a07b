"""Chat templates: Jinja text from a checkpoint, rendered the way transformers renders it.

A template comes from whoever made the checkpoint, so it runs in Jinja's immutable sandbox: it sees the messages and a
few harmless functions, and can change nothing.
"""

import datetime
import json
from collections.abc import Mapping, Sequence
from typing import Any

import jinja2
import jinja2.ext
import jinja2.meta
import jinja2.nodes
import jinja2.sandbox

from .._types import Message
from ..errors import UserError


class _GenerationBlock(jinja2.ext.Extension):
    """`{% generation %}...{% endgeneration %}` marks the assistant's own words for training; it prints its body."""

    tags = {"generation"}

    def parse(self, parser):
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return jinja2.nodes.Scope(body).set_lineno(line)


def _raise_exception(message: str):
    raise jinja2.TemplateError(message)


def _strftime_now(format: str) -> str:
    return datetime.datetime.now().strftime(format)


def _tojson(value: Any, ensure_ascii=False, indent=None, separators=None, sort_keys=False) -> str:
    # Jinja's own filter escapes HTML, which no tokenizer expects.
    return json.dumps(value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys)


def _environment() -> jinja2.sandbox.ImmutableSandboxedEnvironment:
    environment = jinja2.sandbox.ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[jinja2.ext.loopcontrols, _GenerationBlock]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    return environment


def template_variables(template: str) -> set[str]:
    """What a template may be told, besides the messages and whose turn is next; nothing, of one that is no Jinja."""
    environment = _environment()
    try:
        named = jinja2.meta.find_undeclared_variables(environment.parse(template))
    except jinja2.TemplateError:
        return set()  # whoever renders it says what is wrong
    return named - {"messages", "add_generation_prompt", *environment.globals}


def render_chat(
    template: str, messages: Sequence[Message], variables: Mapping[str, Any], *, add_generation_prompt: bool
) -> str:
    """The text of a conversation.

    **Arguments:**

    - `template`: Jinja source.
    - `messages`: `{"role": ..., "content": ...}` objects.
    - `variables`: `bos_token` and the like, by the names that templates use, and what else a template is told.
    - `add_generation_prompt`: end with the opening of the assistant's next turn.

    **Raises:**

    `UserError` if a message has no role, or if the template is invalid or rejects the conversation.
    """
    for index, message in enumerate(messages):
        if not isinstance(message, dict) or not isinstance(message.get("role"), str):
            raise UserError(
                f"message {index} of the prompt is {message!r}; it must be an object with a 'role' and a 'content', "
                'like {"role": "user", "content": "..."}'
            )
    try:
        return (
            _environment()
            .from_string(template)
            .render(
                {"tools": None, "documents": None}
                | dict(variables)
                | {"messages": list(messages), "add_generation_prompt": add_generation_prompt}
            )
        )
    except jinja2.TemplateError as error:
        where = f" (line {error.lineno})" if isinstance(error, jinja2.TemplateSyntaxError) else ""
        raise UserError(
            f"the chat template of this tokenizer failed{where}: {error.message or type(error).__name__}. Check the "
            "roles and their order in the prompt, or give plain text instead of messages"
        ) from error
    except (TypeError, ValueError, KeyError, AttributeError, ArithmeticError, LookupError, RecursionError) as error:
        raise UserError(
            f"the chat template of this tokenizer failed: {type(error).__name__}: {error}. Check that every message "
            "has the fields that the template uses, or give plain text instead of messages"
        ) from error
