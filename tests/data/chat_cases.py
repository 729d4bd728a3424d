"""Chat templates in the manner of published ones, and conversations to render with them."""

from __future__ import annotations

from typing import Any

TEMPLATES = {
    "chatml": """{%- if tools %}
<|im_start|>system
{% if messages[0].role == 'system' %}{{ messages[0].content }}

{% endif %}Tools:
{% for tool in tools %}
{{ tool | tojson }}
{% endfor %}
<|im_end|>
{% endif %}
{%- for message in messages %}
  {%- if loop.first and message.role == 'system' and tools %}{% continue %}{% endif %}
{{ '<|im_start|>' + message.role + '\\n' }}
  {%- if message.role == 'assistant' %}
{% generation %}{{ message.content }}
    {%- for call in message.tool_calls or [] %}
{{ '<call>' ~ call.function.name ~ ' ' ~ (call.function.arguments | tojson(indent=1)) ~ '</call>' }}
    {%- endfor %}{{ '<|im_end|>' }}{% endgeneration %}
  {%- else %}{{ message.content }}<|im_end|>{% endif %}
{{- '\\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% if think is defined and not think
  %}{{ '<think>\\n\\n</think>\\n' }}{% endif %}{% endif %}""",
    "llama": """{{ bos_token }}{% set found = namespace(system='', turns=0) %}
{%- for message in messages %}
{%- if message['role'] == 'system' %}{% set found.system = message['content'] | trim %}
{%- elif (message['role'] == 'user') != (found.turns % 2 == 0) %}
{{- raise_exception('Conversation roles must alternate user/assistant/user/...') }}
{%- else %}{% set found.turns = found.turns + 1 %}
{%- if message['role'] == 'user' %}
{{- '[INST] ' + ('<<SYS>>' + found.system + '<</SYS>>' if found.system and loop.index <= 2 else '')
  + message['content'].strip() + ' [/INST]' }}
{%- else %}{{ ' ' + message['content'].strip() + ' ' + eos_token }}{% endif %}{% endif %}
{%- endfor %}""",
    "dated": """{%- set months = {1: 'one', 2: 'two'} -%}
{{- strftime_now('%Y')[:0] }}{{ months[2] }} {{ dict(a=1)['a'] }}
{%- for message in messages[::-1] -%}
  {%- if loop.index0 > 1 %}{% break %}{% endif %}
  {%- if message.content is string %}[{{ message.role | upper }}] {{ message.content }}
  {%- else %}{% for part in message.content | selectattr('type', 'equalto', 'text') %}
<{{ part.text }}>{% endfor %}{% endif %}
{% endfor %}{{ documents | length if documents else 0 }}{{ messages[0] | tojson }}""",
}
SYSTEM = {"role": "system", "content": "Be brief & <kind>."}
USER = {"role": "user", "content": " What is 2 + 2? naïve 漢 <|im_end|> "}
ANSWER = {"role": "assistant", "content": " It's 4. 🎭\n"}
PARTS = {"role": "user", "content": [{"type": "text", "text": "hi"}, {"type": "image"}]}
CALL = {
    "role": "assistant",
    "content": "",
    "tool_calls": [{"function": {"name": "add", "arguments": {"a": 1, "b": "ü<"}}}],
}
TOOLS = [{"type": "function", "function": {"name": "add", "description": "Adds <two> 'numbers'."}}]
CASES: list[tuple[list[dict[str, Any]], dict[str, Any]]] = [
    ([USER], {"add_generation_prompt": True}),
    ([SYSTEM, USER], {"add_generation_prompt": True}),
    ([SYSTEM, USER, ANSWER, USER], {"add_generation_prompt": True, "variables": {"think": False}}),
    ([USER, ANSWER], {}),
    ([USER, ANSWER], {"continue_final_message": True}),
    ([USER, {"role": "assistant", "content": "It is"}], {"continue_final_message": True}),
    ([PARTS, PARTS], {"continue_final_message": True}),
    ([SYSTEM, USER, CALL], {"tools": TOOLS}),
    ([USER], {"tools": TOOLS, "add_generation_prompt": True}),
    ([ANSWER, USER], {}),
    ([USER], {"documents": [{"title": "t", "text": "x"}]}),
    ([], {}),
]
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}
