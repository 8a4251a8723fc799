"""Generation against a loop without padding or cache, perplexity against a loop over tokens, speed on a fake clock."""
from __future__ import annotations

import logging
import math
import statistics

import pytest
import torch
from peft import LoraConfig, get_peft_model
from tiny_text import build_decoder, build_tokenizer
from transformers import GenerationConfig, Qwen2ForCausalLM

from stt import dataset, evaluate
from stt.dataset import Example, Task, boolq
from stt.errors import InputError
from stt.evaluate import throughput
from stt.evaluate.perplexity import TextScore

WORDS = ["Ada", "met", "her", "brother", "Ben", "and", "the", "sea", "is", "salt", "water", "so", "a", "fire", "is",
         "warm"]
LENGTHS = {1: "yes", 11: "no", 4: "yes", 7: "yes", 2: "no", 9: "no", 3: "yes"}  # words of a prompt -> its label
EXAMPLES = [Example(" ".join(WORDS[i % 5:i % 5 + length]), f" {label}", label, ("yes", "no"))
            for i, (length, label) in enumerate(LENGTHS.items())]
TASK = Task("boolq", EXAMPLES, EXAMPLES, EXAMPLES, boolq.extract, 6)
TEXT = "Ada met her brother Ben. The sea is salt water, and a fire is warm; the moon is not. " * 4


@pytest.fixture(autouse=True)
def one_thread() -> None:
    torch.set_num_threads(1)


@pytest.fixture(scope="module")
def tokenizer():
    return build_tokenizer()


@pytest.fixture
def model(tokenizer) -> Qwen2ForCausalLM:
    return build_decoder(len(tokenizer))


def greedy_one_by_one(model: Qwen2ForCausalLM, prompt: list[int], end: int, max_new_tokens: int) -> list[int]:
    """No padding, no cache: the whole text again for each token."""
    ids = list(prompt)
    for _ in range(max_new_tokens):
        with torch.no_grad():
            ids.append(int(model(torch.tensor([ids])).logits[0, -1].argmax()))
        if ids[-1] == end:
            break
    return ids[len(prompt):]


def modes(model: torch.nn.Module) -> list[bool]:
    return [module.training for module in model.modules()]


def half_trained(model: Qwen2ForCausalLM) -> list[bool]:
    """Train mode but for one layer, so that "restore" cannot be a plain model.train()."""
    model.train()
    model.model.layers[0].eval()
    return modes(model)


# ------------------------------------------------------------------------------------------------------- generation


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("batch_size", [1, 3, 7, 50])
def test_answers_equal_generation_one_by_one(model, tokenizer, batch_size: int, side: str) -> None:
    tokenizer = build_tokenizer()
    tokenizer.padding_side = side
    before = half_trained(model)
    rows = evaluate.generate_answers(model, tokenizer, TASK, EXAMPLES, batch_size)
    assert modes(model) == before
    assert tokenizer.padding_side == side
    model.eval()
    for row, example in zip(rows, EXAMPLES, strict=True):
        ids = greedy_one_by_one(model, tokenizer(example.prompt).input_ids, tokenizer.eos_token_id, 6)
        response = tokenizer.decode(ids, skip_special_tokens=True)
        prediction = boolq.extract(response, example)
        assert row == {"prompt": example.prompt, "response": response, "prediction": prediction, "label": example.label,
                       "correct": prediction == example.label}
    assert len({row["response"] for row in rows}) > 3  # the random model does tell the prompts apart


def test_answers_stop_at_the_end_token(model, tokenizer) -> None:
    free = greedy_one_by_one(model, tokenizer(EXAMPLES[1].prompt).input_ids, -1, 6)
    stop = next(token for token in free[1:] if token != free[0])  # ends this answer, not (all) the others
    ending = build_tokenizer()
    ending.eos_token = ending.convert_ids_to_tokens(stop)
    rows = evaluate.generate_answers(model, ending, TASK, EXAMPLES, batch_size=7)
    assert rows[1]["response"] == tokenizer.decode(free[:free.index(stop)], skip_special_tokens=True)
    for row, example in zip(rows, EXAMPLES, strict=True):
        ids = greedy_one_by_one(model, tokenizer(example.prompt).input_ids, stop, 6)
        assert row["response"] == tokenizer.decode([i for i in ids if i != stop], skip_special_tokens=True)


@pytest.mark.filterwarnings("ignore:.*is_gradient_checkpointing:FutureWarning")  # read by peft 0.21
@pytest.mark.parametrize("wrapped", [False, True])
def test_the_models_own_generation_settings_do_not_count(model, tokenizer, wrapped: bool) -> None:
    class Warnings(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            raise AssertionError(record.getMessage())

    plain = evaluate.generate_answers(model, tokenizer, TASK, EXAMPLES, 4)
    model.generation_config = own = GenerationConfig(
        do_sample=True, temperature=3.0, top_k=5, top_p=0.3, repetition_penalty=5.0, no_repeat_ngram_size=1,
        num_beams=3, max_length=20, min_new_tokens=6, eos_token_id=5, suppress_tokens=list(range(200)))
    model.config.use_cache = False  # as after training with activation checkpointing
    asked = get_peft_model(model, LoraConfig(target_modules=["q_proj"], task_type="CAUSAL_LM")) if wrapped else model
    handler = Warnings(logging.WARNING)
    logging.getLogger("transformers").addHandler(handler)
    try:
        assert evaluate.generate_answers(asked, tokenizer, TASK, EXAMPLES, 4) == plain
    finally:
        logging.getLogger("transformers").removeHandler(handler)
    assert model.generation_config is own


@pytest.mark.parametrize(("bos", "chat", "max_length"), [(False, False, 512), (True, False, 14), (True, True, 30)])
def test_the_model_reads_the_prompt_it_was_trained_on(bos: bool, chat: bool, max_length: int,
                                                      monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer, read = build_tokenizer(bos, chat), []
    model = build_decoder(len(tokenizer))
    plain_generate = model.generate

    def generate(input_ids: torch.Tensor, attention_mask: torch.Tensor, **rest: object) -> torch.Tensor:
        assert torch.equal(attention_mask, attention_mask.sort(dim=1).values)  # padding on the left only
        read.extend(tuple(ids[mask.bool()].tolist()) for ids, mask in zip(input_ids, attention_mask, strict=True))
        return plain_generate(input_ids=input_ids, attention_mask=attention_mask, **rest)

    monkeypatch.setattr(model, "generate", generate)
    evaluate.generate_answers(model, tokenizer, TASK, EXAMPLES, 3, chat=chat, max_length=max_length)
    rows = [dataset.encode(example, tokenizer, max_length, chat) for example in EXAMPLES]
    trained = [tuple(i for i, label in zip(row["input_ids"], row["labels"], strict=True) if label == -100)
               for row in rows]
    assert sorted(read) == sorted(trained)


def test_autocast_leaves_the_parameters_alone(model, tokenizer) -> None:
    before = {name: value.clone() for name, value in model.state_dict().items()}
    rows = evaluate.generate_answers(model, tokenizer, TASK, EXAMPLES, 3, autocast_dtype=torch.bfloat16)
    assert len(rows) == len(EXAMPLES)
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())
    model.train()  # nothing made under inference_mode may reach a later backward pass
    ids = torch.tensor([[1, 2, 3]])
    model(input_ids=ids, labels=ids).loss.backward()


def test_accuracy_and_majority() -> None:
    assert evaluate.accuracy([{"correct": True}, {"correct": False}, {"correct": True}, {"correct": True}]) == 0.75
    assert evaluate.majority_accuracy(EXAMPLES, EXAMPLES[:3]) == 2 / 3  # "yes" 4 times of 7 in train
    assert evaluate.majority_accuracy(EXAMPLES[:2], EXAMPLES[:3]) == 1 / 3  # a tie: "no" is first in the alphabet


def test_generation_refuses(model, tokenizer) -> None:
    with pytest.raises(InputError, match="no examples to answer"):
        evaluate.generate_answers(model, tokenizer, TASK, [], 2)
    with pytest.raises(InputError, match="batch size must be at least 1, got 0"):
        evaluate.generate_answers(model, tokenizer, TASK, EXAMPLES, 0)
    with pytest.raises(InputError, match="no answers to count"):
        evaluate.accuracy([])
    with pytest.raises(InputError, match="no examples to count"):
        evaluate.majority_accuracy([], EXAMPLES)
    model.config.max_position_embeddings = 16
    with pytest.raises(InputError, match="pass the 16 positions of the model: set max_length to at most 10"):
        evaluate.generate_answers(model, tokenizer, TASK, EXAMPLES, 2)


# ------------------------------------------------------------------------------------------------------- perplexity


def slow_nll(model: Qwen2ForCausalLM, ids: list[int], begin: list[int], max_length: int) -> list[float]:
    nll, step = [], max_length - len(begin)
    for start in range(0, len(ids), step):
        chunk = begin + ids[start:start + step]
        for place in range(1, len(chunk)):
            with torch.no_grad():
                logits = model(torch.tensor([chunk[:place]])).logits[0, -1].double()
            nll.append(-float(logits.log_softmax(-1)[chunk[place]]))
    return nll


@pytest.mark.parametrize("bos", [False, True])
@pytest.mark.parametrize("max_length", [2, 13, 1000])
def test_perplexity_equals_a_loop_over_tokens(bos: bool, max_length: int) -> None:
    tokenizer = build_tokenizer(bos)
    model = build_decoder(len(tokenizer))
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    expected = slow_nll(model, ids, [tokenizer.bos_token_id] if bos else [], max_length)
    before = half_trained(model)
    for batch_size in (1, 4, 100):
        score = evaluate.score_text(model, tokenizer, TEXT, max_length, batch_size)
        assert score.tokens == len(expected)
        assert score.nll == pytest.approx(sum(expected), rel=1e-5)
        assert evaluate.perplexity(model, tokenizer, TEXT, max_length, batch_size) == score.perplexity
        assert score.perplexity == pytest.approx(math.exp(sum(expected) / len(expected)), rel=1e-4)
    assert modes(model) == before


def test_a_last_chunk_of_one_token_is_not_scored(model, tokenizer) -> None:
    ids = tokenizer(TEXT, add_special_tokens=False).input_ids
    assert evaluate.score_text(model, tokenizer, TEXT, max_length=len(ids) - 1).tokens == len(ids) - 2


def test_perplexity_beyond_floats_is_infinite() -> None:
    assert TextScore(nll=1e4, tokens=1).perplexity == math.inf


def test_perplexity_refuses(model, tokenizer) -> None:
    for text in ("", "A"):
        with pytest.raises(InputError, match="empty or a single token"):
            evaluate.perplexity(model, tokenizer, text)
    for max_length, batch_size in ((1, 4), (8, 0)):
        with pytest.raises(InputError, match="max_length >= 2 and batch_size >= 1"):
            evaluate.perplexity(model, tokenizer, TEXT, max_length, batch_size)


# ------------------------------------------------------------------------------------------------------- throughput


def prompts(rows: int = 3, length: int = 8) -> dict[str, torch.Tensor]:
    ids = torch.randint(4, 200, (rows, length), generator=torch.Generator().manual_seed(0))
    return {"input_ids": ids, "attention_mask": torch.ones_like(ids)}


def test_throughput_takes_turns_and_reports_medians(monkeypatch: pytest.MonkeyPatch) -> None:
    seconds = {"dense": [2.0, 8.0, 3.0, 4.0, 5.0], "sliced": [1.0, 2.0, 2.0, 3.0, 1.0]}
    asked, left = [], {name: iter(values) for name, values in seconds.items()}

    def measure(model: str, batch: object, new_tokens: int, autocast_dtype: object) -> dict[str, float]:
        asked.append((model, new_tokens))
        value = 9.9 if new_tokens == throughput.WARM_UP_TOKENS else next(left[model])
        return {"prefill_seconds": value, "decode_tokens_per_second": 30 / value,
                "latency_seconds_per_token": value / 10}

    monkeypatch.setattr(throughput, "_measure", measure)
    result = evaluate.compare_throughput("dense", "sliced", prompts(), new_tokens=10, rounds=5)
    warm_up, counted = asked[:2], [model for model, _ in asked[2:]]
    assert warm_up == [("dense", 2), ("sliced", 2)]
    assert counted == ["dense", "sliced", "sliced", "dense", "dense", "sliced", "sliced", "dense", "dense", "sliced"]
    assert (result["batch_size"], result["prompt_tokens"], result["new_tokens"], result["rounds"]) == (3, 8, 10, 5)
    for name, values in seconds.items():
        assert result[name]["prefill_seconds"] == statistics.median(values)
        assert result[name]["decode_tokens_per_second"] == pytest.approx(30 / statistics.median(values))
    ratios = [fast / slow for slow, fast in zip(seconds["dense"], seconds["sliced"], strict=True)]
    assert result["ratio"]["prefill_seconds"] == statistics.median(ratios) == 0.5  # not the ratio of the medians
    assert result["ratio"]["decode_tokens_per_second"] == pytest.approx(2.0)


def test_throughput_runs_one_prefill_and_n_single_token_steps(model) -> None:
    before, shapes = half_trained(model), []
    model.register_forward_pre_hook(
        lambda _, args, given: shapes.append((tuple(given["input_ids"].shape), given["attention_mask"].shape[1],
                                              model.training, torch.is_inference_mode_enabled())), with_kwargs=True)
    result = evaluate.compare_throughput(model, None, prompts(), new_tokens=4, rounds=1)
    assert modes(model) == before
    assert shapes[-5:] == [((3, 8), 8, False, True)] + [((3, 1), 8 + step, False, True) for step in (1, 2, 3, 4)]
    assert set(result) == {"batch_size", "prompt_tokens", "new_tokens", "rounds", "dense"}
    speed = result["dense"]
    assert all(value > 0 for value in speed.values())
    assert speed["latency_seconds_per_token"] * speed["decode_tokens_per_second"] == pytest.approx(3)


def test_throughput_sees_a_smaller_model(model, tokenizer) -> None:
    big = build_decoder(len(tokenizer), layers=20)
    ratio = evaluate.compare_throughput(big, model, prompts(2, 64), new_tokens=4, rounds=3)["ratio"]
    assert ratio["prefill_seconds"] < 0.9
    assert ratio["latency_seconds_per_token"] < 0.9
    assert ratio["decode_tokens_per_second"] > 1.1


def test_throughput_refuses(model) -> None:
    for new_tokens, rounds in ((0, 1), (1, 0)):
        with pytest.raises(InputError, match="at least 1 new token and 1 round"):
            evaluate.compare_throughput(model, None, prompts(), new_tokens, rounds)


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a CUDA GPU")
def test_all_three_on_a_gpu(tokenizer) -> None:
    model = build_decoder(len(tokenizer)).cuda()
    on_gpu = evaluate.generate_answers(model, tokenizer, TASK, EXAMPLES, 4)
    assert on_gpu == evaluate.generate_answers(model, tokenizer, TASK, EXAMPLES, 1)
    assert math.isfinite(evaluate.perplexity(model, tokenizer, TEXT, autocast_dtype=torch.bfloat16))
    assert evaluate.compare_throughput(model, model, prompts(), new_tokens=4, rounds=2)["ratio"]
