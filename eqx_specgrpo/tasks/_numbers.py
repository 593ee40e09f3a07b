"""Numbers in prose: exact, and without mistaking part of a number for the number."""

import re
from decimal import Decimal, InvalidOperation
from typing import NamedTuple

# A maximal run is taken first and judged as a whole afterwards, so that "1.2.3" or "27.5" never yields a "3" or a "5".
_RUN = re.compile(r"(?:(?<![\w.,])\.)?[0-9](?:[0-9]|[.,](?=[0-9]))*(?:[eE][+-]?[0-9]+)?")
_PLAIN = re.compile(r"(?:[0-9]+|[0-9]{1,3}(?:,[0-9]{3})+)?(?:\.[0-9]+)?(?:[eE][+-]?[0-9]+)?")
_OPERATION = re.compile(r" *(?:[-+*/\u00d7\u00f7]|\\times) *[-$(]*[0-9]")
_SIGNED_ALONE = re.compile(r"\s*[+-]?\s*(.+?)\s*")


class Number(NamedTuple):
    """A number in a text.

    **Arguments:**

    - `value`: exact; `None` for a run of digits that isn't a number, such as "1.2.3".
    - `is_result`: whether it may be the outcome of something; `False` for an operand (an operator stands before it, or
        after it without an equals sign before) and for what directly follows another number (an entry of a list).
    """

    value: Decimal | None
    is_result: bool


def _value(digits: str, negative: bool) -> Decimal | None:
    if not _PLAIN.fullmatch(digits):
        return None
    try:
        value = Decimal(digits.replace(",", ""))
    except InvalidOperation:  # an exponent beyond all bounds
        return None
    return value.copy_negate() if negative else value  # unlike "-", never rounds


def _is_negative(before: str) -> bool:
    """Whether the text before the digits ends in a sign, rather than in an operator or a hyphen."""
    body = before.rstrip(" ")
    if not body.endswith("-"):
        return False
    glued = body == before
    previous = body[:-1].rstrip(" ")
    if previous == "":
        return glued
    if previous[-1].isdigit() or previous[-1] in ")]}%":  # "12-3", "12 - 3", "5 -3": an operator
        return False
    if previous[-1] == "=":  # "= - 3" as well as "= -3"
        return True
    return glued and not (body[:-1] == previous and previous[-1].isalpha())  # "step-3": a hyphen


def _is_result(before: str, after: str) -> bool:
    context = before.replace("**", "").rstrip()  # Markdown's bold is no operator
    if context.endswith("-") and _is_negative(before):
        context = context[:-1].rstrip()
    context = context.removesuffix("$").rstrip()
    if context.endswith(("+", "-", "*", "/", "\u00d7", "\u00f7", "\\times")):
        return False
    if _OPERATION.match(after.replace("**", "")) and not context.endswith("="):  # "1 + 2 = 3 + 4 = 7" states the 3
        return False
    return not re.search(r"[0-9]\s*[,;]?$", context)


def find_numbers(text: str) -> list[Number]:
    """All numbers of a text, in order.

    A minus sign belongs to the number unless it is an operator ("12-3", "12 - 3") or a hyphen ("step-3"). Commas may
    separate thousands ("1,234"); other commas separate numbers ("1,23"). Decimals and exponents are part of the number.

    **Arguments:**

    - `text`: any text.

    **Returns:**

    A list of named tuples `(value: Decimal | None, is_result: bool)`: `value` is `None` for a run of digits that isn't
    a number ("1.2.3"); `is_result` is `False` for an operand or an entry of a list.
    """
    text = text.replace("\u2212", "-")
    numbers = []
    for match in _RUN.finditer(text):
        run, before = match.group(), text[max(0, match.start() - 64) : match.start()]
        after = text[match.end() : match.end() + 64]
        negative, is_result = _is_negative(before), _is_result(before, after)
        if "," in run and not _PLAIN.fullmatch(run):
            for position, part in enumerate(run.split(",")):
                numbers.append(Number(_value(part, negative and position == 0), is_result and position == 0))
        else:
            numbers.append(Number(_value(run, negative), is_result))
    return numbers


def last_number(text: str) -> Decimal | None:
    """The last number of a text; `None` if there is none, or if the last run of digits isn't a number."""
    numbers = find_numbers(text)
    return numbers[-1].value if numbers else None


def parse_number(value: object) -> Decimal | None:
    """The number that a value is as a whole, or `None` if it isn't one."""
    text = str(value).strip().replace("\u2212", "-")
    match = _SIGNED_ALONE.fullmatch(text)
    return _value(match.group(1), text.startswith("-")) if match else None
