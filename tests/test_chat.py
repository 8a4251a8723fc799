"""Conversations through chat templates: labels equal spans marked by hand, whatever a template does to a history."""
from __future__ import annotations

import random
import re

import pytest
from chat_templates import CHATML, SPECIAL, TEMPLATES, build
from transformers import PreTrainedTokenizerFast

from stt.dataset import Task, encode_all, tokenised
from stt.dataset.chat import Conversation
from stt.dataset.own import extract, to_item
from stt.errors import InputError


@pytest.fixture(scope="module")
def tokenizers() -> dict[str, PreTrainedTokenizerFast]:
    return {name: build(name) for name in TEMPLATES}


# ---------------------------------------------------------------- conversations, and what must be learned of them


def says(role: str, content: str, **more: object) -> dict[str, object]:
    return {"role": role, "content": content, **more}


TOOLS = [{"type": "function", "function": {"name": "get_weather"}}]
CALL = {"type": "function", "function": {"name": "get_weather", "arguments": {"city": "Bonn"}}}
SINGLE = {"messages": [says("user", "Hello!"), says("assistant", "How is it?")]}
SPACED = {"messages": [says("user", "Hello!"), says("assistant", "  How is it?  ")]}
MULTI = {"messages": [says("system", "Be brief."), says("user", "1 and 1?"), says("assistant", "two"),
                      says("user", "2 and 2?"), says("assistant", "four"), says("user", "Thanks")]}
NO_SYSTEM = {"messages": MULTI["messages"][1:]}
TOOL = {"messages": [says("user", "Weather in Bonn?"), says("assistant", "", tool_calls=[CALL]), says("tool", "rain"),
                     says("assistant", "It rains."), says("user", "Thanks"), says("assistant", "bye")], "tools": TOOLS}
THOUGHT = {"messages": [says("user", "1 and 1?"), says("assistant", "<think>\nthe sum\n</think>\n\ntwo"),
                        says("user", "2 and 2?"), says("assistant", "<think>\nmore\n</think>\n\nfour")]}
BLANK = {"messages": [says("user", "1 and 1?"), says("assistant", " "), says("user", "So?"), says("assistant", "two")]}
GREETED = {"messages": [says("assistant", "Hello!"), says("user", "1 and 1?"), says("assistant", "two")]}
NEWLINE = {"messages": [says("user", "1 and 1?"), says("assistant", "\n\ntwo")]}
AGAIN = {"messages": [*MULTI["messages"][:3], *MULTI["messages"][1:3]]}
COMPLETION = {"prompt": MULTI["messages"][:4], "completion": MULTI["messages"][4:5]}
QA = {"question": "1 and 1?", "answer": "two\n"}

HELP = "<|im_start|>system\nYou help.<|im_end|>\n"
BRIEF = "<|im_start|>system\nBe brief.<|im_end|>\n"
GIVEN = '[{"type": "function", "function": {"name": "get_weather"}}]'
FUNCTION = '{"name": "get_weather", "arguments": {"city": "Bonn"}}'
ASKED = '<s>[AVAILABLE_TOOLS] ' + GIVEN + '[/AVAILABLE_TOOLS][INST] Weather in Bonn?[/INST]'
CALLED = '[TOOL_CALLS] [' + FUNCTION + ']<eos>'

# template, row -> the rows to train on; what is between « and » is labelled, all else is not
MARKED = [
    ("chatml", SINGLE, [HELP + "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n«How is it?<|im_end|>»"]),
    ("chatml", MULTI, [
        BRIEF + "<|im_start|>user\n1 and 1?<|im_end|>\n<|im_start|>assistant\n«two<|im_end|>»\n"
        "<|im_start|>user\n2 and 2?<|im_end|>\n<|im_start|>assistant\n«four<|im_end|>»"]),
    ("chatml", TOOL, [
        "<|im_start|>system\nYou help.\nTools: " + GIVEN + "<|im_end|>\n"
        "<|im_start|>user\nWeather in Bonn?<|im_end|>\n"
        "<|im_start|>assistant\n«<tool_call>" + FUNCTION + "</tool_call><|im_end|>»\n"
        "<|im_start|>user\n<tool_response>rain</tool_response><|im_end|>\n"
        "<|im_start|>assistant\n«It rains.<|im_end|>»\n<|im_start|>user\nThanks<|im_end|>\n"
        "<|im_start|>assistant\n«bye<|im_end|>»"]),
    ("chatml", BLANK, [
        HELP + "<|im_start|>user\n1 and 1?<|im_end|>\n<|im_start|>assistant\n <|im_end|>\n"
        "<|im_start|>user\nSo?<|im_end|>\n<|im_start|>assistant\n«two<|im_end|>»"]),
    ("chatml", GREETED, [
        HELP + "<|im_start|>assistant\nHello!<|im_end|>\n<|im_start|>user\n1 and 1?<|im_end|>\n"
        "<|im_start|>assistant\n«two<|im_end|>»"]),
    ("chatml", COMPLETION, [
        BRIEF + "<|im_start|>user\n1 and 1?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\n2 and 2?<|im_end|>\n<|im_start|>assistant\n«four<|im_end|>»"]),
    ("chatml", QA, [HELP + "<|im_start|>user\n1 and 1?<|im_end|>\n<|im_start|>assistant\n«two<|im_end|>»"]),
    ("llama", SPACED, [
        "<s><|start_header_id|>user<|end_header_id|>\n\nHello!<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«How is it?<|eot_id|>»"]),
    ("llama", MULTI, [
        "<s><|start_header_id|>system<|end_header_id|>\n\nBe brief.<|eot_id|>"
        "<|start_header_id|>user<|end_header_id|>\n\n1 and 1?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«two<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\n2 and 2?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«four<|eot_id|>»"]),
    ("llama", TOOL, [
        "<s><|start_header_id|>user<|end_header_id|>\n\nFunctions: " + GIVEN + "\n\nWeather in Bonn?<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«<|python_tag|>get_weather {\"city\": \"Bonn\"}<|eom_id|>»"
        "<|start_header_id|>ipython<|end_header_id|>\n\nrain<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«It rains.<|eot_id|>»"
        "<|start_header_id|>user<|end_header_id|>\n\nThanks<|eot_id|>"
        "<|start_header_id|>assistant<|end_header_id|>\n\n«bye<|eot_id|>»"]),
    ("gemma", NO_SYSTEM, [
        "<s><start_of_turn>user\n1 and 1?<end_of_turn>\n<start_of_turn>model\n«two<end_of_turn>»\n"
        "<start_of_turn>user\n2 and 2?<end_of_turn>\n<start_of_turn>model\n«four<end_of_turn>»"]),
    ("mistral", NO_SYSTEM, ["<s>[INST] 1 and 1?[/INST]« two<eos>»[INST] 2 and 2?[/INST]« four<eos>»"]),
    ("mistral", MULTI, [  # the system message is there while an answer is generated, and not in what follows
        "<s>[INST] Be brief.\n\n1 and 1?[/INST]« two<eos>»",
        "<s>[INST] 1 and 1?[/INST] two<eos>[INST] Be brief.\n\n2 and 2?[/INST]« four<eos>»"]),
    ("mistral", AGAIN, [
        "<s>[INST] Be brief.\n\n1 and 1?[/INST]« two<eos>»",
        "<s>[INST] 1 and 1?[/INST] two<eos>[INST] Be brief.\n\n1 and 1?[/INST]« two<eos>»"]),
    ("mistral", TOOL, [
        ASKED + "«" + CALLED + "»",
        ASKED + CALLED + "[TOOL_RESULTS] rain[/TOOL_RESULTS]« It rains.<eos>»",
        "<s>[INST] Weather in Bonn?[/INST]" + CALLED + "[TOOL_RESULTS] rain[/TOOL_RESULTS] It rains.<eos>"
        "[AVAILABLE_TOOLS] " + GIVEN + "[/AVAILABLE_TOOLS][INST] Thanks[/INST]« bye<eos>»"]),
    ("qwen3", SINGLE, [
        "<|im_start|>user\nHello!<|im_end|>\n<|im_start|>assistant\n«<think>\n\n</think>\n\nHow is it?<|im_end|>»"]),
    ("qwen3", THOUGHT, [
        "<|im_start|>user\n1 and 1?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\nthe sum\n</think>\n\ntwo<|im_end|>»",
        "<|im_start|>user\n1 and 1?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>\n"
        "<|im_start|>user\n2 and 2?<|im_end|>\n<|im_start|>assistant\n"
        "«<think>\nmore\n</think>\n\nfour<|im_end|>»"]),
    ("phi3", SINGLE, ["<|user|>\nHello!<|end|>\n<|assistant|>\n«How is it?<|end|>»"]),
    ("phi3", MULTI, [
        "<|system|>\nBe brief.<|end|>\n<|user|>\n1 and 1?<|end|>\n<|assistant|>\n«two<|end|>»\n"
        "<|user|>\n2 and 2?<|end|>\n<|assistant|>\n«four<|end|>»"]),
    ("bare", SINGLE, ["user:\nHello!\nassistant:\n«How is it?<eos>»"]),
    ("bare", NO_SYSTEM, [
        "user:\n1 and 1?\nassistant:\n«two<eos>»",
        "user:\n1 and 1?\nassistant:\ntwo\nuser:\n2 and 2?\nassistant:\n«four<eos>»"]),
]


def unmarked(marked: str) -> tuple[str, list[tuple[int, int]]]:
    """The text without marks, and where the marked spans lie in it."""
    text, spans = "", []
    for i, piece in enumerate(re.split("[«»]", marked)):
        spans += [(len(text), len(text) + len(piece))] if i % 2 else []
        text += piece
    return text, spans


def by_hand(tokenizer: PreTrainedTokenizerFast, marked: str) -> dict[str, list[int]]:
    """The whole text tokenised at once, and labelled where a token lies in a marked span."""
    text, spans = unmarked(marked)
    found = tokenizer(text, add_special_tokens=False, return_offsets_mapping=True)
    labels = [token if any(start <= left and right <= end for start, end in spans) else -100
              for token, (left, right) in zip(found.input_ids, found.offset_mapping, strict=True)]
    assert tokenizer.decode(found.input_ids) == text
    assert {place for left, right in found.offset_mapping for place in (left, right)} >= {
        place for span in spans for place in span}  # no token lies across a mark
    return {"input_ids": found.input_ids, "labels": labels}


def read(tokenizer: PreTrainedTokenizerFast, *rows: dict[str, object], max_length: int = 512,
         new: int = 64) -> Task:
    """The rows as training, validation and test data at once, through the chat template."""
    items = [to_item(row, f"line {number}") for number, row in enumerate(rows, start=1)]
    return tokenised(Task("own", items, items, items, extract, new), tokenizer, max_length, chat=True)


def trained(tokenizer: PreTrainedTokenizerFast, *rows: dict[str, object], max_length: int = 512, new: int = 8):
    return encode_all(read(tokenizer, *rows, max_length=max_length, new=new).train, tokenizer, max_length)[0]


@pytest.mark.parametrize(("name", "row", "marked"), MARKED, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(MARKED)])
def test_labels_equal_the_marked_spans(name, row, marked, tokenizers) -> None:
    tokenizer = tokenizers[name]
    assert trained(tokenizer, row) == [by_hand(tokenizer, text) for text in marked]


@pytest.mark.parametrize(("name", "row", "marked"), MARKED, ids=[f"{name}-{i}" for i, (name, *_) in enumerate(MARKED)])
def test_the_last_answer_is_generated_from_what_it_is_trained_on(name, row, marked, tokenizers) -> None:
    tokenizer = tokenizers[name]
    task = read(tokenizer, row)
    text, spans = unmarked(marked[-1])
    start, end = spans[-1]
    (example,) = task.test
    assert tokenizer.decode(example.tokens.prompt) == example.prompt == text[:start]
    ids = example.tokens.rows[-1]["input_ids"]
    assert ids[:len(example.tokens.prompt)] == example.tokens.prompt
    stop = ids[-1]
    assert stop == tokenizer.eos_token_id or stop in task.stop_ids  # generation ends where training does
    said = text[start:end].removesuffix(tokenizer.decode([stop]))
    for token in SPECIAL[name]:
        said = said.replace(token, "")
    assert example.label == said.strip()
    assert task.extract(f"\n{example.label} ", example) == example.label
    assert task.max_new_tokens == len(ids) - len(example.tokens.prompt)


@pytest.mark.parametrize("like_gpt2", [False, True])
@pytest.mark.parametrize(("name", "row"), [
    (name, row) for name in ("chatml", "llama", "mistral", "qwen3", "phi3", "bare")
    for row in (MULTI, NO_SYSTEM, THOUGHT, NEWLINE, *([TOOL] if name in ("chatml", "llama", "mistral") else []))])
def test_every_answer_is_learned_once_after_what_it_is_generated_from(row, name, like_gpt2) -> None:
    """Before each labelled run stand the very ids of the template's generation prompt; the run is the answer."""
    tokenizer, messages = build(name, like_gpt2=like_gpt2), row["messages"]
    expected = {}
    for place, message in enumerate(messages):
        if message["role"] == "assistant":
            prompt = tokenizer.apply_chat_template(messages[:place], tools=row.get("tools"), return_dict=False,
                                                   add_generation_prompt=True)
            expected[tuple(prompt)] = message["content"].strip() or "get_weather"
    for encoded in trained(tokenizer, row):
        ids, labels = encoded["input_ids"], encoded["labels"]
        assert all(label in (-100, token) for label, token in zip(labels, ids, strict=True))
        starts = [i for i in range(1, len(ids)) if labels[i] != -100 and labels[i - 1] == -100]
        for start in starts:
            end = next((i for i in range(start, len(ids)) if labels[i] == -100), len(ids))
            text = tokenizer.decode(ids[start:end])
            assert expected.pop(tuple(ids[:start])) in text
            assert text.endswith(tuple(token for token in (*SPECIAL[name], "<eos>") if token))
            assert len(text) < 100
    assert not expected


def test_generation_marks_of_a_template_do_not_count(tokenizers) -> None:
    """They are put around the user's text here."""
    wrong = CHATML.replace("{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}",
                           "{% generation %}{{ '<|im_start|>user\n' + m.content + '<|im_end|>\n' }}{% endgeneration %}")
    assert wrong != CHATML
    assert trained(build("chatml", wrong), MULTI) == trained(tokenizers["chatml"], MULTI)


@pytest.mark.parametrize("name", ["chatml", "phi3", "llama"])
def test_random_conversations(name, tokenizers) -> None:
    """Against the template written out in Python, with marks."""
    rng, words = random.Random(0), ["one", "and", "two?", "It", "rains.", "☀", "four", "\n", "Bonn"]
    for _ in range(15):
        system = [says("system", "Be brief.")] * rng.randint(0, 1)
        talk = [says(role, f"x {' '.join(rng.choices(words, k=rng.randint(0, 9)))} y") for _ in range(rng.randint(1, 4))
                for role in ("user", "assistant")]
        assert trained(tokenizers[name], {"messages": system + talk}) == [
            by_hand(tokenizers[name], written(name, system + talk))]


def written(name: str, messages: list[dict[str, object]]) -> str:
    begin, middle, end = {"chatml": ("<|im_start|>", "\n", "<|im_end|>"), "phi3": ("<|", "|>\n", "<|end|>"),
                          "llama": ("<|start_header_id|>", "<|end_header_id|>\n\n", "<|eot_id|>")}[name]
    text = {"chatml": HELP if messages[0]["role"] != "system" else "", "phi3": "", "llama": "<s>"}[name]
    for message in messages:
        said = message["content"] + end
        text += begin + message["role"] + middle + (f"«{said}»" if message["role"] == "assistant" else said)
        text += "" if name == "llama" else "\n"
    return text.rstrip("\n")


def test_an_answer_that_would_melt_into_its_prompt_is_tokenised_apart(tokenizers) -> None:
    """"assistant\\n" + "\\n\\ntwo": a tokenizer joins the line breaks, but the prompt is read before the answer is."""
    tokenizer = tokenizers["chatml"]
    (row,) = trained(tokenizer, NEWLINE)
    prompt = tokenizer.apply_chat_template(NEWLINE["messages"][:1], add_generation_prompt=True, return_dict=False)
    whole = tokenizer.apply_chat_template(NEWLINE["messages"], return_dict=False)
    assert whole[:len(prompt)] != prompt  # or this test shows nothing
    answer = tokenizer("\n\ntwo<|im_end|>", add_special_tokens=False).input_ids
    assert row == {"input_ids": prompt + answer, "labels": [-100] * len(prompt) + answer}


def test_arguments_written_as_text_are_those_of_an_object(tokenizers) -> None:
    text = {**CALL, "function": {"name": "get_weather", "arguments": '{"city": "Bonn"}'}}
    row = {"tools": TOOLS, "messages": [TOOL["messages"][0], says("assistant", None, tool_calls=[text]),
                                        *TOOL["messages"][2:]]}
    for name in ("chatml", "llama", "mistral"):
        assert trained(tokenizers[name], row) == trained(tokenizers[name], TOOL)


# ---------------------------------------------------------------- too long


def lengthened(count: int) -> dict[str, object]:
    """A system message and `count` questions with their answers."""
    return {"messages": [says("system", "Be brief."), *(says(role, f"{role} number {i} " + "and so " * (i % 3))
                                                        for i in range(count) for role in ("user", "assistant"))]}


@pytest.mark.parametrize("name", ["chatml", "llama", "phi3", "bare", "qwen3", "mistral"])
@pytest.mark.parametrize("max_length", [90, 120, 200])
def test_a_long_conversation_loses_its_oldest_exchanges(name, max_length, tokenizers) -> None:
    """Every answer is kept whole, after the longest history of whole exchanges that fits, system message included."""
    tokenizer, talk = tokenizers[name], lengthened(6)
    messages = talk["messages"]
    rows = trained(tokenizer, talk, max_length=max_length)
    assert len(rows) == 6
    for number, row in enumerate(rows):
        answer = [label for label in row["labels"] if label != -100]
        assert row["input_ids"][-len(answer):] == answer
        last = 2 + 2 * number  # the place of the answer
        assert messages[last]["content"].strip() in tokenizer.decode(answer)
        histories = [[messages[0], *messages[first:last]] for first in range(1, last, 2)]
        prompts = [tokenizer.apply_chat_template(history, add_generation_prompt=True, return_dict=False)
                   for history in histories]
        fitting = [prompt for prompt in prompts if len(prompt) + len(answer) <= max_length]
        assert row["input_ids"][:-len(answer)] == max(fitting, key=len)


def test_the_last_question_loses_its_beginning(tokenizers) -> None:
    tokenizer = tokenizers["chatml"]
    long = {"messages": [says("system", "Be brief."), says("user", "Hello!"), says("assistant", "bye"),
                         says("user", "a very long question ☀ " * 40 + "1 and 1?"), says("assistant", "two")]}
    task = read(tokenizer, long, max_length=60, new=8)
    short, row = encode_all(task.train, tokenizer, 60)[0]
    text = tokenizer.decode(row["input_ids"])
    assert text.startswith(BRIEF + "<|im_start|>user\n")
    assert text.endswith("1 and 1?<|im_end|>\n<|im_start|>assistant\ntwo<|im_end|>")
    assert 50 <= len(row["input_ids"]) <= 60
    assert tokenizer.decode([token for token in row["labels"] if token != -100]) == "two<|im_end|>"
    assert "bye<|im_end|>" in tokenizer.decode(short["input_ids"])
    prompt = task.test[0].tokens.prompt  # leaves room for what is generated, however long the true answer is
    assert len(prompt) <= 60 - task.max_new_tokens
    assert tokenizer.decode(prompt).endswith("1 and 1?<|im_end|>\n<|im_start|>assistant\n")


def test_an_answer_that_does_not_fit_is_left_out_and_counted(tokenizers, caplog) -> None:
    tokenizer = tokenizers["chatml"]
    endless = {"messages": [says("user", "1 and 1?"), says("assistant", "two and " * 60)]}
    half = {"messages": [*endless["messages"], says("user", "So?"), says("assistant", "two")]}
    silent = {"messages": [says("user", "Hello?")]}
    rows = trained(tokenizer, endless, SINGLE, half, silent, {"messages": []}, max_length=80)
    assert [tokenizer.decode([token for token in row["labels"] if token != -100]) for row in rows] == [
        "How is it?<|im_end|>", "two<|im_end|>"]
    assert "3 of 5 train rows are left out (no answer: 2; none that fits max_length 80: 1)" in caplog.text
    assert "in the other train rows, 1 answers do not fit max_length 80 and are left out" in caplog.text
    with pytest.raises(InputError, match=r"of the 2 train rows none has an answer that can be learned \(no answer: 1; "
                                         r"none that fits max_length 80: 1\)"):
        read(tokenizer, endless, silent, max_length=80)


def test_no_room_for_a_prompt(tokenizers) -> None:
    """The test row's tool result fits beside its own short answer, but not beside as many tokens as others need."""
    talkative = {"messages": [says("user", "1 and 1?"), says("assistant", "two and " * 17)]}
    tool = {"messages": [*TOOL["messages"][:2], says("tool", "rain and " * 15), says("assistant", "bye")]}
    items = [to_item(row, "line 1") for row in (talkative, tool)]
    task = Task("own", items[:1], items[:1], items[1:], extract, 64)
    assert len(tokenised(task, tokenizers["chatml"], 512, True).test) == 1
    with pytest.raises(InputError, match="max_length leaves no test prompt any room beside .. new tokens"):
        tokenised(task, tokenizers["chatml"], 110, True)


# ---------------------------------------------------------------- what is refused


@pytest.mark.parametrize(("name", "row", "sentence"), [
    ("gemma", MULTI, r"^line 1: the model's chat template refuses the conversation \(System role not supported\)"),
    ("gemma", {"messages": [SINGLE["messages"][0]] * 2 + SINGLE["messages"][1:]}, "Roles must alternate"),
    ("phi3", TOOL, r"^line 1: the chat template does not write tool calls \(message 2\): give a model that"),
    ("reasoner", SINGLE, r"line 1: the chat template opens an answer with .*<think>.* what to learn is not defined"),
])
def test_a_template_that_cannot(name, row, sentence, tokenizers) -> None:
    with pytest.raises(InputError, match=sentence):
        read(tokenizers[name], row)


@pytest.mark.parametrize(("template", "sentence"), [
    ("{% for m in messages %}{{ m.nothing + 1 }}{% endfor %}", "template refuses the conversation .*nothing"),
    ("{% for m in messages %}", "template refuses the conversation"),
    ("{{ messages[0].content }}", "does not write what an assistant says"),
])
def test_a_broken_template(template, sentence) -> None:
    with pytest.raises(InputError, match=sentence):
        read(build("chatml", template), SINGLE)


def test_an_earlier_question_is_not_taken_for_the_last() -> None:
    """A template that writes the last question otherwise once it is answered, and the same question earlier as it was:
    where the answer begins cannot be told, and it is not said to begin after the earlier one."""
    moving = build("mistral", "{% for m in messages %}{% if m.role == 'assistant' %}{{ m.content + eos_token }}"
                              "{% elif loop.revindex0 == 1 %}{{ '(' + m.content + ')' }}"
                              "{% else %}{{ '[' + m.content + ']' }}{% endif %}{% endfor %}")
    with pytest.raises(InputError, match="what to learn is not defined"):
        read(moving, {"prompt": AGAIN["messages"][1:4], "completion": AGAIN["messages"][4:]})


def test_no_template_and_no_end_token() -> None:
    tokenizer = build("bare")
    tokenizer.eos_token = None
    with pytest.raises(InputError, match="no end-of-sequence token"):
        read(tokenizer, SINGLE)
    tokenizer.chat_template = None
    with pytest.raises(InputError, match="line 1 is to be read as a conversation.*no chat template: give an"):
        read(tokenizer, SINGLE)


def test_a_conversation_says_which_answers_are_learned() -> None:
    talk = Conversation("line 1", TOOL["messages"])
    assert talk.answers() == [1, 3, 5]
    assert talk._replace(first=3).answers() == [3, 5]
    assert Conversation("line 1", GREETED["messages"]).answers() == [2]
