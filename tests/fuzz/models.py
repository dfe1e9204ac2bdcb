"""What is fuzzed of a model's folder: its config, tokenizer, template and weights."""

import json
import pathlib
import random
import shutil
from collections.abc import Callable
from typing import Any

from dgr_jax.models.adapter import Adapter, Lora
from dgr_jax.models.adapter_files import load_adapter, save_adapter
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.decoder import init_model
from dgr_jax.models.folder import load_config
from dgr_jax.models.weights import from_pretrained, save_pretrained
from dgr_jax.tokens import template
from dgr_jax.tokens.chat import ChatFormat
from tests.calling import REPO, TRACES
from tests.fuzz import mutate

TINY = REPO / "dgr_jax" / "assets" / "tiny_lrm"
Draw = Callable[[random.Random], Callable[[], object]]


def small_model(folder: pathlib.Path, **options: Any) -> pathlib.Path:
    """A model of two layers under tiny-lrm's tokenizer."""
    vocabulary = json.loads((TINY / "config.json").read_text())["vocab_size"]
    config = ModelConfig("qwen3", vocabulary, 16, 24, 2, 2, 1, 8, tie_embeddings=True, qk_norm=True, max_positions=512)
    save_pretrained(init_model(config, 0), folder, companions_from=TINY, **options)
    return folder


def damage_one(rng: random.Random, sound: pathlib.Path, damaged: pathlib.Path, names: list[str]) -> None:
    """Makes `damaged` a copy of a folder in which one of some files is damaged, or gone."""
    if damaged.exists():
        shutil.rmtree(damaged)
    shutil.copytree(sound, damaged)
    file = damaged / rng.choice(names)
    if rng.random() < 0.03:
        file.unlink()
    else:
        file.write_bytes(mutate.with_suffix(file.suffix)(rng, file.read_bytes()))


def configs(folder: pathlib.Path) -> Draw:
    """config.json beside sound weights."""
    sound = small_model(folder / "sound")

    def draw(rng: random.Random) -> Callable[[], object]:
        damage_one(rng, sound, folder / "model", ["config.json"])
        return lambda: (load_config(folder / "model"), from_pretrained(folder / "model"))

    return draw


def tokenizers(folder: pathlib.Path) -> Draw:
    """The files of a tokenizer."""
    sound = small_model(folder / "sound")
    extra = {"tokenizer_class": "PreTrainedTokenizerFast", "added_tokens_decoder": {}, "model_max_length": 512}
    settings = sound / "tokenizer_config.json"
    settings.write_text(json.dumps(extra | json.loads(settings.read_text())))
    (sound / "special_tokens_map.json").write_text(json.dumps({"eos_token": "<|im_end|>"}))
    names = [file.name for file in sound.iterdir() if file.suffix == ".json"]
    usual = ["tokenizer.json", "tokenizer_config.json"] * 3
    vocabulary = load_config(sound).vocab_size

    def read() -> None:
        chat = ChatFormat.from_pretrained(folder / "model")
        chat.check_fits(vocabulary)
        for trace in TRACES[:2]:
            chat.parse(chat.decode(chat.render(trace).token_ids))

    def draw(rng: random.Random) -> Callable[[], object]:
        damage_one(rng, sound, folder / "model", [*names, *usual])
        return read

    return draw


PARTS = (
    "{% for m in messages %}", "{% endfor %}", "{% if add_generation_prompt %}", "{% endif %}", "{{ m['content'] }}",
    "{{ m.content | trim }}", "{% for i in range(99999) %}", "{% set x = 'a' * 99999 %}",
    "{{ raise_exception('no') }}", "{{ ''.__class__.__mro__ }}", "{{ messages | tojson }}",
    "{{ strftime_now('%Y') }}", "{% generation %}", "{% macro f() %}", "{{ f() }}", "{% endmacro %}",
    "{{ messages[5].content }}", "{{ 1 / 0 }}", "{{ messages.append(1) }}", "<|im_start|>", "{{ '<think>\\n' }}",
    "</think>", "{{ cycler }}", "{% include 'x' %}", "{% set ns = namespace(a=1) %}", "{{ none.x }}",
    "{{ lipsum() }}", "{{ 'x' ** 9 }}", "{{ '%s' | format(messages) }}", "{% break %}", "{{ '%999999999d' % 1 }}",
    "{{ messages | random }}", "{{ 'a' | center(99999999) }}",
)  # fmt: skip


def templates(folder: pathlib.Path) -> Draw:
    """Chat templates, the endless and the curious among them."""
    sound = small_model(folder / "sound")
    text = (sound / "chat_template.jinja").read_text()
    template._SECONDS = 1.0  # an endless one costs as much

    def draw(rng: random.Random) -> Callable[[], object]:
        damaged = text
        for _ in range(rng.choice((1, 1, 2))):
            damaged = mutate.in_text(rng, damaged, (*PARTS, *PARTS, text))
        (sound / "chat_template.jinja").write_text(damaged, errors="replace")

        def read() -> None:
            chat = ChatFormat.from_pretrained(sound)
            for trace in TRACES[:2]:
                chat.render(trace)

        return read

    return draw


def weights(folder: pathlib.Path) -> Draw:
    """safetensors files, their headers and their index."""
    single, several = small_model(folder / "single"), small_model(folder / "several", max_shard_bytes=8_000)
    assert (several / "model.safetensors.index.json").exists()

    def draw(rng: random.Random) -> Callable[[], object]:
        damaged = folder / "model"
        sound = rng.choice((single, several))
        names = sorted(file.name for file in sound.iterdir() if "safetensors" in file.name)
        if "model.safetensors.index.json" in names:
            names += ["model.safetensors.index.json"] * len(names)
        name = rng.choice(names)
        damage_one(rng, sound, damaged, [name])
        file = damaged / name
        if file.suffix == ".safetensors" and rng.random() < 0.7:
            content = (sound / name).read_bytes()
            length = int.from_bytes(content[:8], "little")
            header = mutate.in_json(rng, content[8 : 8 + length])
            size = len(header) if rng.random() < 0.9 else rng.choice((0, 1, 2**31, 2**63, length))
            file.write_bytes(size.to_bytes(8, "little") + header + content[8 + length :])
        return lambda: from_pretrained(damaged)

    return draw


def adapters(folder: pathlib.Path) -> Draw:
    """An adapter's config, with all fields that PEFT writes, and its weights."""
    base = small_model(folder / "base")
    config, sound, damaged = load_config(base), folder / "sound", folder / "adapter"
    adapter = Adapter.fresh(config, Lora(2, 4.0, ("q", "down")), 0)
    save_adapter(adapter, sound, config=config, base=base, name="some/base")
    file = sound / "adapter_config.json"
    others = {"use_dora": False, "rank_pattern": {}, "modules_to_save": None, "loftq_config": {}, "peft_version": "1"}
    file.write_text(json.dumps(json.loads(file.read_text()) | others))

    def draw(rng: random.Random) -> Callable[[], object]:
        damage_one(rng, sound, damaged, ["adapter_config.json", "adapter_config.json", "adapter_model.safetensors"])
        return lambda: load_adapter(damaged, config, base)

    return draw
