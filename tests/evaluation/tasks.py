"""Tasks of the lm-evaluation-harness on local JSON lines: choices after examples, texts to generate, whole texts."""

from __future__ import annotations

import json
import random
import string
from pathlib import Path
from typing import Any

from lm_eval.api.task import ConfigurableTask

NUM_DOCUMENTS = 6


def written(folder: Path) -> Path:
    """Write sums with four answers each, as JSON lines."""
    draw, path = random.Random(0), folder / "sums.jsonl"
    lines = []
    for _ in range(NUM_DOCUMENTS):
        a, b = draw.randint(1, 99), draw.randint(1, 99)
        choices = [str(a + b + shift) for shift in (0, 1, 10, -1)]
        text = "".join(draw.choices(string.ascii_lowercase + " ", k=draw.randint(30, 90)))
        lines.append({"question": f"{a} + {b}", "choices": choices, "answer": 0, "text": text})
    path.write_text("".join(json.dumps(line) + "\n" for line in lines))
    return path


def task(name: str, path: Path, **config: Any) -> ConfigurableTask:
    data = {"dataset_path": "json", "dataset_kwargs": {"data_files": {"test": str(path)}}, "test_split": "test"}
    return ConfigurableTask(config={"task": name, **data, **config})


def choices(path: Path) -> ConfigurableTask:
    """Which of four sums is right, after three examples that are the same for all."""
    return task(
        "sums",
        path,
        output_type="multiple_choice",
        doc_to_text="{{question}} =",
        doc_to_choice="choices",
        doc_to_target="answer",
        fewshot_config={"sampler": "first_n", "split": "test"},
        num_fewshot=3,
        metric_list=[{"metric": "acc"}, {"metric": "acc_norm"}],
    )


def texts(path: Path, **generation: Any) -> ConfigurableTask:
    """What follows a question."""
    return task(
        "texts",
        path,
        output_type="generate_until",
        doc_to_text="Q: {{question}}\nA:",
        doc_to_target="{{choices[0]}}",
        generation_kwargs={"max_gen_toks": 24, **generation},
        metric_list=[{"metric": "exact_match"}],
    )


def whole(path: Path) -> ConfigurableTask:
    """How likely whole texts are."""
    return task(
        "whole",
        path,
        output_type="loglikelihood_rolling",
        doc_to_text="",
        doc_to_target="{{text}}",
        metric_list=[{"metric": "word_perplexity"}],
    )
