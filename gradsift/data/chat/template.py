"""The template text of a tokenizer, ready to use: its own, the user's, or the default one."""

from __future__ import annotations

from typing import Any

from jinja2 import TemplateError

from gradsift.errors import UserError

# For tokenizers without a template. Role names are plain text, since such a tokenizer has no tokens
# for them.
DEFAULT_TEMPLATE = (
    "{% if tools %}{{ '<|tools|>\\n' + (tools | tojson) + '\\n' }}{% endif %}{% for m in messages"
    " %}{{ '<|' + m['role'] + '|>\\n' + m['content'] + ((m['tool_calls'] | tojson) if"
    " m['tool_calls'] else '') }}{% if m['role'] == 'assistant' %}{{ eos_token or '' }}{% endif"
    " %}{{ '\\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|assistant|>\\n' }}{% endif %}"
)
FIXED_DAY = {
    "%d %b %Y": "26 Jul 2024",
    "%Y-%m-%d": "2024-07-26",
    "%B %d, %Y": "July 26, 2024",
    "%d %B %Y": "26 July 2024",
}


def chat_template(tokenizer: Any, template: str | None, tools: bool = False) -> str:
    """The template text used: `template`, else the tokenizer's own (its tool_use one for rows with
    tools), else the default one.

    A call of `strftime_now` gives a fixed day. Raises UserError when the text is no template or no
    default can be told.
    """
    if template is None and not tokenizer.chat_template:
        text = ("{{ bos_token }}" if adds_bos(tokenizer) else "") + DEFAULT_TEMPLATE
    else:
        try:
            text = tokenizer.get_chat_template(template, tools=[{}] if tools else None)
        except ValueError as error:
            remedy = "Give one with the setting encode.template."
            raise UserError(
                f"no chat template can be chosen ({str(error)[:100]})",
                where=tokenizer.name_or_path,
                remedy=remedy,
            ) from error
    if "strftime_now" in text:
        text = _with_fixed_day(text)
    try:
        tokenizer.apply_chat_template(
            [{"role": "user", "content": "x"}], chat_template=text, tokenize=False
        )
    except TemplateError as error:
        if type(error).__name__ == "TemplateSyntaxError":
            where, remedy = (
                f"line {getattr(error, 'lineno', '?')} of the chat template",
                "Correct the template.",
            )
            raise UserError(f"is not a template: {error}", where=where, remedy=remedy) from error
    except Exception:  # a template may want more than one turn
        pass
    return text


def _with_fixed_day(text: str) -> str:
    days = "".join(f"{{% elif f == {form!r} %}}{day}" for form, day in FIXED_DAY.items())
    # The empty expression keeps the template's own first new line, which a block tag would swallow.
    return (
        "{% macro strftime_now(f) %}{% if false %}"
        + days
        + "{% else %}2024-07-26{% endif %}{% endmacro %}{{ '' }}"
        + text
    )


def adds_bos(tokenizer: Any) -> bool:
    """Whether the tokenizer puts a beginning-of-sequence token in front of plain text."""
    bos = tokenizer.bos_token_id
    return bos is not None and tokenizer("a").input_ids[:1] == [bos]
