"""Episodes on a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

from rich.cells import cell_len, set_cell_size

from rlhf_env.records.safe_text import safe_text

_RESET, _DIM, _BOLD = "\x1b[0m", "\x1b[2m", "\x1b[1m"
_GREENS, _REDS = (22, 28, 34, 40), (52, 88, 124, 160)  # backgrounds of the 256-colour palette, dark to bright
_LABEL_CELLS = 14


def render_ansi(
    prompt: str,
    pieces: Sequence[str],
    *,
    kl: Sequence[float] | None = None,
    reward: Sequence[float] | None = None,
    footer: Mapping[str, float | str] | None = None,
    width: int = 100,
) -> str:
    """One episode in ANSI colours: the prompt dim, each response token on green (reward > 0) or red (reward < 0).

    `pieces` [T] are the tokens' texts (`Codec.pieces`). Below stands a table of the per-token `kl` (nats) and `reward`
    that were given, [T], in lines of `width` columns, and then `footer` as one line. Control characters in the texts
    are made visible, so model output cannot steer the terminal.
    """
    colours = [""] * len(pieces) if reward is None else _backgrounds(reward)
    response = "".join(_paint(piece, colour, "⏎") for piece, colour in zip(pieces, colours, strict=True))
    blocks = [_paint(prompt, _DIM) + response]
    rows = {name: [f"{x:+.2f}" for x in row] for name, row in (("kl", kl), ("reward", reward)) if row is not None}
    if rows and pieces:
        blocks += ["", *_table({"token": [_label(piece) for piece in pieces], **rows}, colours, width), ""]
    if footer:
        facts = (f"{safe_text(name)} {_BOLD}{_value(value)}{_RESET}" for name, value in footer.items())
        blocks.append(f"{_DIM} · {_RESET}".join(facts))
    return "\n".join(blocks)


def _backgrounds(reward: Sequence[float]) -> list[str]:
    largest = max((abs(r) for r in reward), default=0.0)
    codes = []
    for r in reward:
        share = abs(r) / largest if largest else 0.0
        if share < 0.02:  # a trace beside the largest: left plain
            codes.append("")
            continue
        level = min(int(share * 4), 3)
        foreground = 16 if level > 2 else 231
        codes.append(f"\x1b[38;5;{foreground};48;5;{(_GREENS if r > 0 else _REDS)[level]}m")
    return codes


def _paint(text: str, code: str, line_end: str = "") -> str:
    # Colour stops at each line's end, or the terminal would fill the rest of the line with it.
    lines = text.split("\n")
    shown = [safe_text(line) + (line_end if i < len(lines) - 1 else "") for i, line in enumerate(lines)]
    return "\n".join(f"{code}{line}{_RESET}" if code and line else line for line in shown)


def _label(piece: str) -> str:
    label = safe_text(piece).replace(" ", "·") or "…"
    return label if cell_len(label) <= _LABEL_CELLS else set_cell_size(label, _LABEL_CELLS - 1) + "…"


def _table(rows: dict[str, list[str]], colours: list[str], width: int) -> list[str]:
    """Columns of equal cells under one another, broken into blocks that fit `width`."""
    margin = max(map(len, rows)) + 2
    sizes = [max(map(cell_len, column)) + 2 for column in zip(*rows.values(), strict=True)]
    lines, start = [], 0
    while start < len(sizes):
        end, used = start + 1, margin + sizes[start]
        while end < len(sizes) and used + sizes[end] <= width:
            end, used = end + 1, used + sizes[end]
        for name, cells in rows.items():
            line = f"{_DIM}{name.ljust(margin)}{_RESET}"
            for i in range(start, end):
                colour = colours[i] if name == "token" else ""
                line += f"{colour}{cells[i]}{_RESET if colour else ''}" + " " * (sizes[i] - cell_len(cells[i]))
            lines.append(line.rstrip())
        start = end
    return lines


def _value(value: float | str) -> str:
    return safe_text(value) if isinstance(value, str) else f"{value:.4g}"
