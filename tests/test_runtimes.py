"""An exported folder as other programs read it: as a GGUF file through the package `gguf`, and in llama.cpp itself.

`LLAMA_CPP=folder` names a checkout of llama.cpp with its tools built in `build/bin`; docs/shipping.md says how.
"""
from __future__ import annotations

import math
import os
import re
import subprocess
import sys
from pathlib import Path

import numpy
import pytest
import torch
from safetensors.torch import load_file
from small_runs import SHIPPED
from torch import Tensor
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel

import stt
from stt import serving
from stt.export import export_hf

gguf = pytest.importorskip("gguf", reason="needs the package gguf: pip install -e '.[export]' -c requirements.txt")

KEPT, WIDTH = (60, 131, 97, 200, 8), 256  # of the five layers of stt-tiny; exported for k-quants
CONTEXT, CONTEXTS = 128, 80  # tokens; of the 97 in the held-out text
needs_llama_cpp = pytest.mark.skipif("LLAMA_CPP" not in os.environ, reason="LLAMA_CPP names no checkout of llama.cpp")


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The shipped model, each layer with a width of its own, exported for llama.cpp."""
    folder = tmp_path_factory.mktemp("exported")
    model = AutoModelForCausalLM.from_pretrained(SHIPPED)
    drawn = torch.Generator().manual_seed(0)
    stt.apply(model, {site: torch.randperm(384, generator=drawn)[:count].sort().values
                      for site, count in zip(stt.find_sites(model), KEPT, strict=True)})
    stt.save(model, folder / "sliced", AutoTokenizer.from_pretrained(SHIPPED))
    return export_hf(folder / "sliced", folder / "plain", runtime="gguf")


def in_gguf(folder: Path) -> dict[str, Tensor]:
    """The tensors of an exported folder under the names that the package's own table gives them."""
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN2, len(KEPT))
    tensors = {names.get_name(name, try_suffixes=(".weight", ".bias")): value
               for name, value in load_file(folder / "model.safetensors").items()}
    assert None not in tensors
    return tensors


def written(folder: Path, file: Path) -> Path:
    """A GGUF file of float32 tensors, made by the package, with what a reader has to know of a Qwen2."""
    config = AutoModelForCausalLM.from_pretrained(folder).config
    writer = gguf.GGUFWriter(file, gguf.MODEL_ARCH_NAMES[gguf.MODEL_ARCH.QWEN2])
    writer.add_block_count(config.num_hidden_layers)
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_vocab_size(config.vocab_size)
    for name, value in in_gguf(folder).items():
        writer.add_tensor(name, value.numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return file


def as_logits(model: PreTrainedModel) -> Tensor:
    """(T, vocabulary), of the beginning of the held-out text."""
    ids = AutoTokenizer.from_pretrained(SHIPPED)((SHIPPED / "heldout.txt").read_text()[:600]).input_ids[:CONTEXT]
    with torch.no_grad():
        return model(torch.tensor([ids])).logits[0]


def test_widths_hold_whole_blocks_of_k_quants() -> None:
    for kind in ("Q2_K", "Q3_K", "Q4_K", "Q5_K", "Q6_K"):
        values, _ = gguf.GGML_QUANT_SIZES[gguf.GGMLQuantizationType[kind]]
        assert serving.multiple_for("gguf") == values


def test_transformers_reads_the_same_model_from_gguf(plain: Path, tmp_path: Path) -> None:
    read = AutoModelForCausalLM.from_pretrained(tmp_path, gguf_file=written(plain, tmp_path / "model.gguf").name,
                                                dtype=torch.float32)
    assert read.config.intermediate_size == WIDTH
    assert torch.equal(as_logits(read), as_logits(AutoModelForCausalLM.from_pretrained(plain)))
    expected = as_logits(stt.load(plain.parent / "sliced"))
    torch.testing.assert_close(as_logits(read), expected, rtol=0, atol=1e-5 * expected.abs().max().item())


# ---------------------------------------------------------------- llama.cpp itself


@pytest.fixture(scope="module")
def converted(plain: Path) -> Path:
    """By llama.cpp's converter; that it is given the name of our tokenizer's way to split is all it lacks."""
    file = plain.parent / "converted.gguf"
    run = ("import runpy, sys; sys.path.insert(0, sys.argv.pop(1)); from conversion.base import TextModel; "
           "TextModel.get_vocab_base_pre = lambda self, tokenizer: 'qwen2'; sys.argv.pop(0); "
           "runpy.run_path(sys.argv[0], run_name='__main__')")
    checkout = os.environ["LLAMA_CPP"]
    subprocess.run([sys.executable, "-c", run, checkout, f"{checkout}/convert_hf_to_gguf.py", str(plain),
                    "--outfile", str(file), "--outtype", "f32"], check=True)
    return file


@needs_llama_cpp
def test_the_converter_writes_every_tensor_as_it_is(plain: Path, converted: Path) -> None:
    found = {tensor.name: tensor for tensor in gguf.GGUFReader(converted).tensors}
    expected = in_gguf(plain)
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        assert numpy.array_equal(found[name].data, value.numpy()), name
    read = AutoModelForCausalLM.from_pretrained(converted.parent, gguf_file=converted.name, dtype=torch.float32)
    assert torch.equal(as_logits(read), as_logits(AutoModelForCausalLM.from_pretrained(plain)))


def tool(name: str, *arguments: str) -> str:
    """What a tool of llama.cpp says."""
    done = subprocess.run([f"{os.environ['LLAMA_CPP']}/build/bin/{name}", *arguments], check=True, text=True,
                          errors="replace", stdout=subprocess.PIPE, stderr=subprocess.STDOUT)
    return done.stdout


def llama_perplexity(file: Path, *options: str) -> float:
    """Of the first CONTEXTS contexts: it prints the estimate after each, and at times exits without the last."""
    said = tool("llama-perplexity", "-m", str(file), "-f", str(SHIPPED / "heldout.txt"), "-c", str(CONTEXT), "-b",
                str(CONTEXT), "-t", "1", *options)
    return float(re.search(rf"\[{CONTEXTS}\]([0-9.]+),", said)[1])


def own_perplexity(model: PreTrainedModel) -> float:
    """As llama-perplexity counts: of the tokens in the second half of each of the first CONTEXTS contexts."""
    ids = torch.tensor(AutoTokenizer.from_pretrained(SHIPPED)((SHIPPED / "heldout.txt").read_text()).input_ids)
    losses = []
    for row in ids[:CONTEXTS * CONTEXT].view(-1, CONTEXT):
        with torch.no_grad():
            logits = model(row[None]).logits[0, CONTEXT // 2:-1].double()
        losses.append(torch.nn.functional.cross_entropy(logits, row[CONTEXT // 2 + 1:]))
    return math.exp(torch.stack(losses).mean())


@needs_llama_cpp
def test_llama_cpp_computes_the_same_perplexity(plain: Path, converted: Path) -> None:
    expected = own_perplexity(AutoModelForCausalLM.from_pretrained(plain))
    found = llama_perplexity(converted, "-ctk", "f32", "-ctv", "f32", "-fa", "off")
    assert found == pytest.approx(expected, rel=1e-5)  # it prints four decimals


@needs_llama_cpp
def test_k_quants_take_the_exported_width(converted: Path) -> None:
    """Every down projection is quantized; the hidden size, 128, is what the other rows of stt-tiny fall back for."""
    quantized = converted.with_name("quantized.gguf")
    tool("llama-quantize", str(converted), str(quantized), "Q4_K_M")
    kinds = {tensor.name: tensor.tensor_type.name for tensor in gguf.GGUFReader(quantized).tensors}
    assert {kinds[f"blk.{layer}.ffn_down.weight"] for layer in range(len(KEPT))} <= {"Q4_K", "Q6_K"}
    assert kinds["blk.0.ffn_up.weight"] == "Q5_0"
    assert llama_perplexity(quantized) == pytest.approx(llama_perplexity(converted), rel=0.1)
