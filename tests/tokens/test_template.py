"""A chat template is a program of somebody else's: it fails in one line, ends, and says the same every day."""

import pathlib
import time

import pytest

from dgr_jax.errors import UserError
from dgr_jax.tokens import template as template_module
from dgr_jax.tokens.chat import ChatFormat
from tests.small_models import TEMPLATE, byte_level, trace, write_folder

OPENING = "<|bot|>{%- endif -%}"


def chat(folder: pathlib.Path, template: object) -> ChatFormat:
    return ChatFormat.from_pretrained(write_folder(folder, template=template))


def opening(text: str, hint: str = "") -> str:
    """The template with `hint` after each turn of the user and `text` after the generation prompt."""
    turn = "{{ m.content }}" + (f"{{% if m.role == 'user' %}}{hint}{{% endif %}}" if hint else "")
    return TEMPLATE.replace("{{ m.content }}", turn).replace(OPENING, f"<|bot|>{text}{{%- endif -%}}")


@pytest.mark.parametrize(
    "wrong",
    [
        "{{ 'a' + 1 }}",
        "{{ none.x.y }}",
        "{{ messages[7].role }}",
        "{{ 1 // 0 }}",
        "{{ raise_exception('no') }}",
        "{% x",
    ],
)
def test_what_python_raises_in_a_template_is_one_line(tmp_path, wrong):
    with pytest.raises(
        UserError, match="chat template of .*(fails for user|is not Jinja) .*; mend or change"
    ) as caught:
        chat(tmp_path, wrong + TEMPLATE)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("way_out", ["''.__class__.__mro__", "messages.append({})", "cycler.__init__.__globals__"])
def test_templates_run_in_a_sandbox(tmp_path, way_out):
    with pytest.raises(UserError, match="fails for user"):
        chat(tmp_path, f"{{{{ {way_out} }}}}" + TEMPLATE)


def test_an_endless_template_ends(tmp_path, monkeypatch):
    monkeypatch.setattr(template_module, "_SECONDS", 0.3)
    begin = time.monotonic()
    with pytest.raises(UserError, match="does not end within"):
        chat(tmp_path, "{% for i in range(99999) %}{% for j in range(99999) %}{% endfor %}{% endfor %}" + TEMPLATE)
    assert time.monotonic() - begin < 30


@pytest.mark.parametrize("large", [
    "{{ 9 ** 9 ** 9 }}", "{{ 'a' * 99999999999 }}", "{{ '%999999999d' % 1 }}", "{{ '{:999999999}'.format(1) }}",
    "{{ '%(x)-999999999d' % {'x': 1} }}", "{{ '%.999999999f' % 1 }}", "{{ '{0:>9.999999999f}'.format(1) }}",
    "{{ 'a' | center(1e12 | int) }}",
])  # fmt: skip
def test_numbers_without_end_are_refused_before_they_are_computed(tmp_path, large):
    with pytest.raises(UserError, match="calculates with"):
        chat(tmp_path, large + TEMPLATE)


def test_numbers_that_are_no_widths_are_read(tmp_path):
    example = """{"name": "call", "arguments": {"id": 123456789, "share": "50%"}}"""
    quoted = chat(tmp_path, "{{ '" + example + "' }}" + TEMPLATE)
    assert quoted.decode(quoted.prompt_ids("Why?")) == example + "<|user|>Why?<|bot|>"


def test_the_clock_of_a_template_stands_still(tmp_path):
    dated = chat(tmp_path, "{{ strftime_now('%d %b %Y %H:%M:%S') }}" + TEMPLATE)
    assert dated.decode(dated.prompt_ids("Why?")) == "26 Jul 2024 00:00:00<|user|>Why?<|bot|>"


def test_a_template_that_draws_is_refused(tmp_path):
    with pytest.raises(UserError, match="writes another text each time"):
        chat(tmp_path, "{{ range(9999) | random }}" + TEMPLATE)


def test_named_templates(tmp_path):
    named = [{"name": "chat", "template": TEMPLATE}, {"name": "tools", "template": TEMPLATE}]
    with pytest.raises(
        UserError, match="there are several, chat, tools, and none is called default; keep the right one"
    ):
        chat(tmp_path / "a", named)
    assert chat(tmp_path / "b", [{"name": "default", "template": TEMPLATE}, *named]).prompt_ids("Why?")


@pytest.mark.parametrize(
    ("template", "opens"),
    [
        (TEMPLATE, False),
        (opening("<think>\n"), True),
        (opening("Let me see.\n<think>"), True),
        (opening("", " Think inside <think> tags."), False),
        (opening("", " Think inside <think> and </think>."), False),
        (opening("<think>\n", " Think inside <think> and </think>."), True),
        (opening("<think></think><think>\n"), True),
        (opening("{% if not thinking %}</think>{% endif %}"), False),
        (opening("{% if enable_thinking is false %}<think>\n\n</think>{% endif %}"), False),
    ],
)
def test_thinking_is_open_where_the_last_tag_of_the_generation_prompt_opens_it(tmp_path, template, opens):
    made = chat(tmp_path, template)
    assert made.opens_thinking == opens
    response = made.decode(made.render(trace()).token_ids).rpartition("<|bot|>")[2]
    assert response.count("<think>") == 1 + ("<think></think>" in template)
    assert response.endswith("Because.\n</think>\n\nSo.<|end|>")


def test_a_prompt_that_ends_the_thinking_is_refused(tmp_path):
    with pytest.raises(UserError, match="its generation prompt ends the thinking .* take out what writes </think>"):
        chat(tmp_path, opening("<think>\n\n</think>\n\n"))


def test_the_fingerprint_knows_template_and_tokens(tmp_path):
    plain = chat(tmp_path / "a", TEMPLATE)
    assert plain.fingerprint == chat(tmp_path / "b", TEMPLATE).fingerprint
    assert plain.fingerprint != chat(tmp_path / "c", opening("<think>\n")).fingerprint
    other = ChatFormat.from_pretrained(write_folder(tmp_path / "d", byte_level(text=["zeb"])))
    assert plain.fingerprint != other.fingerprint
