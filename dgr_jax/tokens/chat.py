"""Trace -> token ids with exact spans, for any model whose tokenizer has a chat template.

A template renders the prompt and nothing else. R1-Distill's template drops the thinking of an assistant turn,
Qwen3's rewrites it; so the response is written here, tokenised as one string, the way the model would
generate it, and then checked: a training text whose reasoning or answer did not survive is an error.

What the data spells as control tokens is encoded as text: see `dgr_jax.tokens.encoder`.
"""

import dataclasses
import hashlib
import itertools
import json
import unicodedata
from collections.abc import Sequence
from typing import Any, Literal, Self

import numpy as np
from etils import epath

from dgr_jax.data.response import Response, split_response
from dgr_jax.data.trace import THINK_CLOSE, THINK_OPEN, Trace
from dgr_jax.errors import UserError, foreign
from dgr_jax.tokens.encoder import Encoder, unmask
from dgr_jax.tokens.template import PROBE, Template
from dgr_jax.tokens.tokenizer import check_vocabulary, load_tokenizer

_ANCHOR = "\x01"
"""A character that no token joins to its neighbours."""


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
      endings: their texts, as far as they are control tokens.
      vocab_size: number of tokens of the tokenizer (a model's table may be larger).
      opens_thinking: the generation prompt has already begun the thinking.
      control_ids: the tokens that text never encodes to.
      anchor_ids: tokens that can stand before any others without changing their text.

    Raises:
      UserError: no chat template or one that cannot be run, a slow tokenizer, no end-of-turn token, or a generation
        prompt that closes the thinking.
    """

    def __init__(self, tokenizer: Any, *, name: str = "the model", eos_token_ids: Sequence[int] = ()):
        self.tokenizer, self._name = tokenizer, name
        self._encoder = Encoder(tokenizer, name, self._framed)
        # Hybrid models think when they are asked to; the switch has these two names.
        self._template = Template(tokenizer, name, enable_thinking=True, thinking=True)
        self.control_ids = self._encoder.control_ids
        opening = self._opening()
        self.opens_thinking = THINK_OPEN in opening
        self._lead = "" if self.opens_thinking and opening.endswith("\n") else "\n"
        if not self.opens_thinking:
            self._lead = THINK_OPEN + self._lead
        self.end_token_id = self._find_end_token()
        self.eos_token_ids = tuple(dict.fromkeys((self.end_token_id, *eos_token_ids)))
        self.endings = [text for text, id in self._encoder.control.items() if id in self.eos_token_ids]
        self.vocab_size = len(tokenizer)
        with foreign(f"tokenizer of {name}: cannot encode text", "mend tokenizer.json, or fetch it again"):
            self._probe_ids = self._encoder.ids(self._template.frame(False))[0]
            # A tokenizer that marks the beginning of a text (SentencePiece) would mark that of a response.
            self.anchor_ids, alone, anchored = (
                self._encoder.ids(text)[0] for text in (_ANCHOR, PROBE, _ANCHOR + PROBE)
            )
            self._anchor = "" if anchored[len(self.anchor_ids) :] == alone else _ANCHOR
            # A letter that is a token of its own is taken for a byte by the decoder of byte-level tokenizers.
            added = {id: token.content for id, token in tokenizer.added_tokens_decoder.items()}
            self._literal = {id: text for id, text in added.items() if self._decoded([id]) != text}

    @classmethod
    def from_pretrained(cls, model: epath.PathLike) -> Self:
        """Loads the tokenizer of a Hugging Face folder (local or gs://) or hub id.

        Raises:
          UserError: nothing there, or not a tokenizer that can be used.
        """
        tokenizer, eos_token_ids = load_tokenizer(model)
        return cls(tokenizer, name=str(model), eos_token_ids=eos_token_ids)

    def check_fits(self, embeddings: int) -> None:
        """Raises a UserError where a token that can come out has no embedding; warns of one that cannot."""
        used = {
            *self._probe_ids,
            *self.eos_token_ids,
            *(self._encoder.control.get(t, 0) for t in (THINK_OPEN, THINK_CLOSE)),
        }
        check_vocabulary(self.tokenizer, embeddings, self._name, used=used)

    @property
    def fingerprint(self) -> str:
        """sha256 of a prompt's text and tokens: what versions of libraries can change while the files stay."""
        seen = [self._template.frame(False), self._probe_ids, self.end_token_id]
        return hashlib.sha256(json.dumps(seen).encode()).hexdigest()

    def prompt_ids(self, prompt: str, system: str | None = None) -> list[int]:
        """Token ids of system and user turn, then the generation prompt.

        The template alone decides on the beginning-of-sequence token, as in transformers and vLLM: where it
        writes one, there is one, whatever the tokenizer would add.

        Raises:
          UserError: the template lost the text, or the text spells a control token and this tokenizer cannot
            encode it as plain text.
        """
        masked, spellings = self._encoder.mask(prompt, system or "")
        user_text, system_text = masked[0], None if system is None else masked[1]
        rendered = self._template.prompt(user_text, system_text)
        for role, text in (("user", user_text), ("system", system_text or "")):
            if text.strip() not in rendered:
                raise UserError(f"chat template of {self._name}: drops the {role} turn, so the text would be lost")
        ids = self._encoder.encode(rendered, spellings, self._template.frame(system is not None))[0]
        for field, text in (("prompt", prompt), ("system", system or "")):
            self._check_survival(field, text.strip(), ids)
        return ids

    def prompt_text(self, prompt: str, system: str | None = None) -> str:
        """What the template writes for system and user turn, with the generation prompt."""
        return self._template.prompt(prompt, system)

    def prefill_ids(self, text: str, at: Literal["thinking", "answer"], tokens: int = 0) -> tuple[list[int], str]:
        """What follows `prompt_ids` where a response is made to begin with a text.

        Args:
          text: without think tags, which are put where they belong.
          at: "thinking" or "answer"; before an answer stands a thinking that is empty.
          tokens: take so many of the text's tokens; 0 takes all.

        Returns:
          The tokens, and what they say.

        Raises:
          UserError: the text spells a control token and this tokenizer cannot encode it as plain text.
        """
        lead = self._lead if at == "thinking" else f"{self._lead}\n{THINK_CLOSE}\n\n"
        (masked,), spellings = self._encoder.mask(text)
        ids, starts = self._encoder.encode(lead + masked, spellings, lead, anchor=self._anchor)
        begin = int(np.searchsorted(starts, len(lead)))
        ids = ids[: begin + tokens] if tokens else ids
        return ids, self.decode(ids)

    def render(self, trace: Trace) -> Rendered:
        """Tokens and spans of a training text.

        Raises:
          UserError: as `prompt_ids`; or reasoning or answer do not come back from the tokens. Names the
            trace.
        """
        try:
            prompt = self.prompt_ids(trace.prompt, trace.system)
            (reasoning, answer), spellings = self._encoder.mask(trace.reasoning, trace.answer)
            head = f"{self._lead}{reasoning}\n{THINK_CLOSE}"
            response, starts = self._encoder.encode(
                f"{head}\n\n{answer}", spellings, self._lead + THINK_CLOSE, anchor=self._anchor
            )
            # The offsets are those of the text with its spellings put back.
            border = int(np.searchsorted(starts, len(unmask(head, spellings))))
            self._check_survival("reasoning", trace.reasoning, response[:border])
            self._check_survival("answer", trace.answer, response[border:])
            self._check_end(trace.answer)
        except UserError as error:
            raise UserError(f"trace {trace.id!r}: {error}") from error
        begin, border = len(prompt), len(prompt) + border
        token_ids = np.array([*prompt, *response, self.end_token_id], np.int32)
        return Rendered(token_ids, (0, begin), (begin, border), (border, len(token_ids)))

    def parse(self, text: str) -> Response:
        """Splits text generated after `prompt_ids`, its end-of-turn token removed; see `split_response`."""
        return split_response(text, self.opens_thinking)

    def decode(self, ids: Sequence[int] | np.ndarray) -> str:
        """Text of tokens, control tokens included, spaces as they are."""
        texts: list[str] = []
        for literal, group in itertools.groupby(map(int, ids), self._literal.get):
            run = list(group)
            texts += [literal] * len(run) if literal else [self._decoded(run)]
        return "".join(texts)

    def _decoded(self, ids: list[int]) -> str:
        return self.tokenizer.decode(ids, skip_special_tokens=False, clean_up_tokenization_spaces=False)

    def _framed(self, text: str) -> str:
        return self._template.prompt(text, None)

    def _opening(self) -> str:
        """The generation prompt, from its last think tag on; empty where the thinking has not begun.

        A template may speak of think tags in the turns before: only what follows the last control token that begins or
        ends a turn is the model's own.
        """
        after = self._template.frame(False).rpartition(PROBE)[2]
        found = list(self._encoder.spelling.finditer(after))
        turns = [match.end() for match in found if match.group() not in (THINK_OPEN, THINK_CLOSE)]
        opening = after[turns[-1] :] if turns else after
        place = max(opening.rfind(THINK_OPEN), opening.rfind(THINK_CLOSE))
        if place >= 0 and opening[place:].startswith(THINK_CLOSE):
            raise UserError(
                f"chat template of {self._name}: its generation prompt ends the thinking ({opening[-40:]!r}), and a "
                "trace thinks after it; take out what writes </think> there, or its condition"
            )
        return opening[place:] if place >= 0 else ""

    def _find_end_token(self) -> int:
        """The first control token after an assistant turn; a tokenizer's own eos need not be it."""
        if found := self._encoder.spelling.search(self._template.after_answer()):
            return self._encoder.control[found.group()]
        if self.tokenizer.eos_token_id is None:
            raise UserError(
                f"tokenizer of {self._name}: has no end-of-turn token; set eos_token in tokenizer_config.json"
            )
        return self.tokenizer.eos_token_id

    def _check_survival(self, field: str, text: str, ids: Sequence[int]) -> None:
        # Qwen's tokenizers compose characters (NFC); that is the same text.
        back = unicodedata.normalize("NFC", self.decode(ids))
        if unicodedata.normalize("NFC", text) not in back:
            raise UserError(
                f"its {field} does not survive the tokenizer of {self._name}: it comes back as {ascii(back[:60])}; "
                "take another tokenizer, or drop the row"
            )

    def _check_end(self, answer: str) -> None:
        """An end token that somebody left in the text would be learned as letters, before the true one."""
        endings = [text for text in self.endings if answer.rstrip().endswith(text)]
        if endings:
            raise UserError(
                f"its answer ends with {endings[0]!r} as text; take it out: the end of a turn is added here"
            )
