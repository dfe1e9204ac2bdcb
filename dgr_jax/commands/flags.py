"""Flags that commands share, each with one meaning everywhere, and what is made from them."""

import dataclasses
import functools
import sys
import traceback
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, get_args

from absl import flags

from dgr_jax.errors import UserError, shown
from dgr_jax.scoring.settings import OnLong, ScoreSettings

if TYPE_CHECKING:  # heavy imports: --help must not pay for them
    from dgr_jax.generation.engine import Decoding, Engine
    from dgr_jax.judges.judge import Judge
    from dgr_jax.models.decoder import Decoder
    from dgr_jax.scoring.source import ScoringModel
    from dgr_jax.tokens.chat import ChatFormat
    from dgr_jax.training.recipe import Recipe

flags.disclaim_key_flags()  # they belong to the command that defines them

Define = Callable[..., object]
"""Defines a flag, given its name and `flag_values`."""


def text(default: str | None, help: str) -> Define:
    """A flag that takes any text."""
    return functools.partial(flags.DEFINE_string, default=default, help=help)


def whole(default: int | None, help: str, least: int | None = None) -> Define:
    """A flag that takes a whole number of `least` or more."""
    return functools.partial(flags.DEFINE_integer, default=default, help=help, lower_bound=least)


def number(default: float, help: str, least: float = 0, most: float | None = None) -> Define:
    """A flag that takes a number between bounds."""
    return functools.partial(flags.DEFINE_float, default=default, help=help, lower_bound=least, upper_bound=most)


def yes_no(default: bool, help: str) -> Define:
    """A flag that is given or not."""
    return functools.partial(flags.DEFINE_bool, default=default, help=help)


def choice(default: str | None, allowed: Sequence[str], help: str) -> Define:
    """A flag that takes one of some words."""
    return functools.partial(flags.DEFINE_enum, default=default, enum_values=list(allowed), help=help)


def several(help: str) -> Define:
    """A flag that may be given repeatedly."""
    return functools.partial(flags.DEFINE_multi_string, default=None, help=help)


COMMON: dict[str, Define] = {
    "model": text(None, "Hugging Face model folder (config, safetensors, tokenizer, chat template) or hub id."),
    "adapter": text(None, "Folder or hub id of a LoRA adapter in PEFT's format, which is used beside --model."),
    "input": text(
        None,
        "Traces: a .jsonl or .parquet file, local or gs://, or NAME:PLACE for a published data set "
        "(star1:FILE.json, star_benign, r1_act, direct_refusal, safechain), hf:HUB_ID, tfds:FOLDER, solved:EVALUATION, "
        "direct_refusal_form:SPEC, r1_act_form:SPEC.",
    ),
    "output": text(
        None, "Directory for everything the run writes, local or gs://; an unfinished run in it is resumed."
    ),
    "seed": whole(0, "Seed of every random choice; a trace's draws depend on seed and trace, not on its batch."),
    "dtype": choice(
        None,
        ["float32", "bfloat16"],
        "Dtype of weights and activations; by default float32 on CPU, bfloat16 on TPU and GPU.",
    ),
    "mesh": text("auto", 'Device mesh: "auto" (all on fsdp) or sizes such as data=2,fsdp=4,tensor=1; one may be -1.'),
    "hosts": text(
        None,
        'One run on several hosts, the same command on each: "auto" on a TPU pod or under Slurm, or '
        "ADDRESS:PORT,COUNT,INDEX with the first host's address and this host's index from 0.",
    ),
    "implementation": choice(
        None,
        ["reference", "chunked", "tpu", "gpu"],
        "Of attention and token scores: two in XLA, and the hand-written kernels of a device. By default what "
        "docs/kernels.md says for the device and the rows. Decoding steps always use XLA.",
    ),
    "compilation_cache": text(
        "auto",
        'Folder, local or gs://, that keeps compiled programs for the next run; "auto" is the user\'s own cache folder '
        'on TPU and GPU and none on a CPU, "off" is none.',
    ),
    "on_bad_row": choice(
        "error", ["error", "skip"], "What to do with a row that is not a trace: stop, or leave it out and count it."
    ),
    "exclude": several(
        "Evaluation suite (NAME:PATH or a .jsonl file) whose prompts must not be trained on: such traces are left out "
        "and counted; repeatable."
    ),
    "judge": text(None, "Phrases file of the judge of refusals; by default English's phrases."),
    "judges": several(
        'Judge of requests: "phrases" (the default), a phrases file FILE.json, or a guard model as KIND:DIR, such as '
        "qwen3guard:DIR (docs/evaluation.md has the kinds; NAME= before it names it); repeatable, the first one grades."
    ),
}

_USUAL = ScoreSettings()
SCORING: dict[str, Define] = {
    "max_length": whole(_USUAL.max_length, "Longest trace taken whole, in tokens.", 2),
    "on_long": choice(
        _USUAL.on_long,
        get_args(OnLong),
        "What to do with a longer trace: stop, score its first --max_length tokens, or score all of it in windows that "
        "overlap by half.",
    ),
    "tokens_per_batch": whole(None, "Tokens per batch; 4096 by default on a CPU, 8192 elsewhere.", 1),
    "share_prefixes": yes_no(
        _USUAL.share_prefixes, "Compute common first tokens of traces once. The scores are the same."
    ),
    "workers": whole(
        None, "Processes that tokenise; by default 0 on a CPU, which computes with all cores, and a few elsewhere.", 0
    ),
    "traces_per_shard": whole(
        _USUAL.traces_per_shard, "Traces per output file: planned together, and what a kill may cost.", 1
    ),
}

GENERATION: dict[str, Define] = {
    "temperature": number(0.6, "Sampling temperature; 0 is greedy."),
    "top_p": number(0.95, "Keep the likeliest tokens up to this probability.", 0, 1),
    "top_k": whole(0, "Keep so many tokens; 0 keeps all.", 0),
    "max_new_tokens": whole(4096, "Longest output, in tokens.", 1),
    "prefill": text(
        None,
        "What each response is made to begin with, without think tags: a text, or field:NAME, a field of each "
        "item (target of JailbreakBench's CSV; prefill or target of own files) or of each trace's meta. An empty text "
        "at the thinking forces its open tag alone.",
    ),
    "prefill_at": choice(
        "thinking", ["thinking", "answer"], "Where --prefill stands; before an answer the thinking is empty."
    ),
    "prefill_tokens": whole(0, "Take so many tokens of --prefill; 0 takes all.", 0),
    "engine": choice("builtin", ["builtin", "openai"], "Built-in sampler, or an OpenAI-compatible server."),
    "base_url": text("http://localhost:8000/v1", "Server of --engine=openai."),
    "served_model": text(None, "Model name at the server; --model by default."),
    "batch_size": text(
        "auto", 'Prompts decoded at a time by the built-in sampler: a number, or "auto" for as many as memory holds.'
    ),
}


def define(given: flags.FlagValues, common: str, *groups: dict[str, Define], required: str, **own: Define) -> None:
    """Defines a command's flags.

    Args:
      given: receives them.
      common: names of `COMMON`, with spaces between.
      groups: tables of flags, all of which the command has.
      required: names that must be given, with spaces between.
      own: flags of this command alone.
    """
    table = {("judge" if name == "judges" else name): COMMON[name] for name in common.split()}
    for group in (*groups, own):
        table |= group
    for name, flag in table.items():
        flag(name, flag_values=given)
    flags.mark_flags_as_required(required.split(), flag_values=given)


def define_config(given: flags.FlagValues, default: str | None, help: str) -> None:
    """Defines --config=FILE with overrides --config.field=value; `config` reads it."""
    from ml_collections import config_flags

    try:
        config_flags.DEFINE_config_file("config", default, help, flag_values=given)
    except Exception as error:  # overrides of a default config are looked at before flags are parsed
        raise refused_config(error) from error


def refused_config(error: Exception) -> UserError:
    """What the error of a config file, which is a program, or of an override says to people."""
    text = str(error)
    own = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.name in ("get_config", "<module>")]
    if isinstance(error, SyntaxError):
        text = f"{error.filename}:{error.lineno}: {error.msg}; mend the file"
    elif own and own[-1].filename != sys.argv[0] and not isinstance(error, OSError):  # which names its file
        text = f"{own[-1].filename}:{own[-1].lineno} fails with {type(error).__name__}: {text}; mend the file"
    elif "'get_config'" in text:
        text = "the file has no function get_config; see configs/"
    elif isinstance(error, AttributeError | KeyError):
        while isinstance(error.args[0], Exception):  # a KeyError, whose str() is a repr, comes wrapped
            error = error.args[0]
        text = f"no such field: {error.args[0]} (the config file names them all)"
    return UserError(f"--config: {' '.join(text.replace('\\n', ' ').split())}")


def config(given: flags.FlagValues) -> dict[str, Any]:
    """The config that the command line asks for."""
    try:
        if not hasattr(given.config, "to_dict"):
            found = shown(given.config)
            raise UserError(f"--config: get_config returns {found}; it must return an ml_collections.ConfigDict")
        return given.config.to_dict()
    except OSError as error:  # a file that is not there is said when it is asked for something
        raise refused_config(error) from error


def recipe(given: flags.FlagValues, **fixed: Any) -> "Recipe":
    """The recipe that --config asks for, with fields that other flags say."""
    from dgr_jax.training.recipe import Recipe

    asked = config(given)
    for field, flag in (("seed", "--seed"), ("compute_dtype", "--dtype")):
        if field in asked:
            raise UserError(f"--config: field {field!r} is not for the config file; give {flag}")
    unknown = asked.keys() - {field.name for field in dataclasses.fields(Recipe)}
    if unknown:
        raise UserError(f"--config: unknown field {min(unknown)!r}; the fields are those of {Recipe.__module__}.Recipe")
    return Recipe(**asked | fixed)


def scoring_model(given: flags.FlagValues) -> "ScoringModel":
    """The model to score with, from the flags of `SCORING`, --model, --dtype, --mesh and --implementation."""
    from dgr_jax.scoring.settings import usual_workers
    from dgr_jax.scoring.source import ScoringModel

    asked: dict[str, Any] = {name: given[name].value for name in SCORING}
    if given.workers is None:
        asked["workers"] = usual_workers()
    how: dict[str, Any] = {name: given[name].value for name in ("dtype", "mesh", "implementation", "adapter")}
    return ScoringModel(given.model, ScoreSettings(**asked), **how)


def decoding(given: flags.FlagValues) -> "Decoding":
    """How to decode, from the flags of `GENERATION`."""
    from dgr_jax.generation.engine import Decoding

    return Decoding(given.temperature, given.top_p, given.top_k, given.max_new_tokens)


def judges(given: flags.FlagValues) -> "list[Judge]":
    """The judges that --judge names; guards among them run as --mesh, --dtype and --batch_size say."""
    from dgr_jax.judges.load import load_judges

    if not any(":" in spec for spec in given.judge or ()):
        return load_judges(given.judge)
    from dgr_jax.models.sharding import mesh_or_none

    how = {"dtype": given.dtype, "implementation": given.implementation, "batch_size": batch_size(given.batch_size)}
    return load_judges(given.judge, mesh=mesh_or_none(given.mesh), **how)


def batch_size(asked: str) -> int | None:
    """What --batch_size asks for; None for as many rows as memory holds."""
    if asked == "auto":
        return None
    if not asked.isdecimal() or int(asked) < 1:
        raise UserError(f"`batch_size` is {shown(asked)}; give a number of 1 or more, or auto")
    return int(asked)


def check_server(given: flags.FlagValues) -> None:
    """Refuses what cannot be had of a server."""
    if given.hosts is not None:
        raise UserError("`engine` openai: a server is asked by one host; leave `hosts` out")
    if "adapter" in given and given.adapter is not None:
        raise UserError("`engine` openai: a server has its adapters itself; leave `adapter` out")


def engine(given: flags.FlagValues) -> "tuple[Engine, ChatFormat, Decoder | None]":
    """The engine that the flags of `GENERATION` ask for, its chat format, and the weights where they are here."""
    if given.engine == "openai":
        from dgr_jax.generation.openai import OpenAIEngine
        from dgr_jax.tokens.chat import ChatFormat

        check_server(given)
        chat = ChatFormat.from_pretrained(given.model)
        return OpenAIEngine(given.base_url, given.served_model or given.model, chat=chat), chat, None
    from dgr_jax.generation.sampler import Sampler
    from dgr_jax.models.sharding import mesh_or_none

    sampler = Sampler.from_pretrained(
        given.model,
        mesh=mesh_or_none(given.mesh),
        dtype=given.dtype,
        implementation=given.implementation,
        adapter=given.adapter,
        batch_size=batch_size(given.batch_size),
    )
    return sampler, sampler.chat, sampler.model
