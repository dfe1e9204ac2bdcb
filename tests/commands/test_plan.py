"""scripts/plan.py from end to end; this machine's own CPU stands for the one that is planned for."""

import re
import sys

import jax
import pytest
from absl import flags

from dgr_jax.commands import plan
from dgr_jax.errors import UserError
from dgr_jax.planning import machines


@pytest.fixture
def planned(monkeypatch, random_model, capsys):
    """Calls the command with flags, and gives what it printed."""
    monkeypatch.setattr(machines, "_topology", lambda platform, name: jax.devices()[:1])

    def call(*arguments: str) -> str:
        given = flags.FlagValues()
        argv = ["plan.py", "--device=v5e:1", f"--model={random_model}", "--nosearch", *arguments]
        monkeypatch.setattr(sys, "argv", argv)  # a default config is read before flags are parsed
        plan.define(given)
        given(argv)
        plan.main(given)
        return capsys.readouterr().out

    return call


def parts(text: str) -> dict[str, list[str]]:
    return {line[:26].strip(): line[26:].split() for line in text.splitlines() if re.match(r"  [a-z]", line)}


@pytest.mark.parametrize(
    ("purpose", "programs"), [("score", ["score"]), ("sft", ["train"]), ("refine", ["admit", "decode", "score"])]
)
def test_each_purpose_has_its_programs(planned, purpose, programs):
    text = planned(f"--for={purpose}", "--length=128", "--prompt_length=40", "--max_new_tokens=32")
    assert text.splitlines()[0].startswith(f"{purpose} on v5e:1 (data=1, fsdp=1, tensor=1): ")
    assert text.splitlines()[2].split()[3:] == programs
    assert len(parts(text)["weights"]) == len(programs)
    assert "GiB, of which 5% stay free: fits" in text
    for program in programs:
        assert re.search(rf"^{program}: \S+ FLOP, .* compiled here in \d+ s$", text, re.MULTILINE)


def test_a_prompt_is_planned_as_it_is_admitted(planned):
    assert "rows of 96 tokens at a time, prompts of 64," in planned(
        "--for=refine", "--prompt_length=40", "--max_new_tokens=32"
    )


def test_what_is_searched_for_is_found(planned):
    text = planned("--for=score", "--length=128", "--search", "--rows=4")
    assert int(re.search(r"largest batch that fits: (\d+) rows \(this plan: 4\)", text)[1]) > 1000


def test_a_config_file_alone_is_enough(planned, random_model):
    assert "fits" in planned("--for=score", "--length=128", f"--model={random_model / 'config.json'}")


def test_what_does_not_fit_is_an_error_after_the_plan(planned, monkeypatch, capsys):
    small = machines.CHIPS["v5e"]._replace(memory=1 << 20)
    monkeypatch.setitem(machines.CHIPS, "v5e", small)
    with pytest.raises(
        UserError, match=r"GiB a device do not fit v5e:1, which has 0.00 .*; take fewer `rows` \(--config"
    ):
        planned("--for=sft", "--length=128")
    assert "DOES NOT FIT" in capsys.readouterr().out


@pytest.mark.parametrize(
    ("content", "message"),
    [("", "not JSON"), ('{"model_type": "qw', "not JSON"), ("[]", "not a JSON object; give a model's config.json")],
)
def test_a_damaged_config_is_named(planned, tmp_path, content, message):
    (tmp_path / "config.json").write_text(content)
    with pytest.raises(UserError, match=message):
        planned("--for=score", f"--model={tmp_path / 'config.json'}")


@pytest.mark.parametrize(
    ("argument", "message"),
    [
        ("--model=no/where/config.json", "no/where/config.json"),
        ("--model=./nowhere", "model folder ./nowhere does not exist"),
        ("--mesh=tensor=3", "tensor=3 does not make the 1 devices"),
        ("--batch_size=many", "`batch_size` is 'many'; give a number of 1 or more, or auto"),
        ("--config.batch_size=0", "`batch_size` is 0; give a whole number of 1 or more"),
    ],
)
def test_a_wrong_setting_is_named(planned, argument, message):
    purpose = "sft" if argument.startswith("--config") else "refine"
    with pytest.raises(UserError, match=message):
        planned(f"--for={purpose}", argument)
