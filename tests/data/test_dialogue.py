"""Conversations in rows: each once, apart; what the assistant says is learned, and nothing else."""

import dataclasses
import itertools
import json
import os
import pickle
import re

import numpy as np
import pytest

from lmjax.data.conversations import Conversation, made, read_conversations
from lmjax.data.dialogue import Dialogue, validation
from lmjax.data.dialogue_rows import chat_tokens
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.vocabulary import BPE, Bytes, Pretrained
from lmjax.errors import UserError
from tests.data.chat_cases import SPECIAL, TEMPLATES
from tests.data.test_chat import REFERENCE

USER = {"role": "user", "content": "hi"}
ANSWER = {"role": "assistant", "content": "yes"}
END = 257  # "</s>" of the reference's tokenizer


@pytest.fixture(scope="module", autouse=True)
def jinja():
    """Skips where jinja2 is not installed, except in CI."""
    if not os.environ.get("CI"):
        pytest.importorskip("jinja2")


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A published tokenizer of bytes, without a chat template."""
    folder = tmp_path_factory.mktemp("tokenizer")
    (folder / "tokenizer.json").write_text(REFERENCE["tokenizer"])
    (folder / "tokenizer_config.json").write_text(json.dumps(SPECIAL))
    return folder


@pytest.fixture(scope="module")
def data(folder):
    vocabulary = Pretrained(path=str(folder))
    return Dialogue(
        path="made", vocabulary=vocabulary, template="plain", length=145, valid_fraction=0.2
    )


def with_template(template):
    return SubwordTokenizer(
        tokenizer_json=REFERENCE["tokenizer"],
        vocab_size=260,
        end_id=END,
        special_tokens=tuple(SPECIAL.items()),
        chat_templates=(("default", template),),
    )


def by_hand(data, conversation):
    """(inputs, targets, weights) of a conversation in the plain template, piece by piece."""
    ids, said = [], []
    for message in conversation.messages:
        assistant = message["role"] == "assistant"
        for text, own in ((message["role"] + ":\n", False), (message["content"], assistant)):
            piece = data.tokenizer.encode(text).tolist()
            ids, said = ids + piece, said + [own] * len(piece)
        if assistant:
            ids, said = [*ids, END], [*said, True]
        piece = data.tokenizer.encode("\n").tolist()
        ids, said = ids + piece, said + [False] * len(piece)
    last = max(i for i, own in enumerate(said) if own)
    return tuple(ids[:last]), tuple(ids[1 : last + 1]), tuple(map(float, said[1 : last + 1]))


@pytest.mark.parametrize("packing", ["fit", "none"])
def test_an_epoch_has_every_conversation_once_and_apart(data, packing):
    whole = dataclasses.replace(data, packing=packing)
    read = []
    for split in (whole, validation(whole)):
        found, num_rows = [], 0
        for batch in split.epoch_batches(batch_size=8):
            assert {n: x.dtype for n, x in batch.items()} == {
                n: s.dtype for n, s in split.example.items()
            }
            for row in range(8):
                segments = batch["segments"][row]
                num_rows += segments.any()
                for number in range(1, segments.max() + 1):
                    own = np.flatnonzero(segments == number)
                    np.testing.assert_array_equal(own, np.arange(own[0], own[-1] + 1))
                    np.testing.assert_array_equal(batch["positions"][row][own], own - own[0])
                    names = ("tokens", "targets", "weights")
                    found.append(tuple(tuple(batch[n][row][own].tolist()) for n in names))
                for name in ("tokens", "targets", "weights", "positions"):
                    assert not batch[name][row][segments == 0].any()
        assert sorted(found) == sorted(by_hand(data, one) for one in split.conversations)
        assert split.counts["conversations"] == len(found)
        assert split.counts["tokens"] == sum(len(inputs) for inputs, _, _ in found)
        assert split.counts["tokens of the assistant"] == sum(sum(w) for _, _, w in found)
        assert num_rows == split.num_examples == split.counts["rows"]
        if packing == "none":
            assert num_rows == len(found)
        else:
            assert split.counts["tokens"] > 0.9 * 145 * num_rows
        read += [one.text for one in split.conversations]
    assert sorted(read) == sorted(one.text for one in made())


def test_batches_are_a_function_of_seed_and_step(data):
    whole = list(itertools.islice(data.batches(batch_size=8, seed=1), 3))
    late = next(data.batches(batch_size=8, seed=1, start=2))
    halves = [next(data.batches(batch_size=8, seed=1, shard=i, num_shards=2)) for i in (0, 1)]
    other = next(data.batches(batch_size=8, seed=2))
    examples = pickle.loads(pickle.dumps(data.stacked(seed=1)))
    copied = examples.rows(range(16, 24))
    for name, expected in whole[2].items():
        np.testing.assert_array_equal(late[name], expected)
        np.testing.assert_array_equal(copied[name], expected)
        both = np.concatenate([half[name] for half in halves])
        np.testing.assert_array_equal(both, whole[0][name])
    assert (other["targets"] != whole[0]["targets"]).any()
    assert data.epochs(2 * data.num_examples) == {"made": 2}
    assert data.fingerprint != dataclasses.replace(data, too_long="drop").fingerprint
    first = dataclasses.replace(data, max_conversations=20)
    assert len(first.conversations) == 20
    assert {one.text for one in first.conversations} < {one.text for one in data.conversations}


def drawn(random):
    """A conversation of random turns, of which some are a system's and some follow the same."""
    turns = [{"role": "user", "content": "".join(random.choice(list("ab é\n漢.,"), 9))}]
    for role in random.choice(["user", "assistant", "assistant"], random.integers(1, 6)):
        turns.append({"role": str(role), "content": "".join(random.choice(list("xyz ü\n?"), 7))})
    turns.append({"role": "assistant", "content": "done"})
    return Conversation(messages=turns, tools=None, name="drawn")


def test_what_is_the_assistants_is_found_without_marks():
    """From what each message adds to the text, the same as by `{% generation %}`."""
    marked = with_template(TEMPLATES["chatml"])
    bare = re.sub(r"\{% (end)?generation %\}", "", TEMPLATES["chatml"])
    unmarked, random = with_template(bare), np.random.default_rng(0)
    outside = TEMPLATES["chatml"].replace(
        "{{ '<|im_end|>' }}{% endgeneration %}", "{% endgeneration %}{{ '<|im_end|>' }}"
    )
    assert outside != TEMPLATES["chatml"]
    for _ in range(20):
        one = drawn(random)
        wanted = marked.encode_chat(one.messages)
        ends = int(np.flatnonzero(wanted.assistant)[-1]) + 1
        for tokenizer in (marked, unmarked, with_template(outside)):
            found = chat_tokens(tokenizer, one)
            np.testing.assert_array_equal(found.ids, wanted.ids[:ends])
            np.testing.assert_array_equal(found.assistant, wanted.assistant[:ends])
        assert found.assistant.sum() > 4


def test_what_ends_a_message_is_learned():
    """Llama's template marks nothing, and trims what it writes."""
    one = Conversation(messages=[USER, ANSWER, USER, ANSWER, USER], tools=None, name="x")
    ids, said = chat_tokens(with_template(TEMPLATES["llama"]), one)
    assert ids[said].tolist().count(END) == 2 and ids[-1] == END
    assert with_template(TEMPLATES["llama"]).decode(ids[said]) == " yes  yes "


def write(path, *records):
    path.write_text("\n".join(r if isinstance(r, str) else json.dumps(r) for r in records))
    return str(path)


def test_bad_records_are_set_aside_and_counted(data, tmp_path, caplog):
    path = write(
        tmp_path / "all.jsonl",
        {"messages": [USER, ANSWER]},
        "{",
        [],
        {"messages": []},
        {"messages": ["hi"]},
        {"messages": [USER, {"role": "assistant"}]},
        {"messages": [USER, USER]},
        {"messages": [USER, {"role": "assistant", "content": "\ud800"}]},
        {"messages": [USER, ANSWER], "tools": 5},
        {"messages": [USER, {"role": "assistant", "content": None}]},
    )
    good, bad = read_conversations(path)
    assert [one.messages for one in good[:1]] == [[USER, ANSWER]] and len(good) == 2
    assert [(row.name.rpartition(":")[2], row.reason) for row in bad] == [
        ("2", "no JSON"),
        ("3", "no list of messages"),
        ("4", "no list of messages"),
        ("5", "a message that is no JSON object"),
        ("6", "a message without role and content"),
        ("7", "nothing that the assistant says"),
        ("8", "text that is not valid Unicode"),
        ("9", "tools that are no list"),
    ]
    own = dataclasses.replace(data, path=path, valid_fraction=0.0)
    own.check()
    assert "2 rows are read and 8 set aside" in caplog.text
    refused = [name for name in own.counts if name.startswith("set aside: the chat template")]
    assert len(refused) == 1 and own.counts[refused[0]] == own.counts["conversations"] == 1
    with pytest.raises(UserError, match=r"holds no conversation: .*:1 has a message that is no"):
        read_conversations(write(tmp_path / "none.jsonl", {"messages": ["hi"]}))


def test_a_mask_that_is_always_empty_is_an_error(data, tmp_path):
    silent = tmp_path / "silent.jinja"
    silent.write_text("{% for m in messages %}{{ m.content }}{% endfor %}"
                      "{% if 0 %}{% generation %}{% endgeneration %}{% endif %}")  # fmt: skip
    with pytest.raises(UserError, match=r"set aside: no token of the assistant: \d+"):
        dataclasses.replace(data, template=str(silent)).check()
    last = tmp_path / "last.jinja"
    last.write_text("{% for m in messages %}{{ loop.length }}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match=r"put \{% generation %\} around"):
        dataclasses.replace(data, template=str(last)).check()
    path = write(tmp_path / "first.jsonl", {"messages": [ANSWER, USER]})
    last.write_text("{% for m in messages %}{{ m.content }}{% endfor %}")
    with pytest.raises(UserError, match="the assistant speaks first"):
        dataclasses.replace(data, path=path, template=str(last), valid_fraction=0.0).check()


def test_long_conversations_are_cut_or_left_out(data, tmp_path):
    path = write(
        tmp_path / "long.jsonl",
        {"messages": [USER, ANSWER]},
        {"messages": [USER, {"role": "assistant", "content": "x" * 99}]},
        {"messages": [{"role": "user", "content": "y" * 99}, ANSWER]},
    )
    own = dataclasses.replace(data, path=path, length=40, valid_fraction=0.0)
    assert own.counts["cut"] == own.counts["left out: cut before the assistant speaks"] == 1
    assert own.counts["conversations"] == own.num_examples == 2
    batch = next(iter(own.epoch_batches(batch_size=2)))
    cut = batch["targets"][batch["weights"].sum(axis=1).argmax()]
    assert own.tokenizer.decode(cut) == "ser:\nhi\nassistant:\n" + "x" * 21
    dropped = dataclasses.replace(own, too_long="drop")
    assert dropped.counts["left out: too long"] == 2 and dropped.num_examples == 1
    with pytest.raises(UserError, match="holds no conversations: valid_fraction is 0"):
        validation(own).check()


def test_speakers_take_turns_as_user_and_assistant(tmp_path):
    """The form of chitchat-dataset."""

    def said(*pairs):
        return {"messages": [[{"sender": who, "text": text}] for who, text in pairs]}

    talk = said(("b", "hello"), ("b", " you "), ("a", "hi"), ("a", " "), ("b", "bye"))
    talk["messages"][0] += [{"sender": "b", "text": "there"}]
    broken = {"messages": [[{"sender": "b", "text": 5}]]}
    three = said(("a", "x"), ("b", "y"), ("c", "z"))
    path = write(tmp_path / "d.json", {"k": talk, "l": said(("b", "so")), "m": three, "n": broken})
    good, bad = read_conversations(path)
    assert [one.messages for one in good] == [
        [
            {"role": "user", "content": "hello\nthere\nyou"},
            {"role": "assistant", "content": "hi"},
            {"role": "user", "content": "bye"},
        ]
    ]
    assert [row.reason for row in bad] == [
        "nothing that the assistant says",
        "more than two speakers",
        "a message without sender and text",
    ]
    listed = write(tmp_path / "l.json", [{"messages": [USER, ANSWER], "tools": [{"a": 1}]}])
    assert read_conversations(listed)[0][0].tools == [{"a": 1}]
    for text, message in (("5", "neither a list"), ("{", "is not JSON")):
        with pytest.raises(UserError, match=message):
            read_conversations(write(tmp_path / "w.json", text))
    with pytest.raises(UserError, match=r"neither \.jsonl nor \.json"):
        read_conversations(write(tmp_path / "w.txt", "hi"))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"split": "test"}, "split is 'test'"),
        ({"packing": "tight"}, "packing is 'tight'"),
        ({"too_long": "keep"}, "too_long is 'keep'"),
        ({"length": 0}, "length is 0"),
        ({"max_conversations": -1}, "max_conversations -1"),
        ({"valid_fraction": 1.0}, "valid_fraction is 1.0"),
        ({"path": "nowhere.jsonl"}, "no text at 'nowhere.jsonl'"),
    ],
)
def test_wrong_settings_are_refused(data, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(data, **change)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"path": "package:no_such_package/d.json"}, "'no_such_package' is not installed"),
        ({"template": ""}, "has no chat template"),
        ({"template": "plian"}, r"no chat template at 'plian'\. Did you mean 'plain'"),
        ({"vocabulary": Bytes()}, "need a tokenizer with special tokens"),
        ({"vocabulary": BPE(vocab_size=300)}, "names no special token for the end"),
    ],
)
def test_what_cannot_be_read_is_refused_before_training(data, change, message):
    with pytest.raises(UserError, match=message):
        dataclasses.replace(data, **change).check()
