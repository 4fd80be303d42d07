"""Chat templates in the manner of well-known models, and a tokenizer that has their special tokens.

Written by hand: no hub is reachable where the tests run. What matters of each is kept: where it
trims, what it does with thoughts of earlier turns, how it shows tool calls and their results.
"""

from __future__ import annotations

from tokenizers import Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

_TOOLS = """
{%- if tools %}<|im_start|>system
# Tools
{% for tool in tools %}{{ tool | tojson }}{% endfor %}<|im_end|>
{% endif %}"""

_TOOL_TURN = """<|im_start|>user
<tool_response>
{{ m.content }}
</tool_response><|im_end|>
"""

_CALLS = """{% for c in m.tool_calls %}
<tool_call>
{"name": "{{ c.function.name }}", "arguments": {{ c.function.arguments | tojson }}}
</tool_call>{% endfor %}"""

# Shows every turn as it was said, in a fixed form; a default system message.
QWEN25 = (
    "<|im_start|>system\nYou are a helpful assistant.<|im_end|>\n"
    + _TOOLS
    + "{% for m in messages %}{% if m.role == 'tool' %}"
    + _TOOL_TURN
    + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}"
    + _CALLS
    + "<|im_end|>\n{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)

# Thoughts apart from content. An empty thought is shown in the last turn only: a conversation
# without thinking reads differently as soon as it goes on.
QWEN3 = (
    _TOOLS
    + "{% for m in messages %}{% if m.role == 'tool' %}"
    + _TOOL_TURN
    + """{% elif m.role == 'assistant' %}
{%- set content = m.content %}{% set thought = m.reasoning_content | default('') %}
{%- if '</think>' in content %}
{%- set thought = content.split('</think>')[0].rstrip('\n').split('<think>')[-1].lstrip('\n') %}
{%- set content = content.split('</think>')[-1].lstrip('\n') %}
{%- endif %}<|im_start|>assistant
{% if loop.last or thought %}{{ '<think>\n' + thought.strip('\n') + '\n</think>\n\n' }}{% endif %}
{{- content.lstrip('\n') }}"""
    + _CALLS
    + "<|im_end|>\n"
    + "{% else %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endif %}{% endfor %}"
    + "{% if add_generation_prompt %}<|im_start|>assistant\n"
    + "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}{% endif %}"
)

# As QWEN3 in its later thinking-only editions: the prompt itself begins the thinking.
QWEN3_THINKING = QWEN3.replace(
    "{% if enable_thinking is false %}{{ '<think>\n\n</think>\n\n' }}{% endif %}",
    "{{ '<think>\n' }}",
)

# Earlier thoughts are taken out of the history (as reasoning models' chat templates do).
FORGETFUL = QWEN3.replace("loop.last or thought", "loop.last")

_LLAMA_TURN = "<|start_header_id|>{{ m.role }}<|end_header_id|>\n\n"

# Trims every message; a tool call replaces what was said beside it.
LLAMA3 = (
    "{{ bos_token }}{% if tools %}<|start_header_id|>system<|end_header_id|>\n\n"
    "{{ tools | tojson }}<|eot_id|>{% endif %}"
    "{% for m in messages %}"
    + _LLAMA_TURN.replace("m.role", "'ipython' if m.role == 'tool' else m.role")
    + "{% if m.tool_calls %}"
    '{"name": "{{ m.tool_calls[0].function.name }}", "parameters": '
    "{{ m.tool_calls[0].function.arguments | tojson }}}"
    "{% else %}{{ m.content | trim }}{% endif %}<|eot_id|>{% endfor %}"
    "{% if add_generation_prompt %}"
    + _LLAMA_TURN.replace("{{ m.role }}", "assistant")
    + "{% endif %}"
)

# The same, saying both.
LLAMA3_TRAINING = LLAMA3.replace(
    "{% if m.tool_calls %}", "{% if m.tool_calls %}{{ m.content | trim }}<|python_tag|>"
)

SPECIAL = (
    "<|endoftext|>", "<|im_start|>", "<|im_end|>", "<|begin_of_text|>", "<|start_header_id|>",
    "<|end_header_id|>", "<|eot_id|>", "<|python_tag|>",
)  # fmt: skip
MARKS = ("<think>", "</think>", "<tool_call>", "</tool_call>")  # added, but not special


def tokenizer(template: str) -> PreTrainedTokenizerFast:
    """A small byte-level BPE that joins punctuation with line ends, as Qwen's and Llama's do.

    Its `eos_token` is that of a base model, which no template writes.
    """
    bpe = Tokenizer(models.BPE())
    words = Regex(r"[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+")
    bpe.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(words, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    bpe.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=400,
        special_tokens=list(SPECIAL),
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    bpe.train_from_iterator(["So we get:\n```python\nprint(1)\n```\n"] * 50, trainer)
    fast = PreTrainedTokenizerFast(
        tokenizer_object=bpe,
        bos_token="<|begin_of_text|>",
        eos_token="<|endoftext|>",
        pad_token="<|endoftext|>",
        clean_up_tokenization_spaces=False,
    )
    fast.add_tokens(list(MARKS))
    fast.chat_template = template
    return fast
