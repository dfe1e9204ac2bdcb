"""What all scripts share: common flags with one meaning everywhere, and how an error reaches the shell."""

import dataclasses
import os
import sys
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any, NoReturn, get_args

from absl import app, flags, logging

from dgr_jax.errors import UserError
from dgr_jax.scoring.settings import OnLong, ScoreSettings

if TYPE_CHECKING:  # heavy imports: --help must not pay for them
    from dgr_jax.generation.engine import Decoding, Engine
    from dgr_jax.models.decoder import Decoder
    from dgr_jax.tokens.chat import ChatFormat

FLAGS = flags.FLAGS
flags.disclaim_key_flags()  # common flags count as the script's own, so that --help lists them

INTERRUPTED = 130
"""Exit status after Ctrl-C, as a shell reports SIGINT."""
BROKEN_PIPE = 141
"""Exit status when the reader of our output left (`| head`), as a shell reports SIGPIPE."""


def run(main: Callable[[list[str]], object]) -> None:
    """Parses flags, calls `main(argv)` and exits.

    A `UserError` becomes "error: ..." on standard error and status 1; Ctrl-C becomes status 130; a reader
    that leaves ends the script quietly. Any other exception is a bug and keeps its traceback.
    """

    def guarded(argv: list[str]) -> None:
        try:
            if len(argv) > 1:
                raise UserError(f"argument {argv[1]!r} is not a flag; flags are written --name=value, see --help")
            main(argv)
            sys.stdout.flush()
        except UserError as error:
            print("error:", " ".join(str(error).splitlines()), file=sys.stderr)
            sys.exit(1)
        except ImportError as error:
            if "gcsfs" not in str(error):
                raise
            print("error: gs:// paths need gcsfs; install it: pip install 'dgr_jax[gcs]'", file=sys.stderr)
            sys.exit(1)
        except NotImplementedError as error:
            if not _given("implementation"):
                raise
            # A named kernel says what it cannot serve.
            print("error: --implementation:", " ".join(str(error).splitlines()), file=sys.stderr)
            sys.exit(1)
        except KeyboardInterrupt:
            print("interrupted", file=sys.stderr)
            sys.exit(INTERRUPTED)
        except BrokenPipeError:
            # What is left in the buffer would fail once more when Python closes the stream.
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(BROKEN_PIPE)

    def alone_or_joined(argv: list[str]) -> None:
        try:
            guarded(argv)
        except BaseException as error:
            if _given("hosts") is not None:
                from dgr_jax.run import hosts

                hosts.abandon(error)
            raise

    # absl would switch on INFO, and with it pages of Orbax; --verbosity=0 still does.
    logging.set_verbosity(logging.WARNING)
    app.run(alone_or_joined, flags_parser=_parse_flags)


def _given(name: str) -> Any:
    """Value of a flag that this script may not have."""
    return FLAGS[name].value if name in FLAGS else None


def define_common_flags(*names: str, required: Sequence[str] = ()) -> None:
    """Defines those of the common flags that a script uses.

    Args:
      names: keys of `_COMMON_FLAGS`.
      required: names that must be given on the command line.
    """
    for name in names:
        _COMMON_FLAGS[name]()
    flags.mark_flags_as_required(list(required))


_COMMON_FLAGS: dict[str, Callable[[], object]] = {
    "model": lambda: flags.DEFINE_string(
        "model", None, "Hugging Face model folder (config, safetensors, tokenizer, chat template) or hub id."
    ),
    "input": lambda: flags.DEFINE_string(
        "input",
        None,
        "Traces: a .jsonl or .parquet file, local or gs://, or NAME:PLACE for a published data set "
        "(star1:FILE.json, star_benign, r1_act, direct_refusal, safechain), hf:HUB_ID, tfds:FOLDER.",
    ),
    "inputs": lambda: flags.DEFINE_list(
        "inputs", None, "Several of what --input takes in other scripts, separated by commas."
    ),
    "output": lambda: flags.DEFINE_string(
        "output",
        None,
        "Directory for everything the run writes, local or gs://; an unfinished run in it is resumed.",
    ),
    "seed": lambda: flags.DEFINE_integer(
        "seed",
        0,
        "Seed of every random choice; a row's draws depend on the seed and the row, not on its batch.",
    ),
    "dtype": lambda: flags.DEFINE_enum(
        "dtype",
        None,
        ["float32", "bfloat16"],
        "Dtype of weights and activations; by default float32 on CPU, bfloat16 on TPU and GPU.",
    ),
    "mesh": lambda: flags.DEFINE_string(
        "mesh",
        "auto",
        'Device mesh: "auto" (all on fsdp) or sizes such as data=2,fsdp=4,tensor=1; one may be -1.',
    ),
    "hosts": lambda: flags.DEFINE_string(
        "hosts",
        None,
        'One run on several hosts, the same command on each: "auto" on a TPU pod or under Slurm, or '
        "ADDRESS:PORT,COUNT,INDEX with the first host's address and this host's index from 0.",
    ),
    "implementation": lambda: flags.DEFINE_enum(
        "implementation",
        None,
        ["reference", "chunked", "tpu", "gpu"],
        "Of attention and token scores: two in XLA, and the hand-written kernels of a device. By default what was "
        "measured to be fastest there, which so far is XLA. Decoding steps always use XLA.",
    ),
    "on_bad_row": lambda: flags.DEFINE_enum(
        "on_bad_row",
        "error",
        ["error", "skip"],
        "What to do with a row that is not a trace: stop, or leave it out and count it.",
    ),
    "exclude": lambda: flags.DEFINE_multi_string(
        "exclude",
        [],
        "Evaluation suite (NAME:PATH or a .jsonl file) whose prompts must not be trained on: such rows are left out "
        "and counted; repeatable.",
    ),
}


def join_hosts() -> None:
    """Joins the hosts that --hosts names, if any; before anything asks for a device."""
    if FLAGS.hosts is not None:
        from dgr_jax.run import hosts

        hosts.join(FLAGS.hosts)


def define_config_flag(default: str | None, help: str) -> None:
    """Defines --config=FILE with overrides --config.field=value; `config` reads it."""
    from ml_collections import config_flags

    try:
        config_flags.DEFINE_config_file("config", default, help)
    except _CONFIG_ERRORS as error:  # it looks at overrides of the default here, before flags are parsed
        _refuse_config(error)


_CONFIG_ERRORS = (AttributeError, KeyError, OSError)


def _refuse_config(error: Exception) -> NoReturn:
    text = str(error)
    if not isinstance(error, OSError):
        while isinstance(error.args[0], Exception):  # a KeyError, whose str() is a repr, comes wrapped
            error = error.args[0]
        text = f"no such field: {error.args[0]} (the config file names them all)"
    print("error: --config:", " ".join(text.replace("\\n", " ").split()), file=sys.stderr)
    sys.exit(1)


def _parse_flags(argv: list[str]) -> list[str]:
    try:
        return app.parse_flags_with_usage(argv)
    except _CONFIG_ERRORS as error:
        _refuse_config(error)


def config() -> dict[str, Any]:
    """The config that the command line asks for."""
    try:
        return FLAGS.config.to_dict()
    except OSError as error:
        raise UserError(f"--config: {error}; give a file such as those of configs/") from error


def define_scoring_flags() -> None:
    """Flags that `scoring_settings` reads, beside --dtype, --mesh and --implementation."""
    usual = ScoreSettings()
    flags.DEFINE_integer("max_length", usual.max_length, "Longest trace taken whole, in tokens.", lower_bound=2)
    flags.DEFINE_enum(
        "on_long",
        usual.on_long,
        list(get_args(OnLong)),
        "What to do with a longer trace: stop, score its first --max_length tokens, or score all of it in windows that "
        "overlap by half.",
    )
    flags.DEFINE_integer(
        "tokens_per_batch", None, "Tokens per batch; 4096 by default on a CPU, 8192 elsewhere.", lower_bound=1
    )
    flags.DEFINE_bool(
        "share_prefixes", usual.share_prefixes, "Compute common first tokens of traces once. The scores are the same."
    )
    flags.DEFINE_integer(
        "workers", None, "Processes that tokenise; by default 0 on a CPU, which computes with all cores.", lower_bound=0
    )
    flags.DEFINE_integer(
        "rows_per_shard",
        usual.rows_per_shard,
        "Traces per output file: planned together, and what a kill may cost.",
        lower_bound=1,
    )


def scoring_settings() -> dict[str, Any]:
    """Fields of `ScoreSettings`, as the command line asks for them."""
    return {field.name: FLAGS[field.name].value for field in dataclasses.fields(ScoreSettings)}


def define_generation_flags(max_new_tokens: int) -> None:
    """Flags that `decoding` reads."""
    flags.DEFINE_float("temperature", 0.6, "Sampling temperature; 0 is greedy.", lower_bound=0)
    flags.DEFINE_float("top_p", 0.95, "Keep the likeliest tokens up to this probability.", lower_bound=0, upper_bound=1)
    flags.DEFINE_integer("top_k", 0, "Keep so many tokens; 0 keeps all.", lower_bound=0)
    flags.DEFINE_integer("max_new_tokens", max_new_tokens, "Longest output, in tokens.", lower_bound=1)


def decoding() -> "Decoding":
    """The decoding that the command line asks for."""
    from dgr_jax.generation.engine import Decoding

    return Decoding(FLAGS.temperature, FLAGS.top_p, FLAGS.top_k, FLAGS.max_new_tokens)


def define_engine_flags() -> None:
    """Flags that `engine` reads, beside --model, --dtype, --mesh and --implementation."""
    flags.DEFINE_enum("engine", "builtin", ["builtin", "openai"], "Built-in sampler, or an OpenAI-compatible server.")
    flags.DEFINE_string("base_url", "http://localhost:8000/v1", "Server of --engine=openai.")
    flags.DEFINE_string("served_model", None, "Model name at the server; --model by default.")
    flags.DEFINE_integer("batch_size", 64, "Rows decoded at a time by the built-in sampler.", lower_bound=1)


def engine() -> "tuple[Engine, ChatFormat, Decoder | None]":
    """The engine that the command line asks for, its chat format, and the weights where they are here."""
    if FLAGS.engine == "openai":
        from dgr_jax.generation.openai import OpenAIEngine
        from dgr_jax.tokens.chat import ChatFormat

        server = OpenAIEngine(FLAGS.base_url, FLAGS.served_model or FLAGS.model)
        return server, ChatFormat.from_pretrained(FLAGS.model), None
    from dgr_jax.generation.sampler import Sampler
    from dgr_jax.models.sharding import mesh_or_none

    mesh = mesh_or_none(FLAGS.mesh)
    sampler = Sampler.from_pretrained(
        FLAGS.model,
        mesh=mesh,
        dtype=FLAGS.dtype,
        implementation=FLAGS.implementation,
        batch_size=FLAGS.batch_size,
    )
    return sampler, sampler.chat, sampler.model
