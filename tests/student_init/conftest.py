"""Small models with a few hundred words of text to calibrate on."""

from __future__ import annotations

import json
import random
from pathlib import Path

import pytest

from kdcli.data.jsonl import Jsonl
from tests import families


def write_rows(folder: Path, rows: int = 6) -> Path:
    """Two domains of `rows` rows each, of words that the families' tokenizer knows."""
    draw = random.Random(0)
    folder.mkdir(parents=True, exist_ok=True)
    for domain in ("a", "b"):
        lines = [{"text": " ".join(draw.choices(families.WORDS[2:], k=9 + i % 4))} for i in range(rows)]
        (folder / f"{domain}.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    return folder


@pytest.fixture
def data(tmp_path: Path) -> Jsonl:
    return Jsonl(path=str(write_rows(tmp_path / "rows")))
