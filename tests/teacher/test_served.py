"""A served teacher says what the local one says, in any protocol, whatever becomes of single requests."""

from __future__ import annotations

import math
import time
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from kdcli.api import Batch, Need, StudentOutput, TeacherSignal, TeacherView
from kdcli.errors import ConfigError, KDError
from kdcli.objective.forward_kl import ForwardKL
from kdcli.store import paths
from kdcli.teacher.hf import HFTeacher
from kdcli.teacher.served import ServedTeacher
from kdcli.train.distiller import Distiller
from tests import runs, toys
from tests.servers.prompt_logprobs import Server, serving

CPU = torch.device("cpu")
TINY = str(paths.resolve("recipes://data/tiny_teacher"))
VOCAB = 4096
BOTH = Need.DISTRIBUTION | Need.LOGPROBS
EVERY = ("vllm", "sglang", "openai-ids")


@pytest.fixture(scope="module")
def process() -> Iterator[Server]:
    with serving(TINY) as server:
        yield server


@pytest.fixture
def server(process: Server) -> Server:
    process.fail()
    process.speak(*EVERY)
    process.seen()
    return process


@pytest.fixture(scope="module")
def local() -> HFTeacher:
    teacher = HFTeacher(path=TINY, dtype="float32")
    teacher.load(CPU)
    return teacher


def teacher(server: Server, **settings: Any) -> ServedTeacher:
    quick = {"url": server.url, "model": "tiny", "tokenizer": TINY, "k": 16, "protocol": "vllm", "timeout": 20.0}
    made = ServedTeacher(**(quick | settings))
    made.load(CPU)
    server.seen()
    return made


def small(seed: int = 0) -> Batch:
    return toys.batch(seed, rows=3, length=8, vocab=VOCAB)


def packed() -> Batch:
    """Two sequences in one row; nothing follows the last token of either."""
    ids = torch.randint(VOCAB, (1, 12), generator=torch.Generator().manual_seed(3))
    return Batch(
        input_ids=ids,
        targets=ids.roll(-1, 1),
        mask=torch.tensor([[False, True, True, True, True, False, True, True, True, False, True, False]]),
        attention_mask=torch.ones(1, 12, dtype=torch.bool),
        segment=torch.tensor([0] * 6 + [1] * 6)[None],
        weight=torch.ones(2),
        position_ids=torch.tensor([*range(6), *range(6)])[None],
    )


def prompted() -> Batch:
    """The teacher reads two more words in front, and has no place for one of the targets."""
    batch = small()
    more = torch.randint(VOCAB, (3, 2), generator=torch.Generator().manual_seed(4))
    position = (torch.arange(8) + 2).expand(3, 8).masked_fill(~batch.mask, -1)
    position[0, 3] = -1
    return replace(
        batch,
        teacher=TeacherView(
            input_ids=torch.cat([more, batch.input_ids], 1),
            attention_mask=torch.cat([torch.ones(3, 2, dtype=torch.bool), batch.attention_mask], 1),
            position=position,
        ),
    )


def dense(local: HFTeacher, batch: Batch) -> Tensor:
    """[B, T, V]: the local teacher's log-probabilities."""
    signal = local.annotate(batch, Need.DISTRIBUTION)
    assert signal.head is not None and signal.hidden is not None
    return torch.log_softmax(signal.head(signal.hidden), -1)


@pytest.mark.parametrize("batch", [small(), packed(), prompted()], ids=["rows", "packed", "prompted"])
@pytest.mark.parametrize("protocol", ["vllm", "sglang", "openai"])
def test_it_gives_the_local_teachers_likeliest_tokens(
    protocol: str, batch: Batch, server: Server, local: HFTeacher
) -> None:
    signal = teacher(server, protocol=protocol).annotate(batch, BOTH)
    kept = batch.mask if batch.teacher is None else batch.mask & (batch.teacher.position >= 0)
    expected = dense(local, batch).topk(16)
    assert signal.topk is not None and signal.logprobs is not None
    assert torch.equal(signal.topk.ids[kept], expected.indices[kept])
    torch.testing.assert_close(signal.topk.logprobs[kept], expected.values[kept], atol=2e-5, rtol=0)
    assert bool((signal.topk.logprobs[~kept] == -math.inf).all()), "entries of no target stand for none"
    wanted = local.annotate(batch, Need.LOGPROBS).logprobs
    torch.testing.assert_close(signal.logprobs, wanted, atol=2e-5, rtol=0)


def test_tokens_told_as_texts_are_right_where_they_are_told(server: Server, local: HFTeacher) -> None:
    """Some of the 4,096 ids are written alike, or are parts of characters: those entries are left out, the others
    keep their own log-probabilities."""
    server.speak("openai")
    batch = small()
    signal = teacher(server, protocol="openai", k=1024).annotate(batch, BOTH)
    assert signal.topk is not None
    ids, found = signal.topk.ids[batch.mask], signal.topk.logprobs[batch.mask]
    there = found > -math.inf
    expected = dense(local, batch)[batch.mask].gather(-1, ids)
    torch.testing.assert_close(found[there], expected[there], atol=2e-5, rtol=0)
    assert 0.9 < there.float().mean() < 1
    assert all(len(set(row[kept].tolist())) == int(kept.sum()) for row, kept in zip(ids, there, strict=True))


def test_a_teacher_of_another_tokenizer_scores_its_own_targets(server: Server, local: HFTeacher) -> None:
    batch, own = small(), small(7)
    none = torch.full((3, 8), -1)
    view = TeacherView(
        input_ids=own.input_ids,
        attention_mask=own.attention_mask,
        position=none,
        targets=own.targets,
        mask=own.mask,
        span=none,
        teacher_span=none,
    )
    foreign = replace(batch, teacher=view)
    found = teacher(server).annotate(foreign, Need.LOGPROBS).own_logprobs
    torch.testing.assert_close(found, local.annotate(foreign, Need.LOGPROBS).own_logprobs, atol=2e-5, rtol=0)


def loss_and_gradient(teacher: Any, batch: Batch) -> tuple[Tensor, Tensor]:
    distiller = Distiller(toys.ToyStudent(toys.llama(5, vocab=VOCAB)), teacher, {"kd": ForwardKL()})
    loss, _ = distiller(batch, distiller.count(batch))
    loss.backward()
    gradients = [p.grad.flatten() for p in distiller.parameters() if p.grad is not None]
    return loss.detach(), torch.cat(gradients)


def test_with_all_entries_loss_and_gradient_are_the_local_teachers(server: Server, local: HFTeacher) -> None:
    batch = toys.batch(rows=2, length=5, vocab=VOCAB)
    loss, gradient = loss_and_gradient(local, batch)
    served_loss, served_gradient = loss_and_gradient(teacher(server, k=VOCAB), batch)
    torch.testing.assert_close(served_loss, loss, rtol=1e-5, atol=0)
    assert (served_gradient - gradient).norm() <= 1e-4 * gradient.norm()


def test_with_some_entries_loss_and_gradient_keep_their_bounds(server: Server, local: HFTeacher) -> None:
    """Merging all other ids into one symbol takes from each value just the divergence among them, p_rest x KL(p || q
    given the rest), and moves the gradient to the logits by at most 2 p_rest (L1): both are p_rest-weighted there."""
    batch = small()
    log_p = dense(local, batch)[batch.mask]
    logits = torch.randn(log_p.shape, generator=torch.Generator().manual_seed(2)) * 2
    topk = teacher(server, k=64).annotate(batch, Need.DISTRIBUTION).topk
    assert topk is not None
    sparse = TeacherSignal(topk=replace(topk, ids=topk.ids[batch.mask][None], logprobs=topk.logprobs[batch.mask][None]))
    results = [
        ForwardKL().closed_form(batch, StudentOutput(logits=logits[None]), signal)
        for signal in (TeacherSignal(logits=log_p[None]), sparse)
    ]
    assert results[0] is not None and results[1] is not None
    (value, gradient), (served_value, served_gradient) = results
    log_q = torch.log_softmax(logits, -1)
    at = topk.ids[batch.mask]
    rest_p, rest_q = (one.scatter(-1, at, -math.inf) for one in (log_p, log_q))
    mass = rest_p.logsumexp(-1)
    among = torch.where(
        rest_p > -math.inf, rest_p.softmax(-1) * (rest_p.log_softmax(-1) - rest_q.log_softmax(-1)), 0.0
    ).sum(-1)
    torch.testing.assert_close(value[0] - served_value[0], mass.exp() * among, atol=1e-4, rtol=1e-3)
    assert bool((served_value <= value + 1e-5).all())
    assert bool(((gradient - served_gradient)[0].abs().sum(-1) <= 2 * mass.exp() + 1e-4).all())


def test_answers_keep_their_place_however_many_are_asked_at_once(server: Server) -> None:
    batch = toys.batch(rows=6, length=8, vocab=VOCAB)
    alone = teacher(server, concurrency=1).annotate(batch, BOTH)
    assert server.seen()["most"] == 1
    several = teacher(server, concurrency=4)
    server.fail("slow:0.4", "slow:0.3", "slow:0.2", "slow:0.1")  # so that they come back in another order
    together = several.annotate(batch, BOTH)
    assert server.seen()["most"] == 4
    assert alone.topk is not None and together.topk is not None
    assert torch.equal(alone.topk.ids, together.topk.ids)
    assert torch.equal(alone.topk.logprobs, together.topk.logprobs)


def test_it_sends_each_sequence_once_as_far_as_its_last_target(server: Server) -> None:
    batch = small()
    batch.mask[1] = False
    teacher(server).annotate(batch, BOTH)
    sent = sorted(tuple(body["prompt"]) for body in server.seen()["asked"])
    last = [int(torch.nonzero(batch.mask[row]).max()) for row in (0, 2)]
    whole = [
        (*batch.input_ids[row, : n + 1].tolist(), int(batch.targets[row, n]))
        for row, n in zip((0, 2), last, strict=True)
    ]
    assert sent == sorted(whole)


def test_log_probabilities_alone_are_asked_for_alone(server: Server) -> None:
    signal = teacher(server).annotate(small(), Need.LOGPROBS)
    assert {body["prompt_logprobs"] for body in server.seen()["asked"]} == {0}
    assert signal.topk is None and signal.logprobs is not None


@pytest.mark.parametrize(
    "fault",
    [
        *("status:429:0.05", "status:429", "status:500", "status:503", "slow:1.5", "cut", "drip", "html", "huge"),
        *("empty", "null", "absent", "short", "nan", "positive", "mass", "text"),
    ],
)
def test_what_may_pass_is_asked_again(fault: str, server: Server) -> None:
    batch = toys.batch(rows=1, length=5, vocab=VOCAB)
    patient = teacher(server, timeout=0.7)
    expected = patient.annotate(batch, BOTH).topk
    server.seen()
    server.fail(fault)
    found = patient.annotate(batch, BOTH).topk
    assert len(server.seen()["asked"]) == 2
    assert expected is not None and found is not None
    assert torch.equal(found.logprobs, expected.logprobs)


@pytest.mark.parametrize(
    ("fault", "told"),
    [
        ("status:400", "HTTP 400 .told to answer 400.*has 6 tokens.*batch.max_length"),
        ("status:401", "api_key_env"),
        ("status:403", "api_key_env"),
        ("status:404", "teacher.url.*teacher.model"),
        ("redirect", "redirects"),
        ("fewer", "teacher.k: 16 .* gives 2; .*--max-logprobs 16"),
        ("other", "teacher.tokenizer"),
    ],
)
def test_what_will_not_pass_ends_the_run_at_once(fault: str, told: str, server: Server) -> None:
    waiting = teacher(server)
    server.fail(fault)
    with pytest.raises(ConfigError, match=told) as caught:
        waiting.annotate(toys.batch(rows=1, length=5, vocab=VOCAB), BOTH)
    assert len(server.seen()["asked"]) == 1
    assert caught.value.exit_code == 2 and len(str(caught.value).splitlines()) == 1


def test_tries_are_counted(server: Server, caplog: pytest.LogCaptureFixture) -> None:
    twice = teacher(server, retries=2)
    server.fail(*["status:500"] * 9)
    with pytest.raises(KDError, match=r"in 3 tries .*HTTP 500 \(told to answer 500\).*kdcli resume") as caught:
        twice.annotate(toys.batch(rows=1, length=5, vocab=VOCAB), BOTH)
    assert len(server.seen()["asked"]) == 3 and caught.value.exit_code == 1
    assert sum("asking again" in message for message in caplog.messages) == 2, "each retry is told"


def test_a_server_that_asks_for_more_time_than_there_is_is_not_waited_for(server: Server) -> None:
    hurried = teacher(server, deadline=5.0)
    server.fail("status:429:60")
    begun = time.monotonic()
    with pytest.raises(KDError, match="HTTP 429"):
        hurried.annotate(toys.batch(rows=1, length=5, vocab=VOCAB), BOTH)
    assert time.monotonic() - begun < 4


def test_retry_after_is_waited_for(server: Server) -> None:
    waiting = teacher(server)
    server.fail("status:503:0.8")
    begun = time.monotonic()
    waiting.annotate(toys.batch(rows=1, length=5, vocab=VOCAB), BOTH)
    assert time.monotonic() - begun > 0.8


@pytest.mark.parametrize(
    ("speaks", "spoken"),
    [(EVERY, "vllm"), (("sglang",), "sglang"), (("openai-ids",), "openai"), (("openai",), "openai")],
)
def test_it_finds_out_what_a_server_speaks(speaks: tuple[str, ...], spoken: str, server: Server) -> None:
    server.speak(*speaks)
    found = teacher(server, protocol="auto")._spoken
    assert found is not None and found.name == spoken
    assert getattr(found, "as_ids", True) is (speaks != ("openai",))


def test_a_server_of_text_alone_is_refused_with_a_way_out(server: Server) -> None:
    server.speak()
    with pytest.raises(ConfigError, match=r"serves text alone.*teacher=none, or serve the model with vLLM or SGLang"):
        teacher(server, protocol="auto", retries=0)


@pytest.mark.parametrize(
    ("limit", "settings", "faults", "told"),
    [
        (8, {}, [], "greater than max allowed: 8.*teacher.k=16.*--max-logprobs 16"),
        (4096, {"model": "other"}, [], "model `other` does not exist.*teacher.model"),
        (4096, {}, ["words"], "teacher.tokenizer: .*otherwise"),
    ],
    ids=["limit", "model", "tokenizer"],
)
def test_what_was_declared_wrongly_is_found_before_training(
    limit: int, settings: dict[str, Any], faults: list[str], told: str, server: Server
) -> None:
    server.speak("vllm", limit=limit)
    server.fail(*faults)
    with pytest.raises(ConfigError, match=told):
        teacher(server, **settings)


def test_a_declared_protocol_that_a_server_does_not_speak_is_told(server: Server) -> None:
    server.speak("vllm")
    with pytest.raises(ConfigError, match=r"sglang: HTTP 404 \(Not Found\).*set teacher\.protocol=auto"):
        teacher(server, protocol="sglang")


def test_a_server_that_is_down_is_told_in_a_sentence() -> None:
    with pytest.raises(KDError, match=r"Connection refused.*is the server running") as caught:
        ServedTeacher(url="http://127.0.0.1:9/v1", model="tiny", tokenizer=TINY, retries=1).load(CPU)
    assert len(str(caught.value).splitlines()) == 1


def test_the_key_goes_to_the_server_and_nowhere_else(
    server: Server, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    monkeypatch.setenv("MY_LLM_LOGIN", "correct-horse-battery")
    keyed = teacher(server, api_key_env="MY_LLM_LOGIN", retries=1)
    server.fail("status:500", "status:403")
    with pytest.raises(KDError) as caught:
        keyed.annotate(small(), BOTH)
    assert set(server.seen()["keys"]) == {"Bearer correct-horse-battery"}
    assert "correct-horse" not in caplog.text + str(caught.value) + str(vars(keyed)) + keyed.fingerprint()
    monkeypatch.delenv("MY_LLM_LOGIN")
    with pytest.raises(ConfigError, match="variable MY_LLM_LOGIN is not set"):
        keyed.annotate(small(), BOTH)


def test_the_fingerprint_is_of_the_model_and_not_of_the_place() -> None:
    def fingerprint(**settings: Any) -> str:
        given = {"url": "http://127.0.0.1:1/v1", "model": "m", "tokenizer": TINY} | settings
        return ServedTeacher(**given).fingerprint()

    assert fingerprint() == fingerprint(url="https://example.org/v1", concurrency=1, timeout=1.0)
    assert len({fingerprint(), fingerprint(model="n"), fingerprint(revision="2"), fingerprint(k=1)}) == 4


@pytest.mark.parametrize(
    "settings",
    [{"temperature": 2.0}, {"k": 0}, {"concurrency": 0}, {"retries": -1}, {"timeout": 0.0}, {"url": "http://user:x@h"}],
)
def test_settings_that_cannot_work_are_refused(settings: dict[str, Any]) -> None:
    with pytest.raises(ConfigError, match=f"teacher.{next(iter(settings))}"):
        ServedTeacher(**({"url": "http://127.0.0.1:1", "model": "m", "tokenizer": TINY} | settings))


def test_a_run_whose_server_fails_keeps_its_checkpoint_and_goes_on_from_it(tmp_path: Path, server: Server) -> None:
    """Four steps of two micro-batches of two rows; the server fails for good at the sixth micro-batch."""
    section = {
        "_target_": "kdcli.teacher.served.ServedTeacher",
        "url": server.url,
        "model": "tiny",
        "tokenizer": TINY,
        "protocol": "vllm",
        "retries": 0,
    }
    whole = runs.write_run(tmp_path / "whole", teacher=section)
    assert runs.work(whole) == [0]
    asked = len(server.seen()["asked"])
    broken = runs.write_run(tmp_path / "broken", teacher=section)
    server.fail(*[""] * (asked - 5), *["status:500"] * 20)
    assert runs.work(broken) == [1]
    assert runs.checkpoints(broken) == ["step-000002"]
    assert "HTTP 500" in runs.state(broken)["reason"]
    server.fail()
    assert runs.work(broken) == [0]
    assert runs.lines(broken) == runs.lines(whole)
