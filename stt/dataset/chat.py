"""Conversations through a tokenizer's chat template: what is read, what is to be answered, what a long one loses.

The answer of turn i is what the template writes for messages[:i + 1] after what it writes for messages[:i] with the
generation prompt, up to and with the token that ends the turn. {% generation %} marks of a template are not read.
"""
from __future__ import annotations

from bisect import bisect_left
from collections.abc import Callable, Mapping, Sequence
from typing import TYPE_CHECKING, NamedTuple

from jinja2 import TemplateError

from stt.errors import InputError

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

PROBE = "7 aardvarks"  # an assistant's text that no template writes by itself

Message = Mapping[str, object]  # role, content and whatever else the template knows (tool_calls, name, ...)


class Turn(NamedTuple):
    """The token ids a model reads, and those it must go on with; the last one ends the turn."""

    prompt: list[int]
    answer: list[int]


class Conversation(NamedTuple):
    """Messages, as transformers' apply_chat_template takes them."""

    where: str                              # begins every complaint
    messages: Sequence[Message]
    tools: Sequence[Message] | None = None
    first: int = 0                          # answers before this place are only read

    def answers(self) -> list[int]:
        """The places of the messages to learn: the assistant's, if they say something to something said before."""
        return [place for place, message in enumerate(self.messages)
                if place >= max(self.first, 1) and message["role"] == "assistant"
                and (message.get("tool_calls") or message["content"].strip())]


class Template:
    """A tokenizer's chat template. Raises InputError for one that does not write what an assistant says."""

    def __init__(self, tokenizer: PreTrainedTokenizerBase):
        self.tokenizer = tokenizer
        self._special = {id for id, token in tokenizer.added_tokens_decoder.items() if token.special}
        talk = [{"role": "user", "content": "How many?"}, {"role": "assistant", "content": PROBE}]
        _, found, tail = render(tokenizer, talk, None, False, "a question and its answer").rpartition(PROBE)
        if not found:
            raise InputError("the tokenizer's chat template does not write what an assistant says: give another model.")
        own_ends = (id for id in self._ids(tail) if id in tokenizer.added_tokens_decoder)
        self._end = next(own_ends, end_id(tokenizer))

    def turns(self, conversation: Conversation) -> list[Turn]:
        """Every answer to learn, with all that comes before it."""
        return [self._turn(conversation, place) for place in conversation.answers()]

    def fitted(self, conversation: Conversation, turn: int, room: int) -> list[int] | None:
        """What is read before the answer `turns(conversation)[turn]`, in at most `room` tokens; None if it cannot be.

        The oldest exchanges are left out first (a question and all up to the next one; a system message stays), then
        the beginning of the last question.
        """
        place = conversation.answers()[turn]
        history = list(conversation.messages[:place])
        lead = next((i for i, message in enumerate(history) if message["role"] != "system"), place)
        questions = [i for i in range(lead, place) if history[i]["role"] == "user"]
        starts = sorted({lead, *questions})

        def write(messages: Sequence[Message]) -> list[int]:
            return self._ids(render(self.tokenizer, messages, conversation.tools, True, conversation.where))

        def after(start: int) -> list[int]:
            return write(history[:lead] + history[start:])

        kept = bisect_left(starts, True, key=lambda start: len(after(start)) <= room)
        if kept < len(starts):
            return after(starts[kept])
        if not questions:
            return None
        last = questions[-1]
        return cut_left(str(history[last]["content"]), self.tokenizer, room, lambda text: write(
            history[:lead] + [{**history[last], "content": text}] + history[last + 1:]))

    def _turn(self, conversation: Conversation, place: int) -> Turn:
        messages, tools, where = conversation.messages, conversation.tools, conversation.where
        opened = render(self.tokenizer, messages[:place], tools, True, where)
        closed = render(self.tokenizer, messages[:place + 1], tools, False, where)
        start = len(opened) if closed.startswith(opened) else self._start(conversation, place, opened, closed)
        prompt, text = self._ids(opened), closed[start:]
        for call in messages[place].get("tool_calls", ()):
            if call.get("function", call)["name"] not in text:
                raise InputError(f"{where}: the chat template does not write tool calls (message {place + 1}): give a"
                                 " model that knows tools, or leave the row out.")
        answer = self._after(opened, prompt, text)
        if self._end in answer:
            return Turn(prompt, answer[:len(answer) - answer[::-1].index(self._end)])
        answer = self._after(opened, prompt, text.rstrip())  # the template ends this turn otherwise, or never ends one
        return Turn(prompt, answer if answer and answer[-1] in self._special else [*answer, self._end])

    def _start(self, conversation: Conversation, place: int, opened: str, closed: str) -> int:
        """Where in `closed` the answer begins, if its history is written otherwise than in `opened` (Mistral's template
        leaves the system message out once there is an answer): after the last thing said and what follows it there."""
        history, where = conversation.messages[:place], conversation.where
        probed = render(self.tokenizer, [*history, {"role": "assistant", "content": PROBE}], conversation.tools, False,
                        where).rpartition(PROBE)[0]
        said = str(history[-1]["content"]).strip()
        tail = opened[opened.rindex(said):] if said and said in opened else opened
        start = probed.rfind(tail) + len(tail)
        if tail not in probed or probed[start:].strip() or not closed.startswith(probed[:start]):
            raise InputError(f"{where}: the chat template opens an answer with {opened[-30:]!r}, but does not begin a"
                             " given answer with it, so what to learn is not defined: give another template.")
        return start

    def _after(self, opened: str, prompt: list[int], text: str) -> list[int]:
        """The ids of `text` where it stands; those of `text` alone if its first token would take in some of `opened`,
        which it cannot when it is generated."""
        whole = self._ids(opened + text)
        return whole[len(prompt):] if whole[:len(prompt)] == prompt else self._ids(text)

    def _ids(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False, verbose=False).input_ids  # templates write their own BOS


def end_id(tokenizer: PreTrainedTokenizerBase) -> int:
    """The tokenizer's end token. Raises InputError if it has none."""
    if tokenizer.eos_token_id is None:
        raise InputError("the tokenizer has no end-of-sequence token, so an answer could never end:"
                         " set eos_token in its tokenizer_config.json.")
    return tokenizer.eos_token_id


def render(tokenizer: PreTrainedTokenizerBase, messages: Sequence[Message], tools: Sequence[Message] | None,
           is_open: bool, where: str) -> str:
    """The text the chat template writes, `is_open` for an answer. Raises InputError if it refuses the messages."""
    try:
        return tokenizer.apply_chat_template(list(messages), tools=tools, add_generation_prompt=is_open, tokenize=False)
    except (TemplateError, TypeError, ValueError) as error:
        reason = (str(error).strip() or type(error).__name__).splitlines()[0].rstrip(".")
        raise InputError(f"{where}: the model's chat template refuses the conversation ({reason}): change its roles or"
                         " give another model.") from error


def cut_left(text: str, tokenizer: PreTrainedTokenizerBase, room: int,
             write: Callable[[str], list[int]]) -> list[int] | None:
    """`write(text)`, with as many tokens of the text gone on the left as brings it to `room`; None if none is left."""
    ids, content = write(text), tokenizer(text, add_special_tokens=False, verbose=False).input_ids
    while len(ids) > room:
        content = content[len(ids) - room:]
        if not content:
            return None
        ids = write(tokenizer.decode(content))
    return ids
