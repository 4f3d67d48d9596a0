"""Templates render as `transformers` renders them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
from front_fakes import byte_level_backend
from transformers import PreTrainedTokenizerFast

from diptych.core.errors import CheckpointError, RequestError
from diptych.front.chat_template import ChatTemplate
from diptych.front.tokenizer import ByteTokenizer, Tokenizer

MESSAGES = [
    {"role": "system", "content": "Be <brief> & 'kind'."},
    {"role": "user", "content": "What is naïve? 你好"},
    {"role": "assistant", "content": " An answer.\n"},
    {"role": "user", "content": "More"},
]
TEMPLATES = {
    "chatml": (
        "{%- for message in messages %}\n"
        "    {{- '<|im_start|>' + message.role + '\\n' + message.content | trim + '<|im_end|>' + '\\n' }}\n"
        "{%- endfor %}\n"
        "{%- if add_generation_prompt %}{{- '<|im_start|>assistant\\n' }}{%- endif %}\n"
    ),
    "special tokens and json": "{{ bos_token }}{% for m in messages %}{{ m | tojson }}{{ eos_token }}\n{% endfor %}",
    "indented json": "{{ messages | tojson(indent=2) }}",
    "loop controls": "{% for m in messages %}{% if loop.first %}{% continue %}{% endif %}{{ m.content }}{% endfor %}",
    "generation": "{% for m in messages %}{% generation %}{{ m.content }}{% endgeneration %}{% endfor %}",
    "tools": "{% if tools is not none %}tools{% endif %}{{ documents is none }}{{ unknown is defined }}",
    "namespace": (
        "{% set ns = namespace(n=0) %}{% for m in messages %}{% set ns.n = ns.n + 1 %}{% endfor %}{{ ns.n }}"
    ),
}


def saved(directory: Path, template: str | None) -> Path:
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=byte_level_backend(), bos_token="<|user|>", eos_token="<|end|>", chat_template=template
    )
    tokenizer.save_pretrained(directory)
    return directory


@pytest.mark.parametrize("template", TEMPLATES.values(), ids=TEMPLATES)
@pytest.mark.parametrize("add_generation_prompt", [False, True])
def test_same_text_as_transformers(template: str, add_generation_prompt: bool, tmp_path: Path) -> None:
    theirs = PreTrainedTokenizerFast.from_pretrained(saved(tmp_path, template))
    expected = theirs.apply_chat_template(MESSAGES, tokenize=False, add_generation_prompt=add_generation_prompt)
    ours = Tokenizer.load(tmp_path)
    text = ours.render_chat(MESSAGES, add_generation_prompt)
    assert text == expected
    assert ours.encode(text, add_special_tokens=False) == theirs.encode(text, add_special_tokens=False)


def test_template_in_the_configuration(tmp_path: Path) -> None:
    saved(tmp_path, None)
    (tmp_path / "chat_template.jinja").unlink(missing_ok=True)
    file = tmp_path / "tokenizer_config.json"
    config = json.loads(file.read_text())
    for value in (
        "{{ eos_token }}!",
        [{"name": "rag", "template": "no"}, {"name": "default", "template": "{{ eos_token }}!"}],
    ):
        file.write_text(json.dumps(config | {"chat_template": value, "eos_token": {"content": "<|end|>"}}))
        assert Tokenizer.load(tmp_path).render_chat(MESSAGES) == "<|end|>!"


def test_variables_of_the_request(tmp_path: Path) -> None:
    template = ChatTemplate("{{ 'think' if enable_thinking else 'plain' }}")
    assert template.render(MESSAGES, enable_thinking=True) == "think"
    assert template.render(MESSAGES) == "plain"


@pytest.mark.parametrize(
    "template",
    [
        "{{ raise_exception('roles must alternate') }}",
        "{{ messages[9].content }}",
        "{{ messages[0].content + 1 }}",
        "{{ messages.append(1) }}",
        "{{ ''.__class__.__mro__[1].__subclasses__() }}",
    ],
)
def test_what_a_template_refuses_is_the_clients_error(template: str) -> None:
    with pytest.raises(RequestError) as caught:
        ChatTemplate(template).render(MESSAGES)
    assert caught.value.param == "messages"


def test_no_template() -> None:
    with pytest.raises(RequestError, match="no chat template"):
        Tokenizer(byte_level_backend()).render_chat(MESSAGES)


def test_broken_files_are_named(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"tokenizer\.json"):
        Tokenizer.load(tmp_path)
    saved(tmp_path, "{% for %}")
    with pytest.raises(CheckpointError, match="does not compile"):
        Tokenizer.load(tmp_path)
    (tmp_path / "tokenizer_config.json").write_text("{")
    with pytest.raises(CheckpointError, match=r"tokenizer_config\.json"):
        Tokenizer.load(tmp_path)


def test_strftime_now_formats_the_date() -> None:
    assert ChatTemplate("{{ strftime_now('%Y') }}").render(MESSAGES).startswith("20")


def test_bytes_stand_for_themselves() -> None:
    codec = ByteTokenizer()
    assert codec.decode([*codec.encode("naïve"), 300]) == "naïve<300>"
    assert codec.render_chat(MESSAGES[1:2]).endswith("assistant: ")


@pytest.mark.fault(10)
@pytest.mark.parametrize(
    "source",
    [
        "{% for a in range(99999) %}{% for b in range(99999) %}{% endfor %}{% endfor %}",
        "{% for a in range(9999) %}{% for b in messages * 99999 %}{% endfor %}{% endfor %}",
        "{% macro m(n) %}{{ m(n + 1) }}{% endmacro %}{{ m(0) }}",
        "{% macro m(n) %}{% if n %}{{ m(n - 1) }}{{ m(n - 1) }}{% endif %}{% endmacro %}{{ m(64) }}",
        "{{ 'a' * 10 ** 9 }}",
        "{{ 9 ** 999999999 }}",
        "{{ [1] * 999999999 }}",
        "{{ '%999999999d' % 1 }}",
        "{{ 'a'.ljust(999999999) }}",
        "{{ 'a' | center(999999999) }}",
        "{% set ns = namespace(s='aaaaaaaaaaaaaaaa') %}"
        "{% for i in range(60) %}{% set ns.s = ns.s * 2 %}{% endfor %}{{ ns.s }}",
        "{% for a in range(999) %}{{ 'a' * 9999999 }}{% endfor %}",
        "{{ ''.__class__.__mro__ }}",
        "{{ messages.append(1) }}",
        "{{ 1 // 0 }}",
    ],
)
def test_work_without_end_ends(source: str) -> None:
    with pytest.raises(RequestError) as refusal:
        ChatTemplate(source).render([{"role": "user", "content": "hi"}])
    assert refusal.value.param == "messages"


def test_an_endless_source_is_not_compiled() -> None:
    for source in ("x" * (1 << 21), "{{ " + "(" * 5000 + "1" + ")" * 5000 + " }}"):
        with pytest.raises(CheckpointError, match="chat template"):
            ChatTemplate(source)


def test_long_conversations_are_no_flood() -> None:
    messages = [{"role": "user", "content": "words " * 100}] * 2000
    text = ChatTemplate("{% for m in messages %}{{ m.content | indent(2) }}{{ 3 * 4 }}{% endfor %}").render(messages)
    assert len(text) > 1_000_000
