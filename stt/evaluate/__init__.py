"""Measuring a decoder: answers by generation, perplexity of a text, speed beside the dense model."""
from __future__ import annotations

from stt.evaluate.generation import accuracy, generate_answers, majority_accuracy
from stt.evaluate.perplexity import perplexity, score_text
from stt.evaluate.throughput import compare_throughput

__all__ = ["accuracy", "compare_throughput", "generate_answers", "majority_accuracy", "perplexity", "score_text"]
