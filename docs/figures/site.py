"""Draws site.svg: one LoRA site, a layer with m low-rank pairs that a condition mixes.

python docs/figures/site.py docs/figures/site.svg
"""

import sys
from pathlib import Path

INK, FAINT, BASE, LORA, COND = "#1a1a2e", "#8a8fa3", "#dfe3ee", "#ffd9a8", "#cfe8d5"
WIDTH, HEIGHT = 760, 430


def box(x: float, y: float, w: float, h: float, fill: str, *lines: str, size: int = 15) -> str:
    """A box with lines of text in its middle."""
    top = y + h / 2 - (len(lines) - 1) * 10 + 5
    text = "".join(
        f'<text x="{x + w / 2}" y="{top + 20 * i}" font-size="{size if i == 0 else 12}" '
        f'text-anchor="middle">{line}</text>'
        for i, line in enumerate(lines)
    )
    return f'<rect x="{x}" y="{y}" width="{w}" height="{h}" rx="5" fill="{fill}" stroke="{INK}"/>{text}'


def arrow(*points: tuple[float, float], dashed: bool = False) -> str:
    """A line through points that ends in a tip."""
    path = " ".join(f"{x},{y}" for x, y in points)
    dash = ' stroke-dasharray="5 4"' if dashed else ""
    return (
        f'<polyline points="{path}" fill="none" stroke="{INK}" stroke-width="1.4"{dash} '
        'marker-end="url(#tip)"/>'
    )


def label(x: float, y: float, text: str, anchor: str = "middle", size: int = 13) -> str:
    """Text beside something."""
    return (
        f'<text x="{x}" y="{y}" font-size="{size}" text-anchor="{anchor}" fill="#444">{text}</text>'
    )


def sub(letter: str, index: str) -> str:
    """A letter in italics with an index."""
    return (
        f'<tspan font-style="italic">{letter}</tspan>'
        f'<tspan font-size="10" dy="4">{index}</tspan><tspan dy="-4">&#8203;</tspan>'
    )


def drawing() -> str:
    """The whole picture."""
    x, y = '<tspan font-style="italic">x</tspan>', '<tspan font-style="italic">y</tspan>'
    parts = [
        label(60, 90, x, size=17),
        box(
            270,
            60,
            190,
            52,
            BASE,
            '<tspan font-style="italic">W</tspan> (qkv or proj)',
            "the base, as it was",
        ),
        arrow((75, 86), (268, 86)),
        arrow((460, 86), (628, 86)),
        f'<circle cx="642" cy="86" r="13" fill="white" stroke="{INK}"/>',
        label(642, 92, "+", size=19),
        arrow((655, 86), (700, 86)),
        label(715, 90, y, size=17),
    ]
    rows = [("1", 150), ("2", 205), ("m", 285)]
    for index, top in rows:
        middle = top + 20
        parts += [
            arrow((140, 86), (140, middle), (178, middle)),
            box(180, top, 92, 40, LORA, sub("A", index)),
            arrow((272, middle), (338, middle)),
            f'<circle cx="354" cy="{middle}" r="14" fill="white" stroke="{INK}"/>',
            label(354, middle + 6, "&#215;", size=18),
            arrow((368, middle), (438, middle)),
            box(440, top, 92, 40, LORA, sub("B", index)),
            arrow((532, middle), (642, middle), (642, 101)),
        ]
        parts.append(label(398, middle - 10, sub("&#969;", index), size=15))
    parts += [
        f'<circle cx="140" cy="86" r="3" fill="{INK}"/>',
        label(226, 268, "&#8942;", size=20),
        label(486, 268, "&#8942;", size=20),
        label(226, 141, "down: d_in &#8594; r"),
        label(486, 141, "up: r &#8594; d_out, starts at 0"),
        box(250, 362, 208, 48, COND, "composition weights", "an MLP, a table, or the class"),
        arrow((60, 386), (248, 386), dashed=True),
        arrow((354, 362), (354, 321), dashed=True),
        arrow((354, 291), (354, 241), dashed=True),
        arrow((354, 211), (354, 186), dashed=True),
        label(64, 355, "condition:", "start"),
        label(64, 374, "&#963; or t, class", "start"),
    ]
    return "\n".join(parts)


def main(path: str) -> None:
    """Writes the file."""
    font = "Helvetica, Arial, 'DejaVu Sans', sans-serif"
    Path(path).write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {HEIGHT}" width="{WIDTH}" '
        f'height="{HEIGHT}" font-family="{font}" fill="{INK}" role="img" '
        'aria-label="A layer W and beside it m low-rank pairs, mixed by composition weights">\n'
        '<defs><marker id="tip" markerWidth="9" markerHeight="9" refX="8" refY="4" orient="auto">'
        f'<path d="M0,0 L9,4 L0,8 z" fill="{INK}"/></marker></defs>\n'
        f'<rect width="{WIDTH}" height="{HEIGHT}" rx="8" fill="white"/>\n{drawing()}\n</svg>\n'
    )


if __name__ == "__main__":
    main(sys.argv[1])
