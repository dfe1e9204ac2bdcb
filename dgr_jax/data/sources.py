"""Named data sets -> Trace, in the formats their authors published.

A spec names a source and where its rows are: "star1:/data/star1.json", "r1_act" (from the hub), or simply a
trace file. Adapters are a table: a function of one raw row, and the hub repository that holds such rows.
Records stay faithful: text loses nothing but the markers that delimited it and the whitespace next to them;
every field that is not text of the trace goes to `meta` untouched.
"""

import dataclasses
import re
import unicodedata
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Any

from etils import epath

from dgr_jax.data.derived import DIRECT_REFUSAL_REASONING, FORMS, in_form, solved_rows
from dgr_jax.data.files import (
    BadRows,
    OnBadRow,
    PlacedRow,
    Row,
    convert_rows,
    iter_traces,
    read_rows,
    trace_from_columns,
)
from dgr_jax.data.response import split_response
from dgr_jax.data.trace import THINK_CLOSE, THINK_OPEN, Trace, bad_field
from dgr_jax.data.values import as_json, with_class_names
from dgr_jax.errors import UserError, reason_of, shown

PUBLISHED_LABELS = {
    "harmful": "harmful",
    "benign": "benign",
    "vanilla_harmful": "harmful",
    "adversarial_harmful": "harmful",
    "vanilla_benign": "benign",
    "adversarial_benign": "benign",
}
"""Published label -> the Trace's. The finer one stays in `meta`."""

# A Qwen2.5 conversation, s1's markers in place of think tags. Its system turn is the template's, not data.
_S1_TEXT = re.compile(
    r"\s*(?:<\|im_start\|>system\n.*?<\|im_end\|>\s*)?<\|im_start\|>user\n(?P<prompt>.*?)<\|im_end\|>\s*"
    r"<\|im_start\|>assistant\s*<\|im_start\|>think\s*(?P<reasoning>.*?)\s*"
    r"<\|im_start\|>answer\s*(?:Answer:)?\s*(?P<answer>.*?)\s*(?:<\|im_end\|>\s*)?",
    re.DOTALL,
)
_PACKED = re.compile(r"\s*Question:\s*(?P<prompt>.*?)\s*\n\s*Answer:\s*(?P<answer>.*?)\s*", re.DOTALL)

END_TOKENS = (
    "<|im_end|>", "<|endoftext|>", "<|eot_id|>", "<|end_of_text|>", "<|end|>", "<｜end▁of▁sentence｜>", "</s>",
    "<end_of_turn>",
)  # fmt: skip
"""What published responses end with where an author kept a model's end token as text."""

Convert = Callable[[Row, str], Trace]


@dataclasses.dataclass(frozen=True)
class Adapter:
    """One published format.

    Attributes:
      convert: a raw row and where it stands -> Trace; raises UserError.
      hub_id: Hugging Face repository with such rows.
    """

    convert: Convert
    hub_id: str


def load_source(spec: str, on_bad_row: OnBadRow = "error", bad_rows: BadRows | None = None) -> list[Trace]:
    """All traces of a source; see `iter_source`."""
    return list(iter_source(spec, on_bad_row, bad_rows))


def iter_source(spec: str, on_bad_row: OnBadRow = "error", bad_rows: BadRows | None = None) -> Iterator[Trace]:
    """Streams the traces that a spec names.

    Args:
      spec: one of
        - a trace file: "rows.jsonl", "gs://bucket/rows.parquet", also written "jsonl:FILE" and
          "parquet:FILE";
        - "solved:PLACE": the right answers of an evaluation, by its folder or samples.jsonl;
        - "direct_refusal_form:SPEC", "r1_act_form:SPEC": the harmful rows of another source, in that form: see
          `dgr_jax.data.derived`;
        - "NAME" or "NAME:PLACE" with a name of `ADAPTERS`; PLACE is a .json (one list), .jsonl or .parquet
          file or a hub id, by default the author's;
        - "hf:HUB_ID": rows with a Trace's fields, through the datasets library;
        - "tfds:FOLDER_OR_NAME": the same in ArrayRecord, through TensorFlow Datasets. It has no null and no free-form
          objects: an empty `label` or `system` is an absent one, `meta` is a JSON string.
        The last three and hub ids may end in "@SPLIT", by default "@train" ("@train[:100]" works too).
      on_bad_row, bad_rows: see `dgr_jax.data.files.iter_traces`.

    Raises:
      UserError: an unknown source, rows that cannot be had, or a bad row.
    """
    name, colon, place = spec.partition(":")
    if name in ADAPTERS and (place or not colon):
        adapter = ADAPTERS[name]
        rows = _published_rows(place or adapter.hub_id)
        return convert_rows(rows, _validated(adapter.convert), on_bad_row, bad_rows)
    if name in FORMS and place:
        rows = ((f"{place}: trace {trace.id!r}", trace.to_dict()) for trace in iter_source(place, on_bad_row, bad_rows))
        convert = lambda row, where: in_form(name, Trace.from_dict(row, where), where)  # noqa: E731
        return convert_rows(rows, convert, on_bad_row, bad_rows)
    if name in _READERS and place:
        return convert_rows(_READERS[name](place), trace_from_columns, on_bad_row, bad_rows)
    file, suffixes = (place, (f".{name}",)) if name in _FILES else (spec, _SUFFIXES)
    if epath.Path(file).suffix in suffixes:
        return iter_traces(file, on_bad_row, bad_rows)
    raise UserError(
        f"source {spec!r} is not known; give a .jsonl or .parquet file of traces, or NAME:PLACE with one of "
        f"{', '.join([*ADAPTERS, *_FILES, *_READERS, *FORMS])}"
    )


def deduplicate(traces: Iterable[Trace], prompts: Iterable[str]) -> tuple[list[Trace], list[Trace]]:
    """Takes out the traces whose prompt is an evaluation prompt.

    Prompts are compared by their letters and digits alone: case, punctuation, spacing and Unicode variants of
    one character make no difference. Paraphrases are not found.

    Returns:
      The traces that stay and those that go, each in order.
    """
    known = {normalise_prompt(prompt) for prompt in prompts}
    kept: list[Trace] = []
    removed: list[Trace] = []
    for trace in traces:
        (removed if normalise_prompt(trace.prompt) in known else kept).append(trace)
    return kept, removed


def normalise_prompt(text: str) -> str:
    """Letters, marks and digits of a prompt, case-folded, words separated by one space."""
    folded = unicodedata.normalize("NFKC", text).casefold()
    words = "".join(c if unicodedata.category(c)[0] in "LMN" else " " for c in folded).split()
    return " ".join(words or folded.split())


def _direct_refusal(row: Row, where: str) -> Trace:
    """`text`, or `refusal` where there is no `text`. All prompts of the set ask for harm."""
    field, pattern = ("text", _S1_TEXT) if row.get("text") is not None else ("refusal", _PACKED)
    packed = _text(row, field, where)
    found = pattern.fullmatch(packed)
    if found is None:
        raise UserError(
            f"{where}: field {field!r}: found {shown(packed)}, allowed "
            + ("a chat string with s1's think and answer markers" if field == "text" else '"Question: ... Answer: ..."')
        )
    reasoning = found.groupdict().get("reasoning", DIRECT_REFUSAL_REASONING)
    meta = _rest(row, "text", "refusal", "prompt")
    if row.get("prompt", found["prompt"]) != found["prompt"]:
        meta["prompt"] = row["prompt"]
    id = f"direct_refusal-{row['id']}"
    return Trace(id, found["prompt"], reasoning, found["answer"], "harmful", "direct_refusal", meta)


def _response_format(
    source: str, prompt_field: str, *, label: str | None = None, needs_label: bool = False, needs_open: bool = False
) -> Convert:
    """Rows of a prompt and a response with the thinking inside; its open tag is optional unless `needs_open`.

    `label` is what the whole set is; where it is None a row's own `label` counts, if it has one.
    """

    def convert(row: Row, where: str) -> Trace:
        prompt, text = _text(row, prompt_field, where), _text(row, "response", where)
        response = split_response(text)
        if not response.well_formed or (needs_open and not text.lstrip().startswith(THINK_OPEN)):
            raise UserError(
                f"{where}: field 'response': think tags are unbalanced: found {text.count(THINK_OPEN)} "
                f"{THINK_OPEN} and {text.count(THINK_CLOSE)} {THINK_CLOSE}, allowed "
                f"{'one' if needs_open else 'at most one'} {THINK_OPEN} at the beginning and one "
                f"{THINK_CLOSE} after it"
            )
        return Trace(
            id=f"{source}-{row['id']}",
            prompt=prompt,
            reasoning=response.reasoning,
            answer=response.answer,
            label=label or _label(row, where, needs_label),
            source=source,
            meta=_rest(row, prompt_field, "response"),
        )

    return convert


def _label(row: Row, where: str, needed: bool) -> str | None:
    if row.get("label") is None and not needed:
        return None
    published = _text(row, "label", where)
    if published not in PUBLISHED_LABELS:
        raise bad_field(where, "label", published, ", ".join(PUBLISHED_LABELS))
    return PUBLISHED_LABELS[published]


def _rest(row: Row, *used: str) -> dict[str, Any]:
    return {name: value for name, value in row.items() if name not in ("id", *used)}


def _text(row: Row, field: str, where: str) -> str:
    if field not in row:
        raise UserError(f"{where}: field {field!r} is missing; the row has {', '.join(map(str, row)) or 'no fields'}")
    if not isinstance(row[field], str):
        raise bad_field(where, field, row[field], "a string")
    return row[field]


ADAPTERS: dict[str, Adapter] = {
    "direct_refusal": Adapter(_direct_refusal, "TianshengHuang/DirectRefusal"),
    "r1_act": Adapter(_response_format("r1_act", "instruction"), "Yeonjun/R1-Act-train"),
    "safechain": Adapter(_response_format("safechain", "instruction", needs_label=True), "UWNSL/SafeChain"),
    "star1": Adapter(_response_format("star1", "question", label="harmful", needs_open=True), "UCSC-VLAA/STAR-1"),
    "star_benign": Adapter(
        _response_format("star_benign", "question", label="benign", needs_open=True), "UCSC-VLAA/STAR-benign-915"
    ),
}
"""Source name -> published format. All prompts of STAR-1 ask for harm; its benign companion stands apart."""


_FILES = ("jsonl", "parquet")
_SUFFIXES = tuple(f".{name}" for name in _FILES)


def _published_rows(place: str) -> Iterator[PlacedRow]:
    """Rows as published; one without an id gets its number, counted from 1."""
    rows = read_rows(place) if epath.Path(place).suffix in (".json", *_SUFFIXES) else _hub_rows(place)
    for number, (where, row) in enumerate(rows, start=1):
        if isinstance(row, Mapping) and row.get("id") is None:
            row = {**row, "id": number}
        yield where, row


def _validated(convert: Convert) -> Convert:
    def checked(row: Row, where: str) -> Trace:
        trace = convert(row, where)
        trace.validate(where)
        return dataclasses.replace(trace, answer=_without_end_tokens(trace.answer))

    return checked


def _without_end_tokens(answer: str) -> str:
    """An answer that does not end with an end token: markers, which every model's format adds for itself."""
    while (bare := answer.rstrip()).endswith(END_TOKENS):
        answer = next(bare.removesuffix(token) for token in END_TOKENS if bare.endswith(token)).rstrip()
    return answer


def _hub_rows(place: str) -> Iterator[PlacedRow]:
    """Rows of a Hugging Face dataset, by hub id or local folder."""
    import datasets

    name, split = _split_of(place)
    try:
        rows = datasets.load_dataset(name, split=split)
    except Exception as error:  # the library raises many kinds for "cannot be had"; all mean the same here
        raise _not_loaded(f"hf:{place}", error) from error
    classes = _class_names(getattr(rows, "features", None) or {})
    for number, row in enumerate(rows, start=1):
        where = f"hf:{place}: row {number}"
        yield where, with_class_names(as_json(row), classes, where)


def _tfds_rows(place: str) -> Iterator[PlacedRow]:
    """Rows of an ArrayRecord dataset, by its folder or registered name; random access, no TensorFlow."""
    try:
        import tensorflow_datasets as tfds
    except ImportError as error:
        raise UserError(
            f"source 'tfds:{place}' needs TensorFlow Datasets ({error}); pip install tensorflow-datasets array_record"
        ) from error
    name, split = _split_of(place)
    try:
        if epath.Path(name).is_dir():
            builder = tfds.builder_from_directory(name)
        else:
            builder = tfds.builder(name, file_format="array_record")
            builder.download_and_prepare()
        rows = builder.as_data_source(split=split)  # pyright: ignore[reportCallIssue]
    except Exception as error:  # as above
        raise _not_loaded(f"tfds:{place}", error) from error
    classes = _class_names(builder.info.features)
    for number in range(len(rows)):
        where = f"tfds:{place}: row {number + 1}"
        yield where, _from_tfds(rows[number], classes, where)


def _from_tfds(features: Mapping[str, Any], classes: Mapping[str, Sequence[str]], where: str) -> Row | UserError:
    row = as_json(features)
    for name in ("label", "system"):
        if row.get(name) == "":
            row[name] = None
    return with_class_names(row, classes, where)


def _class_names(features: Any) -> dict[str, list[str]]:
    """Feature -> names of its classes, of either library."""
    return {name: list(feature.names) for name, feature in features.items() if hasattr(feature, "int2str")}


def _split_of(place: str) -> tuple[str, str]:
    name, _, split = place.partition("@")
    return name, split or "train"


def _not_loaded(spec: str, error: Exception) -> UserError:
    return UserError(
        f"source {spec!r} cannot be loaded ({reason_of(error)}); check the name, the split and the connection"
    )


_READERS: dict[str, Callable[[str], Iterator[PlacedRow]]] = {"hf": _hub_rows, "tfds": _tfds_rows, "solved": solved_rows}
"""Readers of rows that have a Trace's fields."""
