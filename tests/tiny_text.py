"""For tests about text: a tiny tokenizer, a random tiny decoder, and a row of every task with the example it makes."""
from __future__ import annotations

import torch
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast, Qwen2Config, Qwen2ForCausalLM

from stt.dataset import Example, clutrr

SENTENCES = [
    "Ada met her brother Ben. How is Ben related to Ada? Ben is Ada's brother, sister, mother or father.",
    "Which of these is warm? A. ice B. a fire C. the moon D. snow Answer: B",
    "The sea is salt water. Question: is the sea salty? Answer: yes, no, no, yes",
    "Her daughter-in-law has a nephew and a niece, an aunt and an uncle, a grandson and a granddaughter.",
]
CHAT_TEMPLATE = ("{% for message in messages %}<turn>{{ message['role'] }}\n{{ message['content'] }}<end>\n{% endfor %}"
                 "{% if add_generation_prompt %}<turn>assistant\n{% endif %}")

STORY = {"id": "1", "story": "[Ada] met her brother [Ben]. [Ben] has a son, [Carl].", "query": "('Ada', 'Carl')",
         "target": 14, "target_text": "nephew"}
PASSAGE = {"question": "is the sea salty", "answer": True, "passage": "The sea is salt water."}
ARC = {"id": "q1", "question": "Which of these is warm?", "answerKey": "2",
       "choices": {"text": ["ice", "a fire", "snow"], "label": ["1", "2", "3"]}}
OBQA = {"id": "q2", "question_stem": "A fire is", "answerKey": "D",
        "choices": {"text": ["wet", "cold", "ice", "warm"], "label": ["A", "B", "C", "D"]}}
ROWS = {"clutrr": STORY, "boolq": PASSAGE, "arc-e": ARC, "arc-c": ARC, "obqa": OBQA}
EXPECTED = {
    "clutrr": Example("Ada met her brother Ben. Ben has a son, Carl.\nHow is Carl related to Ada? Carl is Ada's",
                      " nephew", "nephew", clutrr.RELATIONS),
    "boolq": Example("The sea is salt water.\nQuestion: is the sea salty?\nAnswer:", " yes", "yes", ("yes", "no")),
    "arc-e": Example("Which of these is warm?\nA. ice\nB. a fire\nC. snow\nAnswer:", " B", "B", ("A", "B", "C")),
    "arc-c": Example("Which of these is warm?\nA. ice\nB. a fire\nC. snow\nAnswer:", " B", "B", ("A", "B", "C")),
    "obqa": Example("A fire is\nA. wet\nB. cold\nC. ice\nD. warm\nAnswer:", " D", "D", ("A", "B", "C", "D")),
}


def build_tokenizer(bos: bool = False, chat: bool = False) -> PreTrainedTokenizerFast:
    """About 350 tokens. `bos`: every text begins with <begin>, as for Llama; `chat`: a template of one line a turn."""
    special = ["<pad>", "<end>", "<begin>", "<turn>"]
    core = Tokenizer(models.BPE())
    core.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    core.decoder = decoders.ByteLevel()
    core.train_from_iterator(SENTENCES * 3, trainers.BpeTrainer(
        vocab_size=350, special_tokens=special, show_progress=False,
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet()))
    if bos:
        core.post_processor = processors.TemplateProcessing(
            single="<begin> $A", special_tokens=[("<begin>", core.token_to_id("<begin>"))])
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", pad_token="<pad>",
                                   bos_token="<begin>" if bos else None, extra_special_tokens=["<turn>"],
                                   chat_template=CHAT_TEMPLATE if chat else None)


def build_decoder(vocabulary: int, layers: int = 2) -> Qwen2ForCausalLM:
    """A random Qwen2 in float32, loud enough that its greedy answers differ from prompt to prompt."""
    torch.manual_seed(0)
    config = Qwen2Config(vocab_size=vocabulary, hidden_size=32, intermediate_size=64, num_hidden_layers=layers,
                         num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=512,
                         initializer_range=0.3, bos_token_id=None, eos_token_id=None, pad_token_id=None)
    return Qwen2ForCausalLM(config).eval()
