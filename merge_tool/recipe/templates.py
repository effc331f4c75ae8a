"""The chat templates that recipes know by name: Jinja, for transformers' apply_chat_template."""

from __future__ import annotations

from collections.abc import Mapping

# Published formats, each message behind the other; `-` takes away all space that is not written out.
_ALPACA = r"""
{%- for m in messages %}
    {%- if m['role'] == 'user' %}{{- '### Instruction:\n' }}{%- endif %}
    {%- if m['role'] == 'assistant' %}{{- '### Response:\n' }}{%- endif %}
    {{- m['content'] | trim + '\n\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '### Response:\n' }}{%- endif %}
"""
_CHATML = r"""
{%- for m in messages %}
    {{- '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>\n' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|im_start|>assistant\n' }}{%- endif %}
"""
_EXAONE = r"""
{%- for m in messages %}
    {%- if loop.first and m['role'] != 'system' %}{{- '[|system|][|endofturn|]\n' }}{%- endif %}
    {{- '[|' + m['role'] + '|]' + m['content'] + ('\n' if m['role'] == 'user' else '[|endofturn|]\n') }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '[|assistant|]' }}{%- endif %}
"""
_LLAMA3 = r"""
{{- bos_token }}
{%- for m in messages %}
    {{- '<|start_header_id|>' + m['role'] + '<|end_header_id|>\n\n' + m['content'] | trim + '<|eot_id|>' }}
{%- endfor %}
{%- if add_generation_prompt %}{{- '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{%- endif %}
"""
_MISTRAL = r"""
{{- bos_token }}
{%- set said = namespace(by_system='') %}
{%- for m in messages %}
    {%- if m['role'] == 'system' %}
        {%- set said.by_system = m['content'] + '\n\n' %}
    {%- elif m['role'] == 'user' %}
        {{- ' [INST] ' + said.by_system + m['content'] + ' [/INST]' }}
        {%- set said.by_system = '' %}
    {%- else %}
        {{- ' ' + m['content'] + eos_token }}
    {%- endif %}
{%- endfor %}
"""
TEMPLATES: Mapping[str, str] = {
    name: text.strip() + "\n"
    for name, text in (
        ("alpaca", _ALPACA), ("chatml", _CHATML), ("exaone", _EXAONE), ("llama3", _LLAMA3), ("mistral", _MISTRAL),
    )
}  # fmt: skip
TEMPLATE_TOKENS: Mapping[str, tuple[str, ...]] = {  # what a template writes that should be one token
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "exaone": ("[|system|]", "[|user|]", "[|assistant|]", "[|endofturn|]"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
}
