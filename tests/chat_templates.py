"""Chat templates in the style of well-known models, written for the tests, and a tiny tokenizer for each."""
from __future__ import annotations

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

CHATML = (  # a default system message, tools in it, tool results as the user's
    "{{ '<|im_start|>system\n' + (messages[0].content if messages[0].role == 'system' else 'You help.') }}"
    "{% if tools %}{{ '\nTools: ' + tools | tojson }}{% endif %}{{ '<|im_end|>\n' }}"
    "{% for m in messages %}"
    "{% if m.role == 'user' %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}"
    "{% elif m.role == 'tool' %}"
    "{{ '<|im_start|>user\n<tool_response>' + m.content + '</tool_response><|im_end|>\n' }}"
    "{% elif m.role == 'assistant' %}{{ '<|im_start|>assistant\n' + m.content }}"
    "{% for call in m.tool_calls or [] %}{{ '<tool_call>' + call.function | tojson + '</tool_call>' }}{% endfor %}"
    "{{ '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
LLAMA = (  # header ids, trimmed texts, tool results from `ipython`, a call ends in another token than a text
    "{{ bos_token }}{% for m in messages %}"
    "{{ '<|start_header_id|>' + ('ipython' if m.role == 'tool' else m.role) + '<|end_header_id|>\n\n' }}"
    "{% if tools and m.role == 'user' and loop.first %}{{ 'Functions: ' + tools | tojson + '\n\n' }}{% endif %}"
    "{% if m.tool_calls %}{% set call = m.tool_calls[0].function %}"
    "{{ '<|python_tag|>' + call.name + ' ' + call.arguments | tojson + '<|eom_id|>' }}"
    "{% else %}{{ m.content | trim + '<|eot_id|>' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|start_header_id|>assistant<|end_header_id|>\n\n' }}{% endif %}")
GEMMA = (  # user and model, strictly in turn, no system
    "{{ bos_token }}{% if messages[0].role == 'system' %}{{ raise_exception('System role not supported') }}{% endif %}"
    "{% for m in messages %}"
    "{% if (m.role == 'user') != (loop.index0 % 2 == 0) %}{{ raise_exception('Roles must alternate') }}{% endif %}"
    "{{ '<start_of_turn>' + ('model' if m.role == 'assistant' else m.role) + '\n' + m.content | trim }}"
    "{{ '<end_of_turn>\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<start_of_turn>model\n' }}{% endif %}")
MISTRAL = (  # no generation prompt; tools stand before the last question, the system message if nothing follows it
    "{% set system = messages[0].content + '\n\n' if messages[0].role == 'system' else '' %}"
    "{% set asked = messages | selectattr('role', 'equalto', 'user') | list %}"
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}"
    "{% if m == asked[-1] and tools %}{{ '[AVAILABLE_TOOLS] ' + tools | tojson + '[/AVAILABLE_TOOLS]' }}{% endif %}"
    "{{ '[INST] ' + (system if loop.last else '') + m.content + '[/INST]' }}"
    "{% elif m.role == 'tool' %}{{ '[TOOL_RESULTS] ' + m.content + '[/TOOL_RESULTS]' }}"
    "{% elif m.tool_calls %}"
    "{{ '[TOOL_CALLS] ' + m.tool_calls | map(attribute='function') | list | tojson + eos_token }}"
    "{% elif m.role == 'assistant' %}{{ ' ' + m.content | trim + eos_token }}{% endif %}{% endfor %}")
QWEN3 = (  # the thinking of an answer is dropped once the next question is asked; the last answer always has some
    "{% set asked = namespace(last=0) %}"
    "{% for m in messages %}{% if m.role == 'user' %}{% set asked.last = loop.index0 %}{% endif %}{% endfor %}"
    "{% for m in messages %}{% if m.role == 'assistant' %}{% set parts = m.content.split('</think>') %}"
    "{{ '<|im_start|>assistant\n' }}"
    "{% if loop.index0 > asked.last and (loop.last or parts | length > 1) %}"
    "{{ '<think>\n' + (parts[0].replace('<think>', '').strip() if parts | length > 1 else '') + '\n</think>\n\n' }}"
    "{% endif %}{{ parts[-1].lstrip() + '<|im_end|>\n' }}"
    "{% else %}{{ '<|im_start|>' + m.role + '\n' + m.content + '<|im_end|>\n' }}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}")
PHI3 = (  # a text that is not open ends in the tokenizer's end token, after the turn's own end
    "{% for m in messages %}{{ '<|' + m.role + '|>\n' + m.content + '<|end|>\n' }}{% endfor %}"
    "{{ '<|assistant|>\n' if add_generation_prompt else eos_token }}")
BARE = (  # nothing ends a turn, as in models/stt-tiny
    "{% for m in messages %}{{ m.role + ':\n' + m.content + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'assistant:\n' }}{% endif %}")
REASONER = CHATML[:-len("{% endif %}")] + "{{ '<think>\n' }}{% endif %}"  # opens an answer as it writes none

SPECIAL = {"chatml": ["<|im_start|>", "<|im_end|>"], "qwen3": ["<|im_start|>", "<|im_end|>"],
           "llama": ["<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>", "<|eom_id|>", "<|python_tag|>"],
           "gemma": ["<start_of_turn>", "<end_of_turn>"],
           "mistral": ["[INST]", "[/INST]", "[AVAILABLE_TOOLS]", "[/AVAILABLE_TOOLS]", "[TOOL_CALLS]", "[TOOL_RESULTS]",
                       "[/TOOL_RESULTS]"],
           "phi3": ["<|user|>", "<|assistant|>", "<|system|>", "<|end|>"], "bare": [],
           "reasoner": ["<|im_start|>", "<|im_end|>"]}
TEMPLATES = {"chatml": CHATML, "qwen3": QWEN3, "llama": LLAMA, "gemma": GEMMA, "mistral": MISTRAL, "phi3": PHI3,
             "bare": BARE, "reasoner": REASONER}
END = {"chatml": "<|im_end|>", "qwen3": "<|im_end|>", "llama": "<|eot_id|>"}  # where the tokenizer's is the turn's
PLAIN_ADDED = ["<tool_call>", "</tool_call>", "<think>", "</think>"]  # single tokens, but not special ones
TEXTS = ["What is one and one? It is two, and two and two is four. Be brief. Hello! How is the weather in Bonn?",
         "system user assistant model ipython tool_response city arguments name get_weather Functions Tools",
         "It rains there. Thanks, good bye. You help. Let me think about it: the sum is what they ask for.\n\n"]


def build(name: str, template: str | None = None, like_gpt2: bool = False) -> PreTrainedTokenizerFast:
    """A small byte-level BPE with the special tokens of a template.

    Line breaks stay together, as in newer models; `like_gpt2`: the last one stays apart if a word follows.
    """
    core = Tokenizer(models.BPE())
    words = pre_tokenizers.Split(Regex(r"\s*\n+| ?\w+| ?[^\s\w]+|\s+"), "isolated")
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False) if like_gpt2 else pre_tokenizers.Sequence(
        [words, pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)])
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(TEXTS * 4, trainers.BpeTrainer(
        vocab_size=380, special_tokens=["<pad>", "<s>", "<eos>"], show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    core.add_tokens([AddedToken(token, special=False, normalized=False) for token in PLAIN_ADDED])
    core.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL[name]])
    return PreTrainedTokenizerFast(tokenizer_object=core, bos_token="<s>", eos_token=END.get(name, "<eos>"),
                                   pad_token="<pad>", chat_template=template or TEMPLATES[name])
