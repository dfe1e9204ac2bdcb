"""Builds tiny-lrm, the embedded target model, from nothing: corpus, tokenizer, training, export."""

import dataclasses
import itertools
import json
import pathlib
from collections.abc import Iterator, Sequence

from dgr_jax import ASSETS
from dgr_jax.data.trace import Trace
from dgr_jax.dgr.request import read_template
from dgr_jax.models.config import ModelConfig
from dgr_jax.models.decoder import init_model
from dgr_jax.models.weights import save_pretrained
from dgr_jax.run.progress import Progress
from dgr_jax.tiny_world import alignment, corpus
from dgr_jax.tiny_world.tokenizer import END, PAD, build_tokenizer
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.tokens.packing import TokenSequence
from dgr_jax.training.batches import training_sequences
from dgr_jax.training.loop import train
from dgr_jax.training.recipe import Recipe

REWRITE_TEMPLATE = ASSETS / "tiny_rewrite_prompt.txt"
ROW_LENGTH = 192

_TOKENIZER_DOCUMENTS = 30_000
_TOKENIZER_SEED = 1_000_003  # far from the seeds of training corpora


@dataclasses.dataclass(frozen=True)
class Build:
    """Size and training of tiny-lrm. The defaults are the model in `dgr_jax/assets/tiny_lrm`.

    Training has two courses. In the first (`steps`) each text that is rewritten keeps to one kind, and the model learns
    the kinds rather than to copy; the second (`practice_steps`) throws the kinds together.
    """

    seed: int = 0
    steps: int = 2400
    practice_steps: int = 700
    batch_size: int = 48
    learning_rate: float = 2e-3
    practice_learning_rate: float = 1e-3
    hidden_size: int = 192
    intermediate_size: int = 512
    num_layers: int = 5
    num_heads: int = 4
    num_kv_heads: int = 2
    head_dim: int = 48


def _sample_texts(template: str) -> Iterator[str]:
    """Everything that is ever said in the tiny world, once: what the tokenizer must know as whole words."""
    rows: Iterator[Trace] = itertools.islice(corpus.documents(_TOKENIZER_SEED, template), _TOKENIZER_DOCUMENTS)
    safety = (
        alignment.safety_rows(source, harmful=500, benign=500, seed=_TOKENIZER_SEED) for source in alignment.SOURCES
    )
    for trace in itertools.chain(rows, *safety):
        yield from (trace.prompt, f"\n{trace.reasoning}\n", f"\n\n{trace.answer}")


def _training_data(documents: Iterator[Trace], wanted: int, chat: ChatFormat) -> Sequence[TokenSequence]:
    sequences: list[TokenSequence] = []
    with Progress("corpus", wanted, "documents") as progress:
        while len(sequences) < wanted:
            traces = itertools.islice(documents, 1000)
            rendered = training_sequences(list(traces), chat, 2 * ROW_LENGTH)
            fitting = [s for s in rendered if len(s.token_ids) <= ROW_LENGTH]
            sequences += fitting
            progress.advance(len(fitting))
    return sequences[:wanted]


def build(folder: pathlib.Path, work: pathlib.Path, config: Build) -> None:
    """Trains the model and writes its Hugging Face folder, whole or not at all.

    Args:
      folder: where the model goes; must not exist.
      work: receives checkpoints and metrics; a build of the same config that was stopped goes on from there.
      config: size and training.
    """
    template = read_template(REWRITE_TEMPLATE)
    companions = work / "tokenizer"
    companions.mkdir(parents=True, exist_ok=True)
    vocab_size = build_tokenizer(_sample_texts(template), companions)
    chat = ChatFormat.from_pretrained(companions)
    end, pad = (chat.tokenizer.convert_tokens_to_ids(token) for token in (END, PAD))
    generation = {"eos_token_id": end, "pad_token_id": pad, "do_sample": True, "temperature": 0.6, "top_p": 0.95}
    (companions / "generation_config.json").write_text(json.dumps(generation, indent=2) + "\n")
    architecture = ModelConfig(
        family="qwen3",
        vocab_size=-(-vocab_size // 64) * 64,
        hidden_size=config.hidden_size,
        intermediate_size=config.intermediate_size,
        num_layers=config.num_layers,
        num_heads=config.num_heads,
        num_kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        tie_embeddings=True,
        qk_norm=True,
        max_positions=32_768,
        eos_token_ids=(end,),
    )
    recipe = Recipe(
        learning_rate=config.learning_rate,
        steps=config.steps,
        batch_size=config.batch_size,
        row_length=ROW_LENGTH,
        warmup_fraction=0.02,
        final_fraction=0.02,
        weight_decay=0.01,
        seed=config.seed,
        checkpoint_every=200,
    )
    practice = dataclasses.replace(recipe, steps=config.practice_steps, learning_rate=config.practice_learning_rate)
    courses = (
        ("first course", recipe, corpus.documents(config.seed, template)),
        ("second course", practice, corpus.documents(config.seed, template, corpus.MIXED_PRACTICE)),
    )
    model = init_model(architecture, config.seed)
    for label, course, documents in courses:
        sequences = _training_data(documents, course.steps * course.batch_size, chat)
        model = train(model, sequences, course, folder=work / label.replace(" ", "_"), label=label).model
    save_pretrained(model, folder, dtype="bfloat16", companions_from=companions)
