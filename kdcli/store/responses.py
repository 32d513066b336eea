"""The store of answers: what writers wrote, by the hash of what they were asked, and what was dear to compute.

One SQLite file that processes share. Answers are handed to a thread that commits many at a time and only then says
so; what was spent is written in the same transaction, so that a budget holds over restarts.
"""

from __future__ import annotations

import json
import os
import queue
import shutil
import sqlite3
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from hashlib import blake2b
from pathlib import Path
from typing import Any

from kdcli.api import Answer, Request
from kdcli.errors import ConfigError, KDError
from kdcli.store.fault import fault

FORMAT = 0x6B64_0001  # marks the file as ours, and says how its tables look
LINGER = 0.012  # seconds to gather answers for one commit
SPARE = 2**20  # bytes held back beside the file: when the disk is full, answers that are paid for still fit
STORED = ("texts", "finished", "prompt_tokens", "completion_tokens", "model", "date")  # of an answer
PATIENCE = 60.0  # seconds to wait for another process's commit
TABLES = """
CREATE TABLE IF NOT EXISTS answers (id INTEGER PRIMARY KEY, key BLOB UNIQUE, answer TEXT, model TEXT, date TEXT);
CREATE TABLE IF NOT EXISTS memory (kind TEXT, key TEXT, value TEXT, date TEXT, PRIMARY KEY (kind, key)) WITHOUT ROWID;
CREATE TABLE IF NOT EXISTS spending (
    run TEXT, step TEXT, writer TEXT, calls INTEGER, failed INTEGER, prompt_tokens INTEGER, completion_tokens INTEGER,
    cost REAL, PRIMARY KEY (run, step, writer)
) WITHOUT ROWID;
"""
INSERT = "INSERT OR IGNORE INTO answers (key, answer, model, date) VALUES (?, ?, ?, ?)"
FIND_ALL = "SELECT key, answer FROM answers WHERE key IN"
FIND = "SELECT answer FROM answers WHERE key = ?"
SPEND = """
INSERT INTO spending VALUES (?, ?, ?, ?, ?, ?, ?, ?) ON CONFLICT (run, step, writer) DO UPDATE SET
    calls = calls + excluded.calls, failed = failed + excluded.failed,
    prompt_tokens = prompt_tokens + excluded.prompt_tokens,
    completion_tokens = completion_tokens + excluded.completion_tokens, cost = cost + excluded.cost
"""


@dataclass(frozen=True, kw_only=True)
class Spent:
    """What calls cost."""

    calls: int = 0
    failed: int = 0  # of the calls
    prompt_tokens: int = 0
    completion_tokens: int = 0
    cost: float = 0.0

    def __add__(self, other: Spent) -> Spent:
        return Spent(
            calls=self.calls + other.calls,
            failed=self.failed + other.failed,
            prompt_tokens=self.prompt_tokens + other.prompt_tokens,
            completion_tokens=self.completion_tokens + other.completion_tokens,
            cost=self.cost + other.cost,
        )

    @property
    def tokens(self) -> int:
        return self.prompt_tokens + self.completion_tokens


@dataclass(frozen=True, kw_only=True)
class Account:
    """Who pays: a run folder, the key of a step of it, and the name of a writer."""

    run: str
    step: str
    writer: str


@dataclass(frozen=True)
class _Entry:
    keys: Sequence[bytes]
    answers: Sequence[Answer]
    account: Account
    spent: Spent
    done: Callable[[Sequence[Answer]], None]


def request_key(identity: str, request: Request) -> bytes:
    """16 bytes: who is asked (a hash of the writer's identity) and all of the question, but for its rehearsal."""
    asked = (
        [[message["role"], message["content"]] for message in request.messages],
        request.n,
        request.seed,
        request.temperature,
        request.max_tokens,
        list(request.stop),
        request.form,
    )
    text = json.dumps((identity, asked), sort_keys=True, separators=(",", ":"))
    return blake2b(text.encode(), digest_size=16).digest()


class Responses:
    """The store at `path`, which is made, for the user alone, if it is not there. Threads and processes may share it.

    Raises ConfigError where the file is damaged or another program's, or cannot be written.
    """

    def __init__(self, path: Path) -> None:
        self.path = Path(path)
        self._make()
        self._lock = threading.Lock()
        self._reader = self._connect()
        self._queue: queue.SimpleQueue[_Entry | None] = queue.SimpleQueue()
        self._failed: Callable[[BaseException], None] = lambda error: None
        self._thread: threading.Thread | None = None
        self._commits = 0

    def find(self, key: bytes) -> Answer | None:
        """The answer to a request, if one was committed."""
        return self.find_all([key]).get(key)

    def find_all(self, keys: Sequence[bytes]) -> dict[bytes, Answer]:
        """The answers to those of some tens of requests that have one. To look costs as much for one as for all."""
        places = ",".join("?" * len(keys))
        try:
            with self._lock:
                rows = self._reader.execute(f"{FIND_ALL} ({places})", tuple(keys)).fetchall()
        except sqlite3.Error as error:
            raise _explained(self.path, error) from error
        return {key: self._answer(text) for key, text in rows}

    def keep(
        self,
        keys: Sequence[bytes],
        answers: Sequence[Answer],
        *,
        account: Account,
        spent: Spent,
        done: Callable[[Sequence[Answer]], None],
        failed: Callable[[BaseException], None],
    ) -> None:
        """Store answers to requests and what they cost, all or nothing; failed ones only cost. Returns at once:
        `done` gets the answers as they are stored, after the commit; another process's came first where it has the
        same. `failed` gets the error if there is one. Both are called from another thread."""
        self._failed = failed
        with self._lock:
            if self._thread is None:
                self._thread = threading.Thread(target=self._commit_all, name="kdcli-answers", daemon=True)
                self._thread.start()
        self._queue.put(_Entry(keys, answers, account, spent, done))

    def recall(self, kind: str, keys: Sequence[str]) -> dict[str, Any]:
        """Values of `remember`, of those keys that have one."""
        found: dict[str, Any] = {}
        with self._lock, self._told():
            for key in keys:
                row = self._reader.execute(
                    "SELECT value FROM memory WHERE kind = ? AND key = ?", (kind, key)
                ).fetchone()
                if row is not None:
                    found[key] = json.loads(row[0])
        return found

    def remember(self, kind: str, values: Mapping[str, Any]) -> None:
        """Store JSON values by key; committed when this returns."""
        rows = [(kind, key, json.dumps(value, allow_nan=False), _today()) for key, value in values.items()]
        with self._lock, self._told(), self._transaction(self._reader):
            self._reader.executemany("INSERT OR IGNORE INTO memory VALUES (?, ?, ?, ?)", rows)

    def spent(self, run: str) -> dict[tuple[str, str], Spent]:
        """(step, writer) -> what a run folder spent so far, over all restarts."""
        with self._lock, self._told():
            rows = self._reader.execute(
                "SELECT step, writer, calls, failed, prompt_tokens, completion_tokens, cost FROM spending"
                " WHERE run = ?",
                (run,),
            ).fetchall()
        names = ("calls", "failed", "prompt_tokens", "completion_tokens", "cost")
        return {(row[0], row[1]): Spent(**dict(zip(names, row[2:], strict=True))) for row in rows}

    def close(self) -> None:
        """Commit what was handed over, and close the file."""
        if self._thread is not None:
            self._queue.put(None)
            self._thread.join()
            self._thread = None
        with self._lock:
            self._reader.close()
        self._spare.unlink(missing_ok=True)

    @property
    def _spare(self) -> Path:
        return self.path.with_name(f".{self.path.name}.spare")

    def _make(self) -> None:
        try:
            self.path.parent.mkdir(parents=True, exist_ok=True, mode=0o700)
            os.close(os.open(self.path, os.O_RDWR | os.O_CREAT, 0o600))  # SQLite's own files take their mode from it
        except OSError as error:
            raise ConfigError(
                f"{self.path}: the store of answers cannot be written ({error.strerror}); set augment.answers to a "
                "file that you may write"
            ) from error

    def _connect(self) -> sqlite3.Connection:
        connection = sqlite3.connect(self.path, timeout=PATIENCE, isolation_level=None, check_same_thread=False)
        end = time.monotonic() + PATIENCE
        with self._told():
            while True:
                try:
                    self._prepare(connection)
                    return connection
                except sqlite3.OperationalError as error:
                    # Two processes that make a file at once: SQLite does not wait for a change of the journal's mode.
                    code = getattr(error, "sqlite_errorcode", 0) & 0xFF
                    if code not in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED) or time.monotonic() > end:
                        raise
                    time.sleep(LINGER)

    def _prepare(self, connection: sqlite3.Connection) -> None:
        with self._transaction(connection, "DEFERRED"):  # what is read is of one moment
            mark = connection.execute("PRAGMA application_id").fetchone()[0]
            tables = connection.execute("SELECT count(*) FROM sqlite_master").fetchone()[0]
        if mark != FORMAT and (mark or tables):
            raise ConfigError(
                f"{self.path}: is a database of another program or version; set augment.answers to another file"
            )
        connection.execute("PRAGMA journal_mode = WAL")
        connection.execute("PRAGMA synchronous = FULL")  # an answer that was used is on the disk
        if mark != FORMAT:
            connection.executescript(f"BEGIN IMMEDIATE; PRAGMA application_id = {FORMAT}; {TABLES} COMMIT;")

    def _commit_all(self) -> None:
        """The thread: gathers entries for a moment, commits them together, and says so."""
        connection: sqlite3.Connection | None = None
        try:
            connection = self._connect()
            self._hold_spare()
            last = False
            while not last:
                entries = [self._queue.get()]
                if entries[0] is not None:
                    time.sleep(LINGER)
                with suppress(queue.Empty):
                    while True:
                        entries.append(self._queue.get_nowait())
                last = entries[-1] is None
                self._commit(connection, [entry for entry in entries if entry is not None])
        except BaseException as error:
            self._failed(error)
        finally:
            if connection is not None:
                connection.close()

    def _commit(self, connection: sqlite3.Connection, entries: Sequence[_Entry]) -> None:
        if not entries:
            return
        try:
            stored = self._written(connection, entries)
        except KDError as error:
            if not isinstance(error, _FullDiskError) or not self._spare.exists():
                raise
            self._spare.unlink()
            stored = self._written(connection, entries)
            _tell(entries, stored)
            raise  # what was paid for is stored; nothing more is bought
        _tell(entries, stored)

    def _written(self, connection: sqlite3.Connection, entries: Sequence[_Entry]) -> list[list[Answer]]:
        """One transaction. Returns the answers as they are stored."""
        spent: dict[Account, Spent] = {}
        stored: list[list[Answer]] = []
        with self._told(), self._transaction(connection):
            for entry in entries:
                stored.append([self._insert(connection, *one) for one in zip(entry.keys, entry.answers, strict=True)])
                spent[entry.account] = spent.get(entry.account, Spent()) + entry.spent
            for account, sum_ in spent.items():
                connection.execute(SPEND, (*asdict(account).values(), *asdict(sum_).values()))
            fault("augment.store", step=self._commits)
        self._commits += 1
        fault("augment.stored", step=self._commits)
        return stored

    def _insert(self, connection: sqlite3.Connection, key: bytes, answer: Answer) -> Answer:
        if answer.failed:
            return answer
        told = {name: getattr(answer, name) for name in STORED}
        row = (key, json.dumps(told, separators=(",", ":")), answer.model, answer.date)
        if connection.execute(INSERT, row).rowcount:
            return answer
        return self._answer(connection.execute(FIND, (key,)).fetchone()[0])

    def _answer(self, text: str) -> Answer:
        try:
            return Answer(**json.loads(text))
        except (ValueError, TypeError):
            raise _damaged(self.path, "an answer in it is no JSON") from None

    def _hold_spare(self) -> None:
        with suppress(OSError):
            self._spare.write_bytes(bytes(SPARE))

    @contextmanager
    def _transaction(self, connection: sqlite3.Connection, kind: str = "IMMEDIATE") -> Iterator[None]:
        connection.execute(f"BEGIN {kind}")
        try:
            yield
            connection.execute("COMMIT")
        except BaseException:
            with suppress(sqlite3.Error):
                connection.execute("ROLLBACK")
            raise

    @contextmanager
    def _told(self) -> Iterator[None]:
        """SQLite's errors in our words."""
        try:
            yield
        except (sqlite3.Error, OSError) as error:
            raise _explained(self.path, error) from error


class _FullDiskError(KDError):
    pass


def stats(path: Path) -> dict[str, Any]:
    """{bytes, answers, models: {name: answers}, oldest, newest, remembered: {kind: values}, runs, cost} of a store."""
    with _opened(path) as connection:
        models = dict(connection.execute("SELECT model, count(*) FROM answers GROUP BY model ORDER BY model"))
        oldest, newest = connection.execute("SELECT min(date), max(date) FROM answers").fetchone()
        kinds = dict(connection.execute("SELECT kind, count(*) FROM memory GROUP BY kind ORDER BY kind"))
        runs, cost = connection.execute("SELECT count(DISTINCT run), coalesce(sum(cost), 0) FROM spending").fetchone()
    size = sum(one.stat().st_size for end in ("", "-wal") if (one := Path(f"{path}{end}")).exists())
    return {
        "bytes": size,
        "answers": sum(models.values()),
        "models": models,
        "oldest": oldest,
        "newest": newest,
        "remembered": kinds,
        "runs": runs,
        "cost": cost,
    }


def purge(path: Path, older_than: str | None = None) -> int:
    """Delete answers and remembered values written before the day `older_than` (YYYY-MM-DD, UTC; None: all), and give
    their room back. What runs spent is kept. Returns how many were deleted."""
    with _opened(path) as connection:
        where, values = ("WHERE date < ?", (older_than,)) if older_than else ("", ())
        count = sum(
            connection.execute(f"DELETE FROM {table} {where}", values).rowcount for table in ("answers", "memory")
        )
        connection.execute("VACUUM")
        connection.execute("PRAGMA wal_checkpoint(TRUNCATE)")
    return count


@contextmanager
def _opened(path: Path) -> Iterator[sqlite3.Connection]:
    if not Path(path).is_file():
        raise ConfigError(f"{path}: there is no store of answers")
    store = Responses(path)
    try:
        with store._told():
            yield store._reader
    finally:
        store.close()


def _tell(entries: Sequence[_Entry], stored: Sequence[Sequence[Answer]]) -> None:
    for entry, answers in zip(entries, stored, strict=True):
        entry.done(answers)


def _explained(path: Path, error: sqlite3.Error | OSError) -> KDError:
    code = getattr(error, "sqlite_errorcode", None)
    kind = None if code is None else code & 0xFF
    if kind == sqlite3.SQLITE_FULL or isinstance(error, OSError):
        free = shutil.disk_usage(path.parent).free / 2**20
        return _FullDiskError(
            f"{path}: no space left for answers ({error}); {free:,.1f} MiB are free. All answers that were stored are "
            "kept: make room and start again, and none of them is asked for twice"
        )
    if kind in (sqlite3.SQLITE_NOTADB, sqlite3.SQLITE_CORRUPT):
        return _damaged(path, str(error))
    if kind in (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED):
        return KDError(
            f"{path}: another process held the store of answers for {PATIENCE:.0f} s; start again when it is done"
        )
    if kind in (sqlite3.SQLITE_READONLY, sqlite3.SQLITE_CANTOPEN, sqlite3.SQLITE_PERM):
        return ConfigError(f"{path}: the store of answers cannot be written ({error}); see to its permissions")
    return KDError(f"{path}: the store of answers failed ({error}); see to the disk, and start again")


def _damaged(path: Path, why: str) -> ConfigError:
    return ConfigError(
        f"{path}: is no store of answers, or a damaged one ({why}); move it away, or set augment.answers to another "
        "file"
    )


def _today() -> str:
    return time.strftime("%Y-%m-%d", time.gmtime())


def dated(answer: Answer) -> Answer:
    """The answer with the day it was written."""
    return answer if answer.date else replace(answer, date=_today())
