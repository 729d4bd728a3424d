"""Preferences as data: rows by hand, what is set aside, cut and left out, splits, batches."""

import dataclasses
import json

import numpy as np
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers

from lmjax.data.preference_rows import read_rows
from lmjax.data.preference_tokens import encode
from lmjax.data.preferences import Preferences, validation, vocab_size
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tokenizer import ByteTokenizer
from lmjax.errors import UserError

END = 256
CHAT = (
    "{% for m in messages %}[{{ m['role'] }}]{{ m['content'] }};{% endfor %}"
    "{% if add_generation_prompt %}[assistant]{% endif %}"
)


def write(folder, records, name="rows.jsonl"):
    lines = (x if isinstance(x, str) else json.dumps(x) for x in records)
    (folder / name).write_text("\n".join(lines) + "\n", "utf-8")
    return str(folder / name)


def pair(prompt="Is it?", chosen="Yes.", rejected="No!"):
    return {"prompt": prompt, "chosen": chosen, "rejected": rejected}


def only(data):
    """Every row of a split."""
    return next(iter(data.epoch_batches(batch_size=data.num_examples)))


def text_of(batch, side, row=0):
    """(what is read, what of the targets counts), as text; the document's end is '$'."""
    read = batch[f"{side}segments"][row] > 0
    said = batch[f"{side}weights"][row] > 0
    ids = [np.append(batch[f"{side}tokens"][row][read], batch[f"{side}targets"][row][read][-1])]
    ids.append(batch[f"{side}targets"][row][said])
    return ["".join("$" if i == END else chr(i) for i in part) for part in ids]


def test_a_pair_by_hand(tmp_path):
    data = Preferences(path=write(tmp_path, [pair()]), length=12, valid_fraction=0)
    batch = only(data)
    assert text_of(batch, "chosen_") == ["Is it?Yes.$", "Yes.$"]
    assert text_of(batch, "rejected_") == ["Is it?No!$", "No!$"]
    for name, spec in data.example.items():
        assert batch[name].shape == (1, *spec.shape) and batch[name].dtype == spec.dtype
    np.testing.assert_array_equal(batch["chosen_tokens"][0, 1:10], batch["chosen_targets"][0, :9])
    assert batch["chosen_weights"][0].tolist() == [0] * 5 + [1] * 5 + [0] * 2
    assert not batch["chosen_tokens"][0, 10:].any() and not batch["chosen_targets"][0, 10:].any()
    assert vocab_size(data) == 257


def test_the_prompt_is_cut_from_its_left_in_both_texts(tmp_path):
    """Room is made for the longer completion, and what has none beside a token is left out."""
    rows = [
        pair("abcdefgh", "123", "4"),
        pair("q", "1234567", "1"),  # 8 tokens with the end: as many as there are targets
        pair("q", "12345678", "1"),
    ]
    data = Preferences(path=write(tmp_path, rows), length=8, valid_fraction=0)
    batch = only(data)
    assert text_of(batch, "chosen_") == ["defgh123$", "123$"]
    assert text_of(batch, "rejected_") == ["defgh4$", "4$"]
    assert text_of(batch, "chosen_", 1) == ["q1234567$", "1234567$"]
    assert data.counts == {"good": 3, "set aside": 0, "refused": 0, "left out": 1, "cut": 1}
    dropped = Preferences(path=data.path, length=8, valid_fraction=0, too_long="drop")
    assert dropped.counts["left out"] == 2 and dropped.num_examples == 1
    none = Preferences(path=write(tmp_path, rows[2:], "none.jsonl"), length=8, valid_fraction=0)
    with pytest.raises(UserError, match="raise length, which is 8"):
        none.check()


def test_bad_rows_are_set_aside_with_reason_and_count(tmp_path, caplog):
    rows = [
        pair(),
        pair(chosen=""),
        pair(rejected="  \n"),
        pair(prompt=""),
        {"prompt": "a", "chosen": "b"},
        pair(chosen="same", rejected="same"),
        pair(chosen=7),
        pair(chosen="\ud800"),
        pair(chosen=[{"role": "assistant", "content": "b"}]),
        pair(prompt=[{"content": "a"}]),
        {"prompt": "a", "completion": "b", "label": True},
        "{no json",
        "[1]",
    ]
    data = Preferences(path=write(tmp_path, rows), length=16, valid_fraction=0)
    with caplog.at_level("WARNING", logger="lmjax"):
        data.check()
    assert data.counts["good"] == 1 and data.counts["set aside"] == 12
    assert [row.reason for row in data.bad] == [
        "chosen is empty",
        "rejected is empty",
        "prompt is empty",
        "rejected is empty",
        "chosen and rejected are the same",
        "chosen is neither a text nor messages",
        "chosen is no valid Unicode",
        "the prompt is a text, and a completion messages",
        "prompt has a message without a role or a text",
        "no chosen and no rejected",
        "no JSON object",
        "no JSON object",
    ]
    assert data.bad[0].name.endswith("rows.jsonl:2")
    assert "1 rows are read and 12 set aside (rejected is empty: 2" in caplog.text
    listed = caplog.text.split("listed in ")[1].split()[0]
    with open(listed, encoding="utf-8") as file:
        assert json.loads(file.readline())["reason"] == "chosen is empty"
    with pytest.raises(UserError, match=r"no preference \(chosen is empty: 1\)"):
        Preferences(path=write(tmp_path, rows[1:2], "bad.jsonl")).check()


def labelled(prompt, completion, label=True):
    return {"prompt": prompt, "completion": completion, "label": label}


def test_labelled_rows_and_the_completion_of_another_prompt(tmp_path):
    rows = [
        labelled("a", "1", True),
        labelled("b", "2", False),
        labelled("b", "3", 1),
        labelled("c", "4", 0),
        labelled("d", "5", "yes"),
        labelled("d", "6", None),
    ]
    data = Preferences(path=write(tmp_path, rows), kind="labelled", length=8, valid_fraction=0)
    batch = only(data)
    assert batch["labels"].tolist() == [1, 0, 1, 0] and batch["labels"].dtype == np.int32
    assert [text_of(batch, "", row)[0] for row in range(4)] == ["a1$", "b2$", "b3$", "c4$"]
    assert [text_of(batch, "kl_", row)[0] for row in range(4)] == ["a4$", "b1$", "b1$", "c3$"]
    assert [text_of(batch, "kl_", row)[1] for row in range(4)] == ["4$", "1$", "1$", "3$"]
    assert {row.reason for row in data.bad} == {"the label is neither true nor false"}
    assert set(batch) == set(data.example)


def test_a_pair_is_two_labelled_rows(tmp_path):
    path = write(tmp_path, [pair("a", "1", "2"), pair("b", "3", "4")])
    data = Preferences(path=path, kind="labelled", length=8, valid_fraction=0)
    batch = only(data)
    assert batch["labels"].tolist() == [1, 0, 1, 0]
    assert [text_of(batch, "kl_", row)[0] for row in range(4)] == ["a4$", "a4$", "b2$", "b2$"]


def test_one_prompt_alone_has_other_completions_of_its_own(tmp_path):
    path = write(tmp_path, [labelled("a", str(i)) for i in range(3)])
    data = Preferences(path=path, kind="labelled", length=8, valid_fraction=0)
    batch = only(data)
    assert [text_of(batch, "kl_", row)[1] for row in range(3)] == ["2$", "0$", "1$"]


def test_splits_share_no_prompt(tmp_path):
    random = np.random.default_rng(0)
    rows = [pair(f"p{random.integers(30)}", f"c{i}", f"r{i}") for i in range(200)]
    data = Preferences(path=write(tmp_path, rows), length=16, valid_fraction=0.3)
    held = validation(data)
    prompts = []
    for part in (data, held):
        batch = only(part)
        texts = [text_of(batch, "chosen_", row) for row in range(part.num_examples)]
        prompts.append({whole.removesuffix(said) for whole, said in texts})
    assert data.num_examples + held.num_examples == 200
    assert prompts[0] and prompts[1] and not prompts[0] & prompts[1]
    assert data.fitted == held.fitted and data.fingerprint != held.fingerprint


def test_batches_depend_on_seed_and_step_alone():
    data = Preferences(length=64)

    def take(number, **arguments):
        batches = data.batches(batch_size=8, **arguments)
        return [next(batches) for _ in range(number)]

    whole = take(30, seed=1)
    seen = [row.tobytes() for batch in whole for row in batch["chosen_tokens"]]
    assert len(set(seen[: data.num_examples])) == len(set(seen))
    np.testing.assert_equal(take(1, seed=1, start=29)[0], whole[29])
    assert take(1, seed=2)[0]["chosen_tokens"].tobytes() != whole[0]["chosen_tokens"].tobytes()
    parts = [take(2, seed=1, shard=i, num_shards=2)[1] for i in range(2)]
    for name, rows in whole[1].items():
        np.testing.assert_array_equal(np.concatenate([part[name] for part in parts]), rows)
    last = list(data.epoch_batches(batch_size=data.num_examples - 1))[-1]
    assert not any(x[1:].any() for x in last.values()) and last["chosen_weights"][0].any()


def chat_tokenizer():
    """Bytes as tokens, and conversations by the template."""
    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    made = Tokenizer(models.BPE({c: i for i, c in enumerate(alphabet)}, []))
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    made.decoder = decoders.ByteLevel()
    return SubwordTokenizer(
        tokenizer_json=made.to_str(),
        vocab_size=257,
        end_id=256,
        chat_templates=(("default", CHAT),),
    )


def test_messages_go_through_the_chat_template(tmp_path):
    pytest.importorskip("jinja2")
    user = [{"role": "user", "content": "Hi"}]
    said = [{"role": "assistant", "content": "No"}]
    mixed = {"role": "user", "content": "Text"}
    path = write(
        tmp_path, [pair(user, "Yes", said), pair("plain", "a", "b"), pair([mixed], "a", "b")]
    )
    rows, _ = read_rows(path, kind="pairs")
    tokenizer = chat_tokenizer()
    found = encode(rows, tokenizer, length=64)
    texts = [[tokenizer.decode(ids) for ids in found.texts(row)] for row in range(3)]
    assert texts[0] == ["[user]Hi;[assistant]", "Yes;", "No;"]
    assert texts[1] == ["plain", "a", "b"] and found.texts(1)[1][-1] == END
    assert texts[2] == ["[user]Text;[assistant]", "a;", "b;"]
    with pytest.raises(UserError, match="a tokenizer with a chat template"):
        encode(rows, ByteTokenizer(), length=64)


def test_what_the_template_refuses_is_counted(tmp_path):
    pytest.importorskip("jinja2")
    strict = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('who?') }}{% endif %}" + CHAT
    tokenizer = dataclasses.replace(chat_tokenizer(), chat_templates=(("default", strict),))
    rows, _ = read_rows(
        write(
            tmp_path,
            [pair([{"role": role, "content": "Hi"}], "a", "b") for role in ("user", "robot")],
        ),
        kind="pairs",
    )
    found = encode(rows, tokenizer, length=64)
    assert len(found.labels) == 1 and found.counts["refused"] == 1
    assert "rows.jsonl:2" in found.why and "who?" in found.why


def test_refuses_what_cannot_be(tmp_path):
    for match, fields in (
        ("kind is 'pair'", {"kind": "pair"}),
        ("too_long is 'trim'", {"too_long": "trim"}),
        ("length is 1", {"length": 1}),
        ("valid_fraction is 1", {"valid_fraction": 1}),
        ("no text at", {"path": str(tmp_path / "none.jsonl")}),
    ):
        with pytest.raises(UserError, match=match):
            Preferences(**fields)
    (tmp_path / "a.txt").write_text("text")
    with pytest.raises(UserError, match=r"read from \.jsonl"):
        Preferences(path=str(tmp_path / "a.txt")).check()
    with pytest.raises(UserError, match=r"valid split .* is empty"):
        validation(Preferences(valid_fraction=0)).check()
