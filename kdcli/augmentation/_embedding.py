"""Vectors of texts: hashed TF-IDF without any download, or a local encoder with mean pooling."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt
import xxhash

from kdcli.augmentation._sifting import words
from kdcli.errors import ConfigError
from kdcli.store import paths
from kdcli.store.content import file_hash

Vectors = npt.NDArray[np.float32]  # [N, D] rows of length 1; a text without words is 0
Encoder = Callable[[Sequence[str]], Vectors]
DIMENSIONS = 512  # of hashed vectors: inner products are off by about 1 / sqrt(D) = 0.04
OWN = ("tfidf", "hashing")


def embed(texts: Sequence[str], model: str = "tfidf", *, batch: int = 32) -> Vectors:
    """[N, D] unit rows. `tfidf` weights words by how rare they are in `texts`; `hashing` does not, so that a text's
    vector does not depend on the others; anything else is the folder of a sentence-transformers or other encoder.

    Raises ConfigError where the model cannot be read, or sentence-transformers is needed and missing.
    """
    return encoder(model, batch=batch)(texts)


def encoder(model: str = "tfidf", *, batch: int = 32) -> Encoder:
    """`embed` with the model loaded once, for texts that come in blocks."""
    if model in OWN:
        return lambda texts: fitted(texts)(texts) if model == "tfidf" else _hashed(texts, lambda word: 1.0)
    folder = paths.resolve(model)
    if not folder.is_dir():
        raise ConfigError(f"{model} is no folder of an encoder; give one, or {' or '.join(OWN)}, which need none")
    if (folder / "modules.json").is_file():
        return _sentence_transformers(folder, batch)
    return _transformers(folder, batch)


def fingerprint(model: str) -> str:
    """A hash of what a model's vectors depend on: names and bytes of its files."""
    if model in OWN:
        return f"{model}-{DIMENSIONS}"
    folder = paths.resolve(model)
    files = sorted(file for file in folder.rglob("*") if file.is_file())
    return " ".join(f"{file.relative_to(folder).as_posix()} {file_hash(file)}" for file in files)


def fitted(texts: Iterable[str]) -> Encoder:
    """TF-IDF with weights from `texts`: idf = log((1 + N) / (1 + df)) + 1."""
    total = 0
    seen: Counter[str] = Counter()
    for text in texts:
        total += 1
        seen.update(set(words(text)))
    return lambda asked: _hashed(asked, lambda word: math.log((1 + total) / (1 + seen[word])) + 1)


def _hashed(texts: Sequence[str], weight: Callable[[str], float]) -> Vectors:
    """Signed feature hashing (Weinberger et al. 2009, arXiv:0902.2206) of (1 + log tf) weight(word)."""
    vectors = np.zeros((len(texts), DIMENSIONS), dtype=np.float32)
    for row, text in zip(vectors, texts, strict=True):
        for word, count in Counter(words(text)).items():
            number = xxhash.xxh3_64_intdigest(word.encode())
            sign = 1.0 if number >> 63 else -1.0
            row[number % DIMENSIONS] += sign * (1 + math.log(count)) * weight(word)
    return _unit(vectors)


def _sentence_transformers(folder: Path, batch: int) -> Encoder:
    try:
        from sentence_transformers import SentenceTransformer
    except ImportError:
        raise ConfigError(
            f'{folder} is a sentence-transformers model; run `pip install "kdcli[embed]"`, or use tfidf'
        ) from None
    model: Any = SentenceTransformer(str(folder), local_files_only=True, model_kwargs={"use_safetensors": True}).float()

    def encode(texts: Sequence[str]) -> Vectors:
        found = model.encode(list(texts), batch_size=batch, convert_to_numpy=True, show_progress_bar=False)
        return _unit(np.asarray(found, dtype=np.float32).reshape(len(texts), -1))

    return encode


def _transformers(folder: Path, batch: int) -> Encoder:
    """The mean of the last hidden states over a text's tokens."""
    import torch
    from transformers import AutoModel, AutoTokenizer

    try:
        tokenizer: Any = AutoTokenizer.from_pretrained(str(folder), local_files_only=True)
        model: Any = AutoModel.from_pretrained(
            str(folder), local_files_only=True, use_safetensors=True, dtype=torch.float32
        )
    except (OSError, ValueError) as error:
        raise ConfigError(f"{folder}: no encoder can be read there ({str(error).splitlines()[0][:200]})") from None
    if model.config.is_encoder_decoder:
        model = model.get_encoder()
    model = model.eval().to("cuda" if torch.cuda.is_available() else "cpu")
    tokenizer.pad_token = tokenizer.pad_token or tokenizer.eos_token
    tokenizer.padding_side = "right"  # so that a causal model's states do not depend on what is in the same batch
    limit = min(int(tokenizer.model_max_length), int(getattr(model.config, "max_position_embeddings", 512)))

    def encode(texts: Sequence[str]) -> Vectors:
        parts: list[Vectors] = [np.zeros((0, model.config.hidden_size), dtype=np.float32)]
        for start in range(0, len(texts), batch):
            chunk = [text or " " for text in texts[start : start + batch]]
            inputs = tokenizer(chunk, padding=True, truncation=True, max_length=limit, return_tensors="pt").to(
                model.device
            )
            inputs.pop("token_type_ids", None)
            with torch.inference_mode():
                states = model(**inputs).last_hidden_state  # [N, T, D]
            mask = inputs["attention_mask"].unsqueeze(-1).to(states.dtype)
            parts.append(((states * mask).sum(1) / mask.sum(1).clamp(min=1)).cpu().numpy())
        return _unit(np.concatenate(parts))

    return encode


def _unit(vectors: Vectors) -> Vectors:
    length = np.linalg.norm(vectors, axis=1, keepdims=True)
    return np.divide(vectors, length, out=np.zeros_like(vectors), where=length > 0)
