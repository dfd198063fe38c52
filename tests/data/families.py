"""Small chat templates in the manner of the model families, of our own writing: each has its
family's markers and its ways with calls, results, reasoning and ends of turn.
"""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True)
class Family:
    """header: what stands in front of whatever the assistant writes. ends: what its turns may end
    with. foreign: headers of other roles, never to be learned. again: whether the model itself may
    write its header once more within a turn.
    """

    template: str
    header: tuple[str, ...]
    ends: tuple[str, ...]
    foreign: tuple[str, ...]
    again: bool = False


def chatml(body: str, prompt: str = "<|im_start|>assistant\\n", before: str = "") -> Family:
    """ChatML around `body`, which writes an assistant's turn behind its header."""
    template = (
        before
        + "{%- for m in messages %}{%- if m.role == 'assistant' %}{{- '<|im_start|>assistant\\n' }}"
        + body
        + "{{- '<|im_end|>\\n' }}{%- elif m.role == 'tool' %}"
        "{{- '<|im_start|>user\\n<tool_response>\\n' + m.content + "
        "'\\n</tool_response><|im_end|>\\n' }}"
        "{%- else %}{{- '<|im_start|>' + m.role + '\\n' + m.content + '<|im_end|>\\n' }}"
        "{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '" + prompt + "' }}{%- endif %}"
    )
    foreign = tuple(f"<|im_start|>{role}" for role in ("user", "system", "tool"))
    header = ("<|im_start|>assistant\n", prompt.replace("\\n", "\n"))
    return Family(template, header, ("<|im_end|>",), foreign)


HERMES_TOOLS = (
    "{%- if tools %}{{- '<|im_start|>system\\n# Tools\\n' }}{%- for t in tools %}{{- t | tojson }}"
    "{{- '\\n' }}{%- endfor %}{{- '<|im_end|>\\n' }}{%- endif %}"
)
HERMES_CALLS = (
    "{%- for c in m.tool_calls or [] %}{%- set f = c.function or c %}"
    '{{- \'<tool_call>\\n{"name": "\' + f.name + \'", "arguments": \' }}{{- f.arguments | tojson }}'
    "{{- '}\\n</tool_call>' }}{%- endfor %}"
)
# Reasoning from its field or from the content, as `r`; the rest of the content as `c`.
SPLIT = (
    "{%- set c = m.content or '' %}{%- set r = m.reasoning_content or '' %}"
    "{%- if not r and '</think>' in c %}"
    "{%- set r = c.split('</think>')[0].split('<think>')[-1].strip('\\n') %}"
    "{%- set c = c.split('</think>')[-1].lstrip('\\n') %}{%- endif %}"
)
LAST_QUERY = (
    "{%- set ns = namespace(last=-1) %}{%- for m in messages %}{%- if m.role == 'user' %}"
    "{%- set ns.last = loop.index0 %}{%- endif %}{%- endfor %}"
)

FAMILIES: dict[str, Family] = {
    "chatml": chatml("{{- m.content }}"),
    "hermes": chatml("{{- m.content or '' }}" + HERMES_CALLS, before=HERMES_TOOLS),
    "qwen2.5": chatml(
        "{%- if m.content %}{{- m.content + ('\\n' if m.tool_calls else '') }}{%- endif %}"
        + HERMES_CALLS,
        before=HERMES_TOOLS,
    ),
    "qwen3": chatml(
        SPLIT + "{%- if loop.index0 > ns.last and (loop.last or r) %}"
        "{{- '<think>\\n' + r.strip('\\n') + '\\n</think>\\n\\n' }}{%- endif %}{{- c }}"
        + HERMES_CALLS,
        before=LAST_QUERY + HERMES_TOOLS,
    ),
    "qwen3-instruct": chatml("{{- m.content or '' }}" + HERMES_CALLS, before=HERMES_TOOLS),
    "qwen3.5-think": chatml(
        SPLIT
        + "{%- if loop.index0 > ns.last %}{{- '<think>\\n' + r | trim + '\\n</think>\\n\\n' }}"
        "{%- endif %}{{- c | trim }}" + HERMES_CALLS,
        prompt="<|im_start|>assistant\\n<think>\\n",
        before=LAST_QUERY + HERMES_TOOLS,
    ),
    "qwen3.5-nothink": chatml(
        SPLIT
        + "{%- if loop.index0 > ns.last %}{{- '<think>\\n' + r | trim + '\\n</think>\\n\\n' }}"
        "{%- endif %}{{- c | trim }}" + HERMES_CALLS,
        prompt="<|im_start|>assistant\\n<think>\\n\\n</think>\\n\\n",
        before=LAST_QUERY + HERMES_TOOLS,
    ),
    "qwen3-coder": chatml(
        "{{- m.content or '' }}{%- for c in m.tool_calls or [] %}"
        "{{- '\\n<tool_call>\\n<function=' + c.function.name + '>\\n' }}"
        "{%- for k, v in c.function.arguments | items %}{{- '<parameter=' + k + '>\\n' }}"
        "{{- v if v is string else v | tojson }}{{- '\\n</parameter>\\n' }}{%- endfor %}"
        "{{- '</function>\\n</tool_call>' }}{%- endfor %}",
        before=HERMES_TOOLS,
    ),
    "smollm2": chatml(
        "{{- m.content }}",
        before="{%- if messages[0].role != 'system' %}"
        "{{- '<|im_start|>system\\nYou are helpful<|im_end|>\\n' }}{%- endif %}",
    ),
    "smollm3": chatml(
        "{{- '<think>\\n\\n</think>\\n' }}{{- m.content | string if m.content else '' }}",
        prompt="<|im_start|>assistant\\n<think>\\n\\n</think>\\n",
        before=HERMES_TOOLS,
    ),
    "minicpm": chatml("{{- m.content if loop.last else m.content.split('</think>')[-1] }}"),
    "internlm": chatml(
        "{{- m.content }}{%- if m.tool_calls %}{{- '<|action_start|><|plugin|>\\n' }}"
        "{{- m.tool_calls | tojson }}{{- '<|action_end|>\\n' }}{%- endif %}"
    ),
    "lfm2": chatml(
        "{%- if not loop.last %}{{- m.content.split('</think>')[-1].strip() }}{%- else %}"
        "{{- m.content }}{%- endif %}",
        before="{{- bos_token }}",
    ),
    "nemotron": chatml(
        SPLIT + "{{- '<think>' + r + '</think>' + c }}" + HERMES_CALLS,
        prompt="<|im_start|>assistant\\n<think>\\n",
        before=HERMES_TOOLS,
    ),
    "marked": chatml("{%- generation %}{{- m.content + '<|im_end|>' }}{%- endgeneration %}"),
    "marked-parts": chatml(
        SPLIT
        + "{%- generation %}{%- if r %}{{- '<think>\\n' + r + '\\n</think>\\n\\n' }}{%- endif %}"
        "{%- endgeneration %}{%- generation %}{{- c }}"
        + HERMES_CALLS
        + "{%- endgeneration %}{%- generation %}{{- '<|im_end|>' }}{%- endgeneration %}",
        prompt="<|im_start|>assistant\\n<think>\\n",
        before=HERMES_TOOLS,
    ),
}
for name in ("marked", "marked-parts"):
    # the marks hold the end of turn already
    FAMILIES[name] = Family(
        FAMILIES[name].template.replace(
            "{%- endgeneration %}{{- '<|im_end|>\\n' }}", "{%- endgeneration %}{{- '\\n' }}"
        ),
        *list(vars(FAMILIES[name]).values())[1:],
    )

LLAMA3_OTHERS = tuple(
    f"<|start_header_id|>{role}<|end_header_id|>" for role in ("user", "system", "ipython")
)


def llama3(body: str, before: str = "", end: str = "<|eot_id|>") -> Family:
    template = (
        "{{- bos_token }}" + before + "{%- for m in messages %}{%- if m.role == 'tool' %}"
        "{{- '<|start_header_id|>ipython<|end_header_id|>\\n\\n' + m.content | tojson + "
        "'<|eot_id|>' }}"
        "{%- elif m.role == 'assistant' %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}" + body + "{%- else %}"
        "{{- '<|start_header_id|>' + m.role + '<|end_header_id|>\\n\\n' + m.content | trim }}"
        "{{- '<|eot_id|>' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '<|start_header_id|>assistant<|end_header_id|>\\n\\n' }}{%- endif %}"
    )
    header = "<|start_header_id|>assistant<|end_header_id|>\n\n"
    return Family(template, (header,), (end, "<|eot_id|>", "<|eom_id|>"), LLAMA3_OTHERS)


LLAMA_TOOLS = (
    "{%- if tools %}{{- '<|start_header_id|>system<|end_header_id|>\\n\\n' }}{%- for t in tools %}"
    "{{- t | tojson(indent=4) }}{%- endfor %}{{- '<|eot_id|>' }}{%- endif %}"
)
FAMILIES |= {
    "llama3": llama3("{{- m.content | trim + '<|eot_id|>' }}"),
    # writes the call alone, whatever the content says, and takes one call a turn
    "llama3.1": llama3(
        "{%- if m.tool_calls %}{%- if m.tool_calls | length != 1 %}"
        "{{- raise_exception('This model only supports single tool-calls at once!') }}{%- endif %}"
        "{%- set f = m.tool_calls[0].function %}"
        '{{- \'{"name": "\' + f.name + \'", "parameters": \' }}{{- f.arguments | tojson }}'
        "{{- '}<|eot_id|>' }}{%- else %}{{- m.content | trim + '<|eot_id|>' }}{%- endif %}",
        LLAMA_TOOLS,
    ),
    "llama3.2": llama3(
        "{%- if m.tool_calls %}{{- '[' }}{%- for c in m.tool_calls %}"
        "{{- c.function.name + '(' }}{%- for k, v in c.function.arguments | items %}"
        "{{- k + '=' }}{{- v | tojson }}{{- ', ' if not loop.last }}{%- endfor %}{{- ')' }}"
        "{{- ', ' if not loop.last }}{%- endfor %}{{- ']' }}{%- endif %}"
        "{{- (m.content or '') | trim + '<|eot_id|>' }}",
        LLAMA_TOOLS,
    ),
    "llama2": Family(
        "{%- if messages[0].role == 'system' %}{%- set s = '<<SYS>>\\n' + messages[0].content +"
        " '\\n<</SYS>>\\n\\n' %}{%- set told = messages[1:] %}{%- else %}{%- set s = '' %}"
        "{%- set told = messages %}{%- endif %}{%- for m in told %}"
        "{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
        "{{- raise_exception('Conversation roles must alternate user/assistant/user/...') }}"
        "{%- endif %}{%- if m.role == 'user' %}"
        "{{- bos_token + '[INST] ' + (s if loop.first else '') + m.content + ' [/INST]' }}"
        "{%- else %}{{- ' ' + m.content + ' ' + eos_token }}{%- endif %}{%- endfor %}",
        ("[/INST]",),
        ("</s>",),
        ("[INST]", "<<SYS>>"),
    ),
    "mistral-v1": Family(
        "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{{- '[INST] ' + m.content + ' [/INST]' }}{%- elif m.role == 'assistant' %}"
        "{{- m.content + eos_token }}{%- else %}"
        "{{- raise_exception('Only user and assistant roles are supported!') }}{%- endif %}"
        "{%- endfor %}",
        ("[/INST]", "<s>"),
        ("</s>",),
        ("[INST]",),
    ),
    # tools and the system text stand in the last user turn
    "mistral-v3": Family(
        LAST_QUERY
        + "{{- bos_token }}{%- set s = messages[0].content + '\\n\\n' if messages[0].role =="
        " 'system' else '' %}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{%- if tools and loop.index0 == ns.last %}{{- '[AVAILABLE_TOOLS] ' }}{{- tools | tojson }}"
        "{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}"
        "{{- '[INST] ' + (s if loop.index0 == ns.last else '') + m.content + '[/INST]' }}"
        "{%- elif m.tool_calls %}{{- '[TOOL_CALLS] [' }}{%- for c in m.tool_calls %}"
        "{{- c.function | tojson }}{{- ', ' if not loop.last }}{%- endfor %}{{- ']' + eos_token }}"
        "{%- elif m.role == 'assistant' %}{{- ' ' + m.content | trim + eos_token }}"
        "{%- elif m.role == 'tool' %}"
        "{{- '[TOOL_RESULTS] {\"content\": ' }}{{- m.content }}{{- '}[/TOOL_RESULTS]' }}"
        "{%- endif %}"
        "{%- endfor %}",
        ("[/INST]", "[/TOOL_RESULTS]", "</s>", "<s>"),
        ("</s>",),
        ("[INST]", "[TOOL_RESULTS]", "[AVAILABLE_TOOLS]"),
    ),
    "mistral-v7": Family(
        "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'system' %}"
        "{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}{%- elif m.role == 'user' %}"
        "{%- if tools and loop.index0 <= 1 %}{{- '[AVAILABLE_TOOLS]' }}{{- tools | tojson }}"
        "{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}{{- '[INST]' + m.content + '[/INST]' }}"
        "{%- elif m.role == 'assistant' %}{{- m.content or '' }}{%- if m.tool_calls %}"
        "{{- '[TOOL_CALLS]' }}{{- m.tool_calls | map(attribute='function') | list | tojson }}"
        "{%- endif %}{{- eos_token }}{%- else %}"
        "{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{%- endif %}{%- endfor %}",
        ("[/INST]", "[/TOOL_RESULTS]", "</s>", "[/SYSTEM_PROMPT]", "<s>"),
        ("</s>",),
        ("[INST]", "[TOOL_RESULTS]", "[SYSTEM_PROMPT]"),
    ),
    "mistral-v13": Family(
        "{{- bos_token }}{%- if tools %}{{- '[AVAILABLE_TOOLS]' }}{{- tools | tojson }}"
        "{{- '[/AVAILABLE_TOOLS]' }}{%- endif %}{%- for m in messages %}"
        "{%- if m.role == 'system' %}{{- '[SYSTEM_PROMPT]' + m.content + '[/SYSTEM_PROMPT]' }}"
        "{%- elif m.role == 'user' %}{{- '[INST]' + m.content + '[/INST]' }}"
        "{%- elif m.role == 'assistant' %}{%- if m.reasoning_content %}"
        "{{- '[THINK]' + m.reasoning_content + '[/THINK]' }}{%- endif %}{{- m.content or '' }}"
        "{%- for c in m.tool_calls or [] %}{{- '[TOOL_CALLS]' + c.function.name + '[ARGS]' }}"
        "{{- c.function.arguments | tojson }}{%- endfor %}{{- eos_token }}{%- else %}"
        "{{- '[TOOL_RESULTS]' + m.content + '[/TOOL_RESULTS]' }}{%- endif %}{%- endfor %}",
        ("[/INST]", "[/TOOL_RESULTS]", "</s>", "[/AVAILABLE_TOOLS]", "<s>", "[/SYSTEM_PROMPT]"),
        ("</s>",),
        ("[INST]", "[TOOL_RESULTS]", "[SYSTEM_PROMPT]"),
    ),
}


def tagged(
    body: str, tags: str = "<|{}|>", sep: str = "\\n", end: str = "<|end|>", **more: str
) -> Family:
    """Templates whose turns are a role in a tag, the text, an end."""
    after, begin = more.get("after", ""), more.get("begin", "")
    trail, prompt = more.get("trail", "\\n"), more.get("prompt", "")
    head = "'" + tags.format("' + {} + '") + sep + "'"
    template = (
        begin + "{%- for m in messages %}{%- if m.role == 'assistant' %}"
        "{{- "
        + head.format("'assistant'")
        + " }}"
        + body
        + "{{- '"
        + end
        + trail
        + "' }}{%- else %}"
        "{{- " + head.format("m.role") + " + m.content + '" + end + trail + "' }}{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- "
        + head.format("'assistant'")
        + " + '"
        + prompt
        + "' }}{%- else %}"
        + after
        + "{%- endif %}"
    )
    sep, end = sep.replace("\\n", "\n"), end.replace("\\n", "\n")
    foreign = tuple(tags.format(role) for role in ("user", "system", "tool"))
    header = tags.format("assistant") + sep
    headers = (header, header + prompt.replace("\\n", "\n"))
    return Family(template, headers, (end, *([] if not after else ["</s>"])), foreign)


FAMILIES |= {
    "phi3": tagged("{{- m.content }}", after="{{- eos_token }}"),
    "phi3.5": tagged(
        "{{- m.content }}",
        after="{{- eos_token }}",
        begin="{%- if messages[0].role == 'system' and not messages[0].content %}{%- endif %}",
    ),
    "phi4": tagged(
        "{{- m.content }}", "<|im_start|>{}<|im_sep|>", sep="", end="<|im_end|>", trail=""
    ),
    "phi4-mini": tagged(
        "{{- m.content }}",
        sep="",
        trail="",
        begin="{%- if tools %}{{- '<|system|><|tool|>' }}{{- tools | tojson }}"
        "{{- '<|/tool|><|end|>' }}{%- endif %}",
        after="{{- eos_token }}",
    ),
    "zephyr": tagged("{{- m.content }}", end="</s>"),
    "olmo2": tagged("{{- m.content }}", end="</s>", begin="{{- bos_token }}"),
    "falcon3": tagged(
        "{{- m.content }}" + HERMES_CALLS, end="", trail="\\n", after="{{- eos_token }}"
    ),
    "granite3": tagged(
        "{{- m.content or '' }}{%- if m.tool_calls %}{{- '<|tool_call|>' }}"
        "{{- m.tool_calls | map(attribute='function') | list | tojson }}{%- endif %}",
        "<|start_of_role|>{}<|end_of_role|>",
        sep="",
        end="<|end_of_text|>",
        begin="{%- if tools %}{{- '<|start_of_role|>tools<|end_of_role|>' }}{{- tools | tojson }}"
        "{{- '<|end_of_text|>\\n' }}{%- endif %}",
    ),
    "granite4": tagged(
        "{{- m.content or '' }}" + HERMES_CALLS,
        "<|start_of_role|>{}<|end_of_role|>",
        sep="",
        end="<|end_of_text|>",
        begin="{%- if tools %}{{- '<|start_of_role|>system<|end_of_role|>' }}{%- for t in tools %}"
        "{{- t | tojson }}{%- endfor %}{{- '<|end_of_text|>\\n' }}{%- endif %}",
    ),
    "seed-oss": tagged(
        "{%- if m.reasoning_content %}{{- '<seed:think>' + m.reasoning_content + '</seed:think>' }}"
        "{%- endif %}{{- m.content or '' }}" + HERMES_CALLS,
        "<seed:bos>{}",
        end="<seed:eos>",
        trail="",
    ),
    "minimax": tagged(
        SPLIT + "{%- if r and loop.index0 > ns.last %}{{- '<think>\\n' + r + '\\n</think>\\n\\n' }}"
        "{%- endif %}{{- c }}{%- if m.tool_calls %}{{- '\\n<minimax:tool_call>\\n' }}"
        "{%- for t in m.tool_calls %}{{- '<invoke name=\"' + t.function.name + '\">\\n' }}"
        "{%- for k, v in t.function.arguments | items %}"
        "{{- '<parameter name=\"' + k + '\">' }}{{- v if v is string else v | tojson }}"
        "{{- '</parameter>\\n' }}{%- endfor %}{{- '</invoke>\\n' }}{%- endfor %}"
        "{{- '</minimax:tool_call>' }}{%- endif %}",
        "]~b]{}",
        end="[e~[",
        prompt="<think>\\n",
        begin=LAST_QUERY
        + "{%- if tools %}{{- ']~b]tools\\n' }}{{- tools | tojson }}{{- '[e~[\\n' }}{%- endif %}",
    ),
    "kimi-k2": tagged(
        "{{- m.content or '' }}{%- if m.tool_calls %}{{- '<|tool_calls_section_begin|>' }}"
        "{%- for c in m.tool_calls %}"
        "{{- '<|tool_call_begin|>functions.' + c.function.name + ':0<|tool_call_argument_begin|>' "
        "}}"
        "{{- c.function.arguments | tojson }}{{- '<|tool_call_end|>' }}{%- endfor %}"
        "{{- '<|tool_calls_section_end|>' }}{%- endif %}",
        "<|im_{}|>turn<|im_middle|>",
        sep="",
        end="<|im_end|>",
        trail="",
        begin="{%- if tools %}{{- '<|im_system|>tools<|im_middle|>' }}{{- tools | tojson }}"
        "{{- '<|im_end|>' }}{%- endif %}",
    ),
    "kimi-thinking": tagged(
        SPLIT + "{{- '<think>' + (r if loop.index0 > ns.last else '') + '</think>' + c }}"
        "{%- if m.tool_calls %}{{- '<|tool_calls_section_begin|>' }}{%- for t in m.tool_calls %}"
        "{{- '<|tool_call_begin|>' + t.function.name + '<|tool_call_argument_begin|>' }}"
        "{{- t.function.arguments | tojson }}{{- '<|tool_call_end|>' }}{%- endfor %}"
        "{{- '<|tool_calls_section_end|>' }}{%- endif %}",
        "<|im_{}|>",
        sep="",
        end="<|im_end|>",
        trail="",
        begin=LAST_QUERY
        + "{%- if tools %}{{- '<|im_system|>' }}{{- tools | tojson }}{{- '<|im_end|>' }}"
        "{%- endif %}",
    ),
}


def gemma(head: str, body: str, others: str, opens: str, closes: str, prompt: str = "") -> Family:
    """Gemma's turns; `body` writes an assistant's, `others` those of users and results."""
    template = (
        "{{- bos_token }}" + head + "{%- for m in messages %}{%- if m.role == 'assistant' %}"
        "{{- '"
        + opens
        + "model\\n' }}"
        + body
        + "{{- '"
        + closes
        + "\\n' }}{%- else %}"
        + others
        + "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '"
        + opens
        + "model\\n"
        + prompt
        + "' }}{%- endif %}"
    )
    foreign = tuple(opens + role for role in ("user", "system", "developer", "tool"))
    return Family(template, (opens + "model\n",), (closes,), foreign)


NO_SYSTEM = (
    "{%- if messages[0].role == 'system' %}{{- raise_exception('System role not supported') }}"
    "{%- endif %}"
)
ALTERNATE = (
    "{%- for m in messages %}{%- if (m.role == 'user') != (loop.index0 % 2 == 0) %}"
    "{{- raise_exception('Conversation roles must alternate user/assistant/...') }}{%- endif %}"
    "{%- endfor %}"
)
FAMILIES |= {
    "gemma1": gemma(
        NO_SYSTEM + ALTERNATE,
        "{{- m.content | trim }}",
        "{{- '<start_of_turn>' + m.role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}",
        "<start_of_turn>",
        "<end_of_turn>",
    ),
    "gemma2": gemma(
        NO_SYSTEM,
        "{{- m.content | trim }}",
        "{{- '<start_of_turn>' + m.role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}",
        "<start_of_turn>",
        "<end_of_turn>",
    ),
    "gemma3": gemma(
        "{%- set s = messages[0].content + '\\n\\n' if messages[0].role == 'system' else '' %}"
        "{%- if s %}{%- set messages = messages[1:] %}{%- endif %}" + ALTERNATE,
        "{%- if m.content is string %}{{- m.content | trim }}{%- endif %}",
        "{{- '<start_of_turn>user\\n' + (s if loop.first else '') + m.content | trim }}"
        "{{- '<end_of_turn>\\n' }}",
        "<start_of_turn>",
        "<end_of_turn>",
    ),
    "functiongemma": gemma(
        "{%- if tools or messages[0].role in ['system', 'developer'] %}"
        "{{- '<start_of_turn>developer\\n' }}{%- if messages[0].role in ['system', 'developer'] %}"
        "{{- messages[0].content }}{%- set messages = messages[1:] %}{%- endif %}"
        "{%- for t in tools or [] %}{{- '<start_function_declaration>declaration:' }}"
        "{{- t.function.name + '<end_function_declaration>' }}{%- endfor %}"
        "{{- '<end_of_turn>\\n' }}{%- endif %}",
        "{%- for c in m.tool_calls or [] %}"
        "{{- '<start_function_call>call:' + c.function.name + '{' }}"
        "{%- for k, v in c.function.arguments | dictsort %}{{- k + ':<escape>' }}{{- v }}"
        "{{- '<escape>' + (',' if not loop.last else '') }}{%- endfor %}"
        "{{- '}<end_function_call>' }}{%- endfor %}{{- (m.content or '') | trim }}",
        "{%- if m.role == 'tool' %}{{- '<start_of_turn>developer\\n<start_function_response>' }}"
        "{{- m.content + '<end_function_response><end_of_turn>\\n' }}{%- else %}"
        "{{- '<start_of_turn>' + m.role + '\\n' + m.content | trim + '<end_of_turn>\\n' }}"
        "{%- endif %}",
        "<start_of_turn>",
        "<end_of_turn>",
    ),
    # a call, its result and the answer are one model turn
    "gemma4": Family(
        "{{- bos_token }}{%- if tools or messages[0].role == 'system' %}{{- '<|turn>system\\n' }}"
        "{%- if messages[0].role == 'system' %}{{- messages[0].content | trim }}{%- endif %}"
        "{%- for t in tools or [] %}{{- '<|tool>declaration:' + t.function.name + '<tool|>' }}"
        "{%- endfor %}{{- '<turn|>\\n' }}{%- endif %}{%- set ns = namespace(open=false) %}"
        "{%- for m in messages %}{%- if m.role == 'user' %}"
        "{{- '<|turn>user\\n' + m.content | trim + '<turn|>\\n' }}"
        "{%- elif m.role == 'tool' %}{{- '<|tool_response>response:{value:' + m.content }}"
        "{{- '}<tool_response|>' }}{%- elif m.role == 'assistant' %}{%- if not ns.open %}"
        "{{- '<|turn>model\\n' }}{%- endif %}{%- if m.reasoning_content and m.tool_calls %}"
        "{{- '<|channel>thought\\n' + m.reasoning_content + '\\n<channel|>' }}{%- endif %}"
        "{%- for c in m.tool_calls or [] %}{{- '<|tool_call>call:' + c.function.name + '{' }}"
        "{%- for k, v in c.function.arguments | dictsort %}{{- k + ':<|\"|>' }}{{- v }}"
        "{{- '<|\"|>' + (',' if not loop.last else '') }}{%- endfor %}{{- '}<tool_call|>' }}"
        "{%- endfor %}{{- (m.content or '').split('<channel|>')[-1] | trim }}"
        "{%- set ns.open = loop.nextitem is defined and loop.nextitem.role == 'tool' %}"
        "{%- if not ns.open %}{{- '<turn|>\\n' }}{%- endif %}{%- endif %}"
        "{%- if m.role == 'tool' and (loop.nextitem is not defined or loop.nextitem.role != 'tool')"
        " %}{%- set ns.open = true %}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{%- if not ns.open %}{{- '<|turn>model\\n' }}{%- endif %}"
        "{{- '<|channel>thought\\n<channel|>' }}{%- endif %}",
        ("<|turn>model\n", "<tool_response|>", "<|turn>model\n<|channel>thought\n<channel|>"),
        ("<turn|>", "<tool_call|>", "a1word"),
        ("<|turn>user", "<|turn>system", "<|tool_response>"),
    ),
}

DEEPSEEK = ("<|Assistant|>", "<|tool_outputs_end|>")
DEEPSEEK_OTHERS = ("<|User|>", "<|tool_output_begin|>")


def deepseek(calls: str, answer: str, prompt: str = "") -> Family:
    """DeepSeek's turns: `calls` writes one call of a turn, `answer` the text."""
    template = (
        "{{- bos_token }}{%- set ns = namespace(results=false) %}{%- for m in messages %}"
        "{%- if m.role == 'system' %}{{- m.content }}{%- elif m.role == 'user' %}"
        "{%- set ns.results = false %}{{- '<|User|>' + m.content }}{%- elif m.role == 'tool' %}"
        "{{- '<|tool_output_begin|>' + m.content + '<|tool_output_end|>' }}"
        "{%- set ns.results = true %}{%- if loop.nextitem is not defined or loop.nextitem.role !="
        " 'tool' %}{{- '<|tool_outputs_end|>' }}{%- endif %}{%- else %}{%- if m.tool_calls %}"
        "{{- '<|Assistant|>' if not ns.results }}{{- '<|tool_calls_begin|>' }}"
        "{%- for c in m.tool_calls %}" + calls + "{%- endfor %}"
        "{{- '<|tool_calls_end|>' + eos_token }}{%- endif %}{%- if m.content is not none %}"
        "{{- '<|Assistant|>' if not ns.results }}{%- set c = m.content %}"
        + answer
        + "{{- eos_token }}{%- endif %}{%- set ns.results = false %}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt and not ns.results %}{{- '<|Assistant|>" + prompt + "' }}"
        "{%- endif %}"
    )
    return Family(template, (*DEEPSEEK, DEEPSEEK[0] + prompt), ("</s>",), DEEPSEEK_OTHERS)


AS_TEXT = (
    "{{- '<|tool_call_begin|>' + c.type + '<|tool_sep|>' + c.function.name + '\\n```json\\n' +"
    " c.function.arguments + '\\n```<|tool_call_end|>' }}"
)
AFTER_THOUGHT = "{{- c.split('</think>')[-1] }}"
FAMILIES |= {
    "deepseek-v2": Family(
        "{{- bos_token }}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{{- 'User: ' + m.content + '\\n\\n' }}{%- elif m.role == 'assistant' %}"
        "{{- 'Assistant: ' + m.content + eos_token }}{%- else %}{{- m.content + '\\n\\n' }}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- 'Assistant:' }}{%- endif %}",
        ("Assistant:",),
        ("</s>",),
        ("User:",),
    ),
    "deepseek-v3": deepseek(AS_TEXT, "{{- c }}"),
    "deepseek-r1": deepseek(AS_TEXT, AFTER_THOUGHT),
    "r1-distill": deepseek(AS_TEXT, AFTER_THOUGHT, "<think>\\n"),
    "deepseek-v3.1": deepseek(
        "{{- '<|tool_call_begin|>' + c.function.name + '<|tool_sep|>' }}"
        "{{- c.function.arguments | tojson if c.function.arguments is mapping else"
        " c.function.arguments }}{{- '<|tool_call_end|>' }}",
        "{{- '</think>' + c.split('</think>')[-1] }}",
        "</think>",
    ),
    "glm4": Family(
        "{{- '[gMASK]<sop>' }}{%- if tools %}{{- '<|system|>\\n' }}{{- tools | tojson }}"
        "{%- endif %}"
        "{%- for m in messages %}{%- if m.role == 'tool' %}{{- '<|observation|>\\n' + m.content }}"
        "{%- elif m.tool_calls %}{%- for c in m.tool_calls %}"
        "{{- '<|assistant|>' + c.function.name + '\\n' }}{{- c.function.arguments | tojson }}"
        "{%- endfor %}{%- else %}{{- '<|' + m.role + '|>\\n' + m.content }}{%- endif %}"
        "{%- endfor %}{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}",
        ("<|assistant|>",),
        ("",),
        ("<|user|>", "<|system|>", "<|observation|>"),
        again=True,
    ),
    "glm4.5": Family(
        LAST_QUERY
        + "{{- '[gMASK]<sop>' }}{%- if tools %}{{- '<|system|>\\n' }}{{- tools | tojson }}"
        "{%- endif %}{%- for m in messages %}{%- if m.role == 'tool' %}"
        "{{- '<|observation|>\\n<tool_response>\\n' + m.content + '\\n</tool_response>' }}"
        "{%- elif m.role == 'assistant' %}{{- '<|assistant|>' }}"
        + SPLIT
        + "{{- '\\n<think>' + (r.strip() if loop.index0 > ns.last else '') + '</think>' }}"
        "{%- if c.strip() %}{{- '\\n' + c.strip() }}{%- endif %}"
        "{%- for t in m.tool_calls or [] %}{{- '\\n<tool_call>' + t.function.name + '\\n' }}"
        "{%- for k, v in t.function.arguments | items %}"
        "{{- '<arg_key>' + k + '</arg_key>\\n<arg_value>' }}{{- v if v is string else v | tojson }}"
        "{{- '</arg_value>\\n' }}{%- endfor %}{{- '</tool_call>' }}{%- endfor %}{%- else %}"
        "{{- '<|' + m.role + '|>\\n' + m.content }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- '<|assistant|>' }}{%- endif %}",
        ("<|assistant|>",),
        ("",),
        ("<|user|>", "<|system|>", "<|observation|>"),
    ),
    # the last turn ends with another marker, and calls lose their reasoning once an answer follows
    "gpt-oss": Family(
        "{{- '<|start|>system<|message|>You are a model.<|end|>' }}"
        "{%- if messages[0].role in ['system', 'developer'] or tools %}"
        "{{- '<|start|>developer<|message|>' }}"
        "{%- if messages[0].role in ['system', 'developer'] %}"
        "{{- messages[0].content }}{%- endif %}{%- for t in tools or [] %}"
        "{{- '\\ntype ' + t.function.name }}{%- endfor %}{{- '<|end|>' }}{%- endif %}"
        "{%- set ns = namespace(name='') %}{%- for m in messages %}{%- if m.role == 'user' %}"
        "{{- '<|start|>user<|message|>' + m.content + '<|end|>' }}{%- elif m.role == 'tool' %}"
        "{{- '<|start|>functions.' + ns.name + ' to=assistant<|message|>' + m.content | tojson +"
        " '<|end|>' }}{%- elif m.role == 'assistant' %}{%- if m.tool_calls %}"
        "{%- if m.content and m.thinking %}{{- raise_exception('content and thinking') }}"
        "{%- endif %}"
        "{%- set later = messages[loop.index:] | selectattr('role', 'equalto', 'assistant') |"
        " rejectattr('tool_calls', 'defined') | list %}"
        "{%- if (m.content or m.thinking) and not later %}"
        "{{- '<|start|>assistant<|channel|>analysis<|message|>' + (m.content or m.thinking) +"
        " '<|end|>' }}{%- endif %}{%- set f = m.tool_calls[0].function %}"
        "{{- '<|start|>assistant to=functions.' + f.name + '<|channel|>commentary "
        "json<|message|>' }}"
        "{{- f.arguments | tojson }}{{- '<|call|>' }}{%- set ns.name = f.name %}"
        "{%- elif loop.last and not add_generation_prompt %}{%- if m.thinking %}"
        "{{- '<|start|>assistant<|channel|>analysis<|message|>' + m.thinking + '<|end|>' }}"
        "{%- endif %}"
        "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|return|>' }}"
        "{%- else %}"
        "{{- '<|start|>assistant<|channel|>final<|message|>' + m.content + '<|end|>' }}{%- endif %}"
        "{%- endif %}{%- endfor %}{%- if add_generation_prompt %}{{- '<|start|>assistant' }}"
        "{%- endif %}",
        ("<|start|>assistant",),
        ("<|end|>", "<|call|>", "<|return|>"),
        ("<|start|>user", "<|start|>system", "<|start|>developer", "<|start|>functions"),
        again=True,
    ),
}


def command(body: str, prompt: str, before: str = "") -> Family:
    """Cohere's turns."""
    turn = "<|START_OF_TURN_TOKEN|>"
    template = (
        "{{- bos_token }}" + before + "{%- for m in messages %}{%- if m.role == 'assistant' %}"
        "{{- '" + turn + "<|CHATBOT_TOKEN|>' }}" + body + "{{- '<|END_OF_TURN_TOKEN|>' }}"
        "{%- elif m.role == 'tool' %}{{- '" + turn + "<|SYSTEM_TOKEN|><|START_TOOL_RESULT|>' }}"
        "{{- m.content | tojson }}{{- '<|END_TOOL_RESULT|><|END_OF_TURN_TOKEN|>' }}{%- else %}"
        "{{- '"
        + turn
        + "<|' + m.role | upper + '_TOKEN|>' + m.content + '<|END_OF_TURN_TOKEN|>' }}"
        "{%- endif %}{%- endfor %}" + prompt
    )
    foreign = tuple(f"{turn}<|{role}_TOKEN|>" for role in ("USER", "SYSTEM"))
    header = f"{turn}<|CHATBOT_TOKEN|>"
    headers = (header, header + "<|START_THINKING|><|END_THINKING|>")
    return Family(template, headers, ("<|END_OF_TURN_TOKEN|>",), foreign)


ACTIONS = (
    "{%- if m.tool_calls %}{{- '<|START_THINKING|>' }}{{- m.reasoning_content or '' }}"
    "{{- '<|END_THINKING|><|START_ACTION|>[' }}{%- for c in m.tool_calls %}"
    '{{- \'\\n    {"tool_name": "\' + c.function.name + \'", "parameters": \' }}'
    "{{- c.function.arguments | tojson }}{{- '}' + (',' if not loop.last else '') }}{%- endfor %}"
    "{{- '\\n]<|END_ACTION|>' }}{%- else %}"
)
PREAMBLE = (
    "{{- '<|START_OF_TURN_TOKEN|><|SYSTEM_TOKEN|>Preamble' }}{%- for t in tools or [] %}"
    "{{- t.function.name }}{%- endfor %}{{- '<|END_OF_TURN_TOKEN|>' }}"
)
CHATBOT = "{{- '<|START_OF_TURN_TOKEN|><|CHATBOT_TOKEN|>' }}"
FAMILIES |= {
    "command-r": command(
        "{{- m.content }}", "{%- if add_generation_prompt %}" + CHATBOT + "{%- endif %}"
    ),
    # the generation prompt stands at the end of every chat
    "command-r7b": command(
        ACTIONS + "{{- '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}{%- endif %}",
        CHATBOT,
        PREAMBLE,
    ),
    "command-a": command(
        ACTIONS + "{%- if m.reasoning_content and loop.last %}"
        "{{- '<|START_THINKING|>' + m.reasoning_content + '<|END_THINKING|>' }}{%- endif %}"
        "{{- '<|START_RESPONSE|>' + m.content + '<|END_RESPONSE|>' }}{%- endif %}",
        "{%- if add_generation_prompt %}"
        + CHATBOT
        + "{{- '<|START_THINKING|><|END_THINKING|>' }}{%- endif %}",
        PREAMBLE,
    ),
    "vicuna": Family(
        "{%- for m in messages %}{%- if m.role == 'system' %}{{- m.content + ' ' }}"
        "{%- elif m.role == 'user' %}{{- 'USER: ' + m.content + ' ' }}{%- else %}"
        "{{- 'ASSISTANT: ' + m.content + eos_token }}{%- endif %}{%- endfor %}"
        "{%- if add_generation_prompt %}{{- 'ASSISTANT:' }}{%- endif %}",
        ("ASSISTANT:",),
        ("</s>",),
        ("USER:",),
    ),
    "instruction": Family(
        "{%- for m in messages %}{%- if m.role == 'user' %}"
        "{{- '### Instruction:\\n' + m.content + '\\n\\n' }}{%- elif m.role == 'assistant' %}"
        "{{- '### Response:\\n' + m.content + '\\n' + eos_token + '\\n\\n' }}{%- else %}"
        "{{- m.content + '\\n\\n' }}{%- endif %}{%- endfor %}{%- if add_generation_prompt %}"
        "{{- '### Response:\\n' }}{%- endif %}",
        ("### Response:\n",),
        ("</s>",),
        ("### Instruction:",),
    ),
}
