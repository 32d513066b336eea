"""The data in recipes/data are what their README and LICENSES.md say."""

from __future__ import annotations

import json
import math

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from kdcli.data.jsonl import Jsonl
from kdcli.store import paths
from kdcli.text.collate import collate
from kdcli.text.tokenize import encode

DOMAINS = ["c", "health", "javascript", "math", "prose", "python", "speech", "techdoc"]


def mini(split: str) -> dict[str, list[dict[str, str]]]:
    rows = Jsonl(path=f"recipes://data/mini/{split}").domains()
    return {name: [dict(example.meta) for example in examples] for name, examples in rows.items()}


@pytest.mark.parametrize(("split", "count"), [("train", 429), ("valid", 90)])
def test_the_corpus_has_eight_domains(split: str, count: int) -> None:
    rows = mini(split)
    assert list(rows) == DOMAINS
    assert sum(len(examples) for examples in rows.values()) == count


def test_train_and_valid_share_no_document() -> None:
    train, valid = (
        {row["id"].split("#")[0] for rows in mini(split).values() for row in rows} for split in ("train", "valid")
    )
    assert train
    assert not train & valid


def test_every_source_is_named_with_its_licence() -> None:
    text = (paths.recipes() / "data" / "LICENSES.md").read_text()
    known = {"lodash", "express", "commander", "async"}
    for name, rows in mini("train").items():
        (line,) = [line for line in text.splitlines() if line.startswith(f"| `mini/*/{name}.jsonl`")]
        for row in rows:
            licence = row["license"].split(" (")[0].split(",")[0]
            assert licence in line, row
            assert name != "javascript" or row["source"].removeprefix("npm ") in known
    assert all(f"## {package} (MIT)" in text for package in known)


def test_the_definitions_are_prompts_with_responses() -> None:
    (rows,) = Jsonl(path="recipes://data/define.jsonl").domains().values()
    kinds = [example.kind for example in rows]
    assert kinds == ["response"] * 500


@torch.no_grad()
def test_the_tiny_teacher_has_learned_something() -> None:
    """Perplexity about 107 on held-out text; 4,096 would be a guess."""
    folder = paths.resolve("recipes://data/tiny_teacher")
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32).eval()
    assert model.config.eos_token_id == tokenizer.eos_token_id == tokenizer.pad_token_id == 0
    assert len(tokenizer) == model.config.vocab_size
    rows, _ = encode(Jsonl(path="recipes://data/mini/valid", limit=2), tokenizer, max_length=256)
    batch = collate([row for part in rows.values() for row in part[:1]], pad_id=0)
    logprobs = model(**batch.model_inputs()).logits.log_softmax(-1)
    nll = -logprobs.gather(-1, batch.targets[..., None])[..., 0][batch.mask].mean()
    assert 60 < math.exp(nll) < 200


def test_the_generation_config_ends_where_the_tokenizer_ends() -> None:
    folder = paths.resolve("recipes://data/tiny_teacher")
    ids = [
        json.loads((folder / name).read_text())["eos_token_id"] for name in ("config.json", "generation_config.json")
    ]
    assert ids == [0, 0]
