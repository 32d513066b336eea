"""Logging of a worker: every line in kdcli.log with its rank, the console to rank 0, secrets nowhere."""

from __future__ import annotations

import logging
import os
import re
import sys
import time
from pathlib import Path

SECRET_NAME = re.compile(r"(api_?key|token|secret|password|passwd|credential)s?$", re.IGNORECASE)
SECRET_VALUE = re.compile(
    r"\b(sk-[A-Za-z0-9_-]{16,}|hf_[A-Za-z0-9]{16,}|AKIA[0-9A-Z]{16}|gh[pousr]_[A-Za-z0-9]{20,}|github_pat_\w{20,})"
    r"|(?<=://)[^/\s:@]+:[^/\s@]+(?=@)"
)


FILE_ONLY = "file_only"  # log.error(…, extra={FILE_ONLY: True}) does not reach the console


def setup(run_dir: Path, rank: int) -> None:
    """Send this process's log to `run_dir/kdcli.log`, and rank 0's to stderr too: ours, and others' warnings."""
    close()
    root = logging.getLogger()
    stamp = _Redacting(f"%(asctime)sZ [rank {rank}] %(levelname)s %(name)s: %(message)s", "%Y-%m-%dT%H:%M:%S")
    stamp.converter = time.gmtime
    file = logging.FileHandler(Path(run_dir) / "kdcli.log", encoding="utf-8", errors="backslashreplace")
    console = logging.StreamHandler(sys.stderr)
    console.addFilter(lambda record: rank == 0 and not hasattr(record, FILE_ONLY))
    for handler, formatter in ((file, stamp), (console, _Redacting("%(message)s"))):
        handler.setFormatter(formatter)
        handler.is_kdcli = True  # type: ignore[attr-defined]
        root.addHandler(handler)
    root.setLevel(logging.WARNING)
    logging.getLogger("kdcli").setLevel(logging.INFO)
    logging.captureWarnings(True)


def close() -> None:
    """Undo `setup`."""
    root = logging.getLogger()
    for handler in [h for h in root.handlers if getattr(h, "is_kdcli", False)]:
        root.removeHandler(handler)
        handler.close()
    logging.captureWarnings(False)


def redact(text: str) -> str:
    """`text` with `***` for what looks like a secret, and for the values of variables whose names do."""
    text = SECRET_VALUE.sub("***", text)
    for name, value in os.environ.items():
        if len(value) >= 8 and SECRET_NAME.search(name):
            text = text.replace(value, "***")
    return text


class _Redacting(logging.Formatter):
    def format(self, record: logging.LogRecord) -> str:
        return redact(super().format(record))
