"""Chat templates render as in transformers, and reach nothing but the messages."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from lmjax.data.chat import ChatTemplate
from lmjax.data.subword import SubwordTokenizer
from lmjax.data.tokenizer import tokenizer_from_json
from lmjax.data.vocabulary import Pretrained
from lmjax.errors import UserError
from tests.data.chat_cases import ANSWER, CASES, SPECIAL, TEMPLATES, TOOLS, USER
from tests.data.published import npm_folder

REFERENCE = json.loads(Path(__file__).with_name("chat_reference.json").read_text("utf-8"))


@pytest.fixture(scope="module", autouse=True)
def jinja() -> None:
    """Skips where jinja2 is not installed, except in CI."""
    if not os.environ.get("CI"):
        pytest.importorskip("jinja2")


def made(template: str) -> SubwordTokenizer:
    return SubwordTokenizer(
        tokenizer_json=REFERENCE["tokenizer"],
        vocab_size=260,
        end_id=257,
        special_tokens=tuple(SPECIAL.items()),
        chat_templates=(("default", template),),
    )


def render(template: str, messages: list[Any] | None = None, **options: Any) -> str:
    return made(template).chat.render([USER] if messages is None else messages, **options).text


@pytest.mark.parametrize("name", TEMPLATES)
@pytest.mark.parametrize("case", range(len(CASES)))
def test_texts_ids_and_spans_are_those_of_transformers(name: str, case: int) -> None:
    messages, options = CASES[case]
    before = json.dumps(messages)
    wanted = REFERENCE["cases"][name][case]
    tokenizer = made(TEMPLATES[name])
    if wanted is None:
        with pytest.raises(UserError):
            tokenizer.encode_chat(messages, **options)
        return
    assert tokenizer.chat.render(messages, **options).text == wanted["text"]
    ids, said = tokenizer.encode_chat(messages, **options)
    assert ids.dtype == np.int32 and ids.tolist() == wanted["ids"]
    if wanted["assistant"] is not None:
        assert said.astype(int).tolist() == wanted["assistant"]
    assert json.dumps(messages) == before


def test_what_the_assistant_says() -> None:
    """Within `{% generation %}` alone; cut where its message goes on."""
    tokenizer = made(TEMPLATES["chatml"])
    ids, said = tokenizer.encode_chat([USER, ANSWER, USER, ANSWER])
    assert tokenizer.decode(ids[said]) == ANSWER["content"] * 2
    assert (ids[said] == tokenizer.encode_prompt("<|im_end|>")[0]).sum() == 2
    rendered = tokenizer.chat.render([USER, ANSWER], continue_final_message=True)
    assert [rendered.text[a:b] for a, b in rendered.assistant] == [ANSWER["content"]]


def test_tools_choose_their_template_and_json_keeps_it() -> None:
    both = (("default", "plain"), ("tool_use", "with {{ tools[0].function.name }}"))
    tokenizer = SubwordTokenizer(
        tokenizer_json=REFERENCE["tokenizer"], vocab_size=260, end_id=257, chat_templates=both
    )
    again = tokenizer_from_json(tokenizer.to_json())
    assert isinstance(again, SubwordTokenizer) and again.hash == tokenizer.hash
    assert again.chat.render([USER]).text == "plain"
    assert again.chat.render([USER], tools=TOOLS).text == "with add"
    with pytest.raises(UserError, match=r"no default chat template; there are tool_use"):
        ChatTemplate(templates=both[1:]).render([USER])
    with pytest.raises(UserError, match="has no chat template"):
        _ = SubwordTokenizer(tokenizer_json="{}", vocab_size=1, end_id=0).chat
    damaged = json.loads(tokenizer.to_json()) | {"chat_templates": {"default": 5}}
    with pytest.raises(UserError, match="its chat_templates are not texts by name"):
        tokenizer_from_json(json.dumps(damaged))


@pytest.mark.parametrize(
    "template",
    [
        "{{ messages.__class__.__mro__[1].__subclasses__() }}",
        "{{ ''.__class__ }}{{ ''['__class__'].mro() }}",
        "{{ ('%s' | attr('__class__')).mro() }}",
        "{{ messages.append(messages[0]) }}",
        "{% do messages.clear() %}",
        "{{ messages[0].update(role='system') }}",
        "{{ raise_exception.__globals__['json'] }}",
        "{{ strftime_now.__globals__ }}{{ strftime_now.__globals__['json'].x }}",
        "{{ namespace.__init__.__globals__['jinja2'].x }}",
        "{% set n = namespace(__class__=1) %}",
        "{% set n = namespace() %}{% set n._x = 1 %}",
        "{{ '{0.__class__.__mro__[9]}'.format(messages) }}",
        "{{ range(1000000) | length }}",
        "{{ self._TemplateReference__context.environment.loader.x }}",
        "{% include '/etc/hostname' %}",
        "{% import 'os' as os %}",
        "{{ messages[0].content.nothing.more }}",
        "{{ 1 // 0 }}",
        "{{ raise_exception('no') }}",
        "{% if %}",
    ],
)
def test_a_template_reaches_nothing(template: str) -> None:
    with pytest.raises(UserError, match="the chat template"):
        render(template)


def test_only_plain_values_are_shown() -> None:
    assert render("{{ messages[0].n }}", [{"n": ({"k": 1.5}, None, True)}]) == (
        "[{'k': 1.5}, None, True]"
    )
    with pytest.raises(UserError, match=r"messages holds .*, a PosixPath: .*texts"):
        render("{{ messages }}", [{"role": "user", "content": Path("/etc")}])
    with pytest.raises(UserError, match=r"variables holds .*, a builtin_function"):
        render("{{ f('/etc') }}", variables={"f": open})
    with pytest.raises(UserError, match="messages must be dicts"):
        render("x", ["hello"])
    with pytest.raises(UserError, match="set one of them"):
        render("x", add_generation_prompt=True, continue_final_message=True)
    with pytest.raises(UserError, match="does not write the last message as it is"):
        render("x", continue_final_message=True)
    with pytest.raises(UserError, match="as it is, and once"):
        render("{{ messages }}{{ messages }}", continue_final_message=True)
    with pytest.raises(UserError, match="no text to go on with"):
        render("x", [{"role": "assistant"}], continue_final_message=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["llama3", "llama3_1", "qwen3", "deepseek_v3", "gemma3"])
def test_published_templates(name: str) -> None:
    transformers = pytest.importorskip("transformers")
    folder = npm_folder(name)
    theirs = transformers.PreTrainedTokenizerFast.from_pretrained(str(folder))
    tokenizer = Pretrained(path=str(folder)).learn([], [])
    assert isinstance(tokenizer, SubwordTokenizer)
    prompt = "Hello <s> <|im_start|> world"
    assert tokenizer.encode_prompt(prompt).tolist() == theirs(prompt)["input_ids"]
    rendered = 0
    for messages, options in CASES:
        given = {k: v for k, v in options.items() if k != "variables"}
        given |= options.get("variables", {})
        try:
            text = theirs.apply_chat_template(messages, tokenize=False, **given)
            ids = theirs.apply_chat_template(messages, return_dict=True, **given)["input_ids"]
        except Exception:
            with pytest.raises(UserError):
                tokenizer.encode_chat(messages, **options)
            continue
        rendered += 1
        assert tokenizer.chat.render(messages, **options).text == text
        assert tokenizer.encode_chat(messages, **options).ids.tolist() == ids
    assert rendered >= 5
