"""Trace -> token ids with exact spans, for any model whose tokenizer has a chat template.

A template renders the prompt and nothing else. R1-Distill's template drops the thinking of an assistant turn,
Qwen3's rewrites it; so the response is written here, tokenised as one string, the way the model would
generate it, and then checked: a training text whose reasoning or answer did not survive is an error.

Control tokens (a tokenizer's added tokens: `<|im_end|>`, `</think>`, ...) come from the template and from
this file, never from data. Text that spells one is encoded as the ordinary characters it is made of.
transformers' `split_special_tokens` would not do: think tags are added tokens but not "special" ones in Qwen3
and R1-Distill. Such text is therefore encoded by a copy of the tokenizer that has no added tokens; where that
copy does not agree with the tokenizer on harmless text, or can still reach a control token, the text is
refused with a `UserError`.
"""

import dataclasses
import functools
import json
import os
import pathlib
import re
import tempfile
import unicodedata
from collections.abc import Iterator, Sequence
from typing import Any, Self

import numpy as np
from etils import epath

from dgr_jax.data.response import Response, split_response
from dgr_jax.data.trace import THINK_CLOSE, THINK_OPEN, Trace
from dgr_jax.errors import UserError, reason_of
from dgr_jax.models.folder import TOKENIZER_SUFFIXES, local_folder

_HARMLESS = "It is 12 o'clock; naïve  question?\n\nYes."
_PROBE = "zebra"


@dataclasses.dataclass(frozen=True)
class Rendered:
    """A trace as tokens.

    Attributes:
      token_ids: int32 [T].
      prompt, reasoning, answer: half-open spans that follow each other and cover all of T. The think tags
        belong to the reasoning (where the model writes the open tag itself), the end-of-turn token to the
        answer.
    """

    token_ids: np.ndarray
    prompt: tuple[int, int]
    reasoning: tuple[int, int]
    answer: tuple[int, int]


class ChatFormat:
    """How one model family writes a conversation.

    Args:
      tokenizer: a fast transformers tokenizer with a chat template.
      name: what error messages call the model.
      eos_token_ids: more tokens that end a turn, as a model's configuration lists them.

    Attributes:
      tokenizer: the argument.
      end_token_id: the token that the template writes after an assistant turn; training texts end with it.
      eos_token_ids: tokens that end a generation; `end_token_id` comes first.
      vocab_size: number of tokens of the tokenizer (a model's table may be larger).
      opens_thinking: the generation prompt already ends with the open think tag.
      control_ids: the tokens that text never encodes to.

    Raises:
      UserError: no chat template, a slow tokenizer, or no end-of-turn token.
    """

    def __init__(self, tokenizer: Any, *, name: str = "the model", eos_token_ids: Sequence[int] = ()):
        if not getattr(tokenizer, "is_fast", False):
            raise UserError(f"tokenizer of {name}: has no fast version, hence no offsets; add a tokenizer.json")
        if not tokenizer.chat_template:
            raise UserError(
                f"tokenizer of {name}: has no chat template; add chat_template.jinja, or take the chat model"
            )
        self.tokenizer, self._name = tokenizer, name
        added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
        # Some vocabularies hold runs of spaces as added tokens; those are text.
        self._control = {text: id for id, text in added.items() if text.strip()}
        spellings = sorted(self._control, key=len, reverse=True)
        self._spelling = re.compile("|".join(map(re.escape, spellings)) or r"(?!)")
        self.control_ids = frozenset(self._control.values())
        opening = self._template(_PROBE, None).rpartition(_PROBE)[2]
        self.opens_thinking = THINK_OPEN in opening and THINK_CLOSE not in opening
        self._lead = "" if self.opens_thinking and opening.endswith("\n") else "\n"
        if not self.opens_thinking:
            self._lead = THINK_OPEN + self._lead
        self.end_token_id = self._find_end_token()
        self.eos_token_ids = tuple(dict.fromkeys((self.end_token_id, *eos_token_ids)))
        self.vocab_size = len(tokenizer)

    @classmethod
    def from_pretrained(cls, model: epath.PathLike) -> Self:
        """Loads the tokenizer of a Hugging Face folder (local or gs://) or hub id.

        Raises:
          UserError: nothing there, or not a tokenizer that can be used.
        """
        tokenizer, eos_token_ids = load_tokenizer(model)
        return cls(tokenizer, name=str(model), eos_token_ids=eos_token_ids)

    def check_fits(self, embeddings: int) -> None:
        """Raises a UserError where the tokenizer knows more tokens than a model has embeddings."""
        check_vocabulary(self.tokenizer, embeddings, self._name)

    def prompt_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """Token ids of system and user turn, then the generation prompt.

        The template alone decides on the beginning-of-sequence token, as in transformers and vLLM: where it
        writes one, there is one, whatever the tokenizer would add.

        Raises:
          UserError: the template lost the text, or the text spells a control token and this tokenizer cannot
            encode it as plain text.
        """
        masked, spellings = self._mask(prompt, system or "")
        user_text, system_text = masked[0], None if system is None else masked[1]
        rendered = self._template(user_text, system_text)
        for role, text in (("user", user_text), ("system", system_text or "")):
            if text.strip() not in rendered:
                raise UserError(f"chat template of {self._name}: drops the {role} turn, so the text would be lost")
        frame = self._template(_PROBE, None if system is None else _PROBE)
        return self._encode(rendered, spellings, frame)[0]

    def render(self, trace: Trace) -> Rendered:
        """Tokens and spans of a training text.

        Raises:
          UserError: as `prompt_ids`; or reasoning or answer do not come back from the tokens. Names the
            trace.
        """
        try:
            prompt = self.prompt_ids(trace.prompt, trace.system)
            (reasoning, answer), spellings = self._mask(trace.reasoning, trace.answer)
            head = f"{self._lead}{reasoning}\n{THINK_CLOSE}"
            response, starts = self._encode(f"{head}\n\n{answer}", spellings, self._lead + THINK_CLOSE)
        except UserError as error:
            raise UserError(f"trace {trace.id!r}: {error}") from error
        begin = len(prompt)
        # The offsets are those of the text with its spellings put back.
        border = begin + int(np.searchsorted(starts, len(_unmask(head, spellings))))
        token_ids = np.array([*prompt, *response, self.end_token_id], np.int32)
        rendered = Rendered(token_ids, (0, begin), (begin, border), (border, len(token_ids)))
        self._check_survival(trace, rendered)
        return rendered

    def parse(self, text: str) -> Response:
        """Splits text generated after `prompt_ids`, its end-of-turn token removed; see `split_response`."""
        return split_response(text, self.opens_thinking)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of tokens, control tokens included, spaces as they are."""
        return self.tokenizer.decode(list(ids), skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _template(self, user: str, system: str | None) -> str:
        messages = [{"role": "system", "content": system}] if system is not None else []
        messages.append({"role": "user", "content": user})
        return self._apply(messages, add_generation_prompt=True)

    def _apply(self, messages: list[dict[str, str]], *, add_generation_prompt: bool) -> str:
        import jinja2

        try:
            return self.tokenizer.apply_chat_template(
                messages, tokenize=False, add_generation_prompt=add_generation_prompt, enable_thinking=True
            )
        except jinja2.TemplateError as error:
            roles = " + ".join(message["role"] for message in messages)
            raise UserError(f"chat template of {self._name}: refuses {roles} ({error}); change the template") from error

    def _find_end_token(self) -> int:
        """The first control token after an assistant turn; a tokenizer's own eos need not be it."""
        turns = [{"role": "user", "content": "x"}, {"role": "assistant", "content": _PROBE}]
        _, written, after = self._apply(turns, add_generation_prompt=False).rpartition(_PROBE)
        if written and (found := self._spelling.search(after)):
            return self._control[found.group()]
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer of {self._name}: has no end-of-turn token; set eos_token in tokenizer_config.json"
            )
        return self.tokenizer.eos_token_id

    def _mask(self, *texts: str) -> tuple[list[str], dict[str, str]]:
        """Replaces what spells a control token by private characters that the texts do not have."""
        for text in texts:
            if lone := re.search("[\ud800-\udfff]", text):
                raise UserError(f"the text has half of a surrogate pair, {ascii(lone[0])}, which is no character")
        spellings: dict[str, str] = {}
        free = (c for c in map(chr, range(0xF0000, 0xFFFFE)) if not any(c in text for text in texts))
        chosen: dict[str, str] = {}

        def replace(found: re.Match[str]) -> str:
            text = found.group()
            if text not in chosen:
                chosen[text] = next(free)
                spellings[chosen[text]] = text
            return chosen[text]

        return [self._spelling.sub(replace, text) for text in texts], spellings

    def _encode(self, text: str, spellings: dict[str, str], frame: str) -> tuple[list[int], list[int]]:
        """Ids of a masked text, and the character of the unmasked text at which each begins.

        `frame` holds the control tokens that are meant, in order. Any other is refused, however it came
        about: a spelling across the border of data and template, or one that the tokenizer normalises into
        being.
        """
        if spellings:
            ids, starts = self._encode_apart(text, spellings)
        else:
            encoded = self.tokenizer(
                text, add_special_tokens=False, split_special_tokens=False, return_offsets_mapping=True, verbose=False
            )
            ids, starts = encoded["input_ids"], [start for start, _ in encoded["offset_mapping"]]
        expected = [self._control[found.group()] for found in self._spelling.finditer(frame)]
        if [id for id in ids if id in self.control_ids] != expected:
            shown = ", ".join(map(repr, spellings.values())) or "a control token"
            raise UserError(
                f"the text spells {shown}, which the tokenizer of {self._name} cannot encode as plain text; "
                "take it out of the text"
            )
        return ids, starts

    def _encode_apart(self, text: str, spellings: dict[str, str]) -> tuple[list[int], list[int]]:
        """Control tokens one by one; the text between them by the tokenizer without control tokens."""
        ids: list[int] = []
        starts: list[int] = []
        offset = 0
        for run, control in _runs(self._spelling, text):
            run = _unmask(run, spellings)
            if run:
                encoding = self._plain.encode(run, add_special_tokens=False)
                ids += encoding.ids
                starts += [offset + start for start, _ in encoding.offsets]
                offset += len(run)
            if control:
                ids.append(self._control[control])
                starts.append(offset)
                offset += len(control)
        return ids, starts

    @functools.cached_property
    def _plain(self) -> Any:
        """The tokenizer without added tokens."""
        import tokenizers

        parts = json.loads(self.tokenizer.backend_tokenizer.to_str())
        parts |= {"added_tokens": [], "post_processor": None, "truncation": None, "padding": None}
        plain = tokenizers.Tokenizer.from_str(json.dumps(parts))
        # A tokenizer that marks the beginning of a text (SentencePiece) would mark it in every run.
        harmless = self._template(_HARMLESS, None)
        ids = []
        for run, control in _runs(self._spelling, harmless):
            ids += plain.encode(run, add_special_tokens=False).ids if run else []
            ids += [self._control[control]] if control else []
        if ids != self.tokenizer(harmless, add_special_tokens=False)["input_ids"]:
            raise UserError(
                f"the text spells a control token, and the tokenizer of {self._name} cannot encode text in "
                "pieces; take it out of the text"
            )
        return plain

    def _check_survival(self, trace: Trace, rendered: Rendered) -> None:
        for field in ("reasoning", "answer"):
            start, stop = getattr(rendered, field)
            # Qwen's tokenizers compose characters (NFC); that is the same text.
            back = unicodedata.normalize("NFC", self.decode(rendered.token_ids[start:stop]))
            if unicodedata.normalize("NFC", getattr(trace, field)) not in back:
                raise UserError(
                    f"trace {trace.id!r}: its {field} does not survive the tokenizer of {self._name}: it "
                    f"comes back as {ascii(back[:60])}; take another tokenizer, or drop the trace"
                )


def load_tokenizer(model: epath.PathLike) -> tuple[Any, list[int]]:
    """The transformers tokenizer of a Hugging Face folder (local or gs://) or hub id. Remote code is never run.

    Returns:
      The tokenizer, and the tokens that end a generation by the model's configuration.

    Raises:
      UserError: nothing there, or not a tokenizer.
    """
    with tempfile.TemporaryDirectory() as scratch:
        folder = _tokenizer_folder(str(model), scratch)
        # At import it would advise PyTorch, which only models of its own need.
        os.environ.setdefault("TRANSFORMERS_NO_ADVISORY_WARNINGS", "1")
        from transformers import AutoTokenizer  # seconds to import: a wrong path fails before

        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
        except (OSError, ValueError, KeyError, TypeError) as error:
            raise UserError(
                f"tokenizer of {model}: cannot be loaded ({reason_of(error)}); the folder needs tokenizer.json and "
                "tokenizer_config.json"
            ) from error
        return tokenizer, _eos_token_ids(epath.Path(folder), tokenizer)


def check_vocabulary(tokenizer: Any, embeddings: int, name: str) -> None:
    """Raises a UserError where a tokenizer knows more tokens than a model has embeddings.

    JAX clamps an index that is out of range: without this, such tokens would be scored as some other token.
    """
    if len(tokenizer) > embeddings:
        raise UserError(
            f"tokenizer of {name}: {len(tokenizer)} tokens, but the model has embeddings for {embeddings}; "
            "use the tokenizer that belongs to the model"
        )


def _runs(spelling: re.Pattern[str], text: str) -> Iterator[tuple[str, str]]:
    """Text up to each control token, with that token; the last comes without one."""
    position = 0
    for found in spelling.finditer(text):
        yield text[position : found.start()], found.group()
        position = found.end()
    yield text[position:], ""


def _unmask(text: str, spellings: dict[str, str]) -> str:
    for character, spelling in spellings.items():
        text = text.replace(character, spelling)
    return text


def _tokenizer_folder(model: str, scratch: str) -> pathlib.Path:
    """The tokenizer's folder on this machine: the model's own, or files fetched from a bucket or the hub."""
    if "://" not in model:
        return local_folder(model, weights=False)
    for file in epath.Path(model).iterdir():
        if file.suffix in TOKENIZER_SUFFIXES:
            file.copy(epath.Path(scratch) / file.name)
    return pathlib.Path(scratch)


def _eos_token_ids(folder: epath.Path, tokenizer: Any) -> list[int]:
    """What the generation config lists, or else the config; and the tokenizer's own."""
    found: list[int] = []
    for name in ("generation_config.json", "config.json"):
        file = folder / name
        try:
            listed = json.loads(file.read_text()).get("eos_token_id") if file.exists() else None
        except ValueError as error:
            raise UserError(f"{file}: not JSON ({error}); mend or remove the file") from error
        if listed is not None:
            found = listed if isinstance(listed, list) else [listed]
            break
    return [*found, *([] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id])]
