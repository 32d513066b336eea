from pathlib import Path

import pytest
import torch
from transformers import AutoModelForSequenceClassification, AutoTokenizer, LlamaConfig, LlamaForSequenceClassification

from kdcli.api import Example
from kdcli.augmentation._sequences import Classifier
from kdcli.augmentation.critic import Critic
from kdcli.errors import ConfigError
from kdcli.store import paths
from tests.desks import FakeDesk, run

TINY = str(paths.resolve("recipes://data/tiny_teacher"))
CHAT = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"


def saved(folder: Path, labels: list[str], chat: bool = False) -> str:
    """A small random sequence classifier with the tiny teacher's tokenizer."""
    torch.manual_seed(0)
    config = LlamaConfig(
        vocab_size=4096,
        hidden_size=32,
        intermediate_size=64,
        num_hidden_layers=2,
        num_attention_heads=2,
        pad_token_id=0,
        num_labels=len(labels),
        id2label=dict(enumerate(labels)),
        label2id={label: index for index, label in enumerate(labels)},
    )
    model = LlamaForSequenceClassification(config)
    model.score.weight.data.normal_()  # as initialised, all answers look alike
    model.save_pretrained(folder)
    tokenizer = AutoTokenizer.from_pretrained(TINY)
    tokenizer.chat_template = CHAT if chat else None
    tokenizer.save_pretrained(folder)
    return str(folder)


@pytest.fixture(scope="module")
def models(tmp_path_factory):
    folder = tmp_path_factory.mktemp("critics")
    return {
        "classifier": saved(folder / "classifier", ["bad", "good", "odd"]),
        "reward": saved(folder / "reward", ["reward"], chat=True),
    }


def logits(path, text):
    """What transformers says of one text."""
    tokenizer, model = AutoTokenizer.from_pretrained(path), AutoModelForSequenceClassification.from_pretrained(path)
    with torch.no_grad():
        return model(**tokenizer(text, return_tensors="pt")).logits[0]


def scored(*scores, **meta):
    return [Example(prompt=f"p{n}", response="r", score=score, meta=meta) for n, score in enumerate(scores)]


def test_a_threshold_keeps_scores_from_it_on():
    step = Critic(threshold=3.0)
    assert [row.score for row in run(step, scored(2.9, 3.0, 4.0, None))] == [3.0, 4.0]
    assert step.desk.reasons == ["below the threshold", "lacks a field"]


def test_any_number_of_the_row_may_count():
    rows = [Example(prompt="a", response="b", meta={"share": share}) for share in (0.2, 0.8)]
    assert run(Critic(number="meta.share", threshold=0.5), rows) == rows[1:]


def test_thresholds_rise_with_the_round():
    """Of the fifth round the last threshold that there is holds."""
    kept = [
        [row.score for row in run(Critic(rising=[1.0, 2.0, 3.0], round=number), scored(1.0, 2.0, 3.0, 4.0))]
        for number in (0, 1, 4)
    ]
    assert kept == [[1.0, 2.0, 3.0, 4.0], [2.0, 3.0, 4.0], [3.0, 4.0]]
    assert run(Critic(rising=[1.0, 2.0]), scored(1.5, round=1)) == []


def test_the_top_share_is_exact_in_order_and_takes_the_earlier_of_equals(tmp_path):
    step = Critic(top_share=0.5)
    rows = scored(1.0, 5.0, 3.0, 5.0, 3.0, 0.0)
    assert [row.prompt for row in run(step, rows, folder=tmp_path)] == ["p1", "p2", "p3"]
    assert [row.prompt for row in run(Critic(top_share=0.01), rows, folder=tmp_path)] == ["p1"]
    assert run(Critic(top_share=1.0), rows, folder=tmp_path) == rows


def test_the_top_share_is_of_what_is_above_the_threshold(tmp_path):
    rows = scored(1.0, 2.0, 3.0, 4.0)
    assert [row.score for row in run(Critic(threshold=3.0, top_share=0.5), rows, folder=tmp_path)] == [4.0]


def test_a_classifiers_score_is_the_labels_probability(models):
    rows = [Example(prompt="a", response="some longer answer than this"), Example(prompt="bc", response="x")]
    found = run(Critic(scorer="classifier", model=models["classifier"], label="good"), rows)
    wanted = [float(logits(models["classifier"], f"{row.prompt}\n{row.response}").softmax(-1)[1]) for row in rows]
    assert [row.score for row in found] == pytest.approx(wanted, abs=1e-6)
    assert abs(wanted[0] - wanted[1]) > 1e-4


def test_a_classifier_reads_what_the_template_says(models):
    row = Example(prompt="a", response="b", meta={"topic": "weather"})
    step = Critic(scorer="classifier", model=models["classifier"], label="odd", text="{{ meta.topic }}")
    assert run(step, [row])[0].score == pytest.approx(float(logits(models["classifier"], "weather").softmax(-1)[2]))


def test_a_reward_model_reads_the_chat(models):
    row = Example(prompt="Hello?", response="Hello!")
    found = run(Critic(scorer="reward_model", model=models["reward"]), [row])
    assert found[0].score == pytest.approx(
        float(logits(models["reward"], "<user>Hello?<assistant>Hello!")[0]), abs=1e-5
    )


def test_what_stands_in_a_batch_together_does_not_matter_and_nothing_is_computed_twice(models, monkeypatch):
    rows = [Example(prompt="p" * n, response="r" * (20 - 3 * n)) for n in range(6)]
    settings = dict(scorer="classifier", model=models["classifier"], label="good")
    alone, together = run(Critic(batch=1, **settings), rows), run(Critic(batch=6, **settings), rows)
    assert [row.score for row in alone] == pytest.approx([row.score for row in together], abs=1e-6)
    desk = FakeDesk()
    for _ in range(2):
        step = Critic(**settings)
        step.open(desk)
        list(step(rows))
        monkeypatch.setattr(Classifier, "_model", None)  # the second time nothing is computed


def test_a_model_that_gives_no_such_number_is_refused_before_its_weights_load(models):
    for settings, named in (
        (dict(scorer="reward_model", model=models["classifier"]), "has 3 labels"),
        (dict(scorer="classifier", model=models["classifier"], label="great"), "bad, good, odd, not great"),
    ):
        with pytest.raises(ConfigError, match=named):
            Critic(**settings).open(FakeDesk())


@pytest.mark.parametrize(
    ("settings", "named"),
    [
        ({"scorer": "oracle"}, "scorer"),
        ({"scorer": "classifier"}, "model"),
        ({"scorer": "classifier", "model": TINY}, "label"),
        ({"model": TINY}, "model"),
        ({"threshold": 1.0, "rising": [1.0]}, "not both"),
        ({"top_share": 1.5}, "top_share"),
    ],
)
def test_settings_that_do_not_fit_are_named(settings, named):
    with pytest.raises(ConfigError, match=named):
        Critic(**settings)


def test_a_rehearsal_keeps_all():
    rows = scored(1.0, None)
    assert run(Critic(threshold=3.0, top_share=0.5), rows, rehearsal=True) == rows
