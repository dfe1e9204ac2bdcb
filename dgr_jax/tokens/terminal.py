"""A trace's tokens on a terminal, coloured by span and with the loss mask."""

import dataclasses
import itertools

from dgr_jax.data.trace import Trace
from dgr_jax.tokens.chat import ChatFormat
from dgr_jax.tokens.pieces import Piece, pieces, printable

_RESET = "\033[0m"


@dataclasses.dataclass(frozen=True)
class Span:
    """How a span is shown; `in_loss` is the mask that scoring and training apply."""

    name: str
    in_loss: bool
    shades: tuple[str, str]  # neighbouring tokens take turns, so that borders are seen


SPANS = (
    Span("prompt", False, ("\033[38;5;244m", "\033[38;5;250m")),
    Span("reasoning", True, ("\033[30;48;5;117m", "\033[30;48;5;153m")),
    Span("answer", True, ("\033[30;48;5;114m", "\033[30;48;5;157m")),
)


def legend(colour: bool) -> str:
    """Explains colours, or markers."""
    parts = []
    for span in SPANS:
        text = f"{span.name} ({'in the loss' if span.in_loss else 'no loss'})"
        parts.append(f"{span.shades[0]} {text} {_RESET}" if colour else text)
    how = "shades alternate by token" if colour else "tokens stand between ¦; [+] is in the loss, [-] is not"
    return f"legend: {', '.join(parts)}; {how}; ⏎ is a line break inside a token"


def show(trace: Trace, chat: ChatFormat, colour: bool) -> str:
    """One trace as text for people."""
    rendered = chat.render(trace)
    places: list[tuple[int, int]] = [getattr(rendered, span.name) for span in SPANS]
    counts = [stop - start for start, stop in places]
    in_loss = sum(count for count, span in zip(counts, SPANS, strict=True) if span.in_loss)
    sizes = ", ".join(f"{span.name} {count}" for span, count in zip(SPANS, counts, strict=True))
    lines = [
        f"trace {printable(trace.id)}  source {printable(trace.source)}  {trace.label or 'no label'}",
        f"tokens: {sum(counts)} ({sizes}); in the loss: {in_loss}",
    ]
    for span, (start, stop) in zip(SPANS, places, strict=True):
        ids = rendered.token_ids.tolist()
        shown = [_shown(piece) for piece in pieces(ids[start:stop], chat, ids[:start])]
        if colour:
            shaded = zip(shown, itertools.cycle(span.shades))
            lines.append("".join(shade + piece.replace("\n", f"{_RESET}\n{shade}") + _RESET for piece, shade in shaded))
        else:
            mark = "+" if span.in_loss else "-"
            lines.append(f"[{mark}] {span.name}, {stop - start} tokens\n" + "¦".join(["", *shown, ""]))
    return "\n".join(lines)


def _shown(piece: Piece) -> str:
    return printable(piece.text) + (f"({piece.tokens} tokens)" if piece.tokens > 1 else "")
