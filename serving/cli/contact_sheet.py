"""Contact sheets: a PNG with rows of images and their captions."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont, ImageOps

from serving.cli.console import printable
from serving.inputs.decode import decode, read_image
from serving.util.files import new_file

_CELL, _GAP, _LINE = 160, 12, 18
_INK, _FAINT, _GOOD, _BAD = "#1b1f24", "#667080", "#1a7f37", "#b42318"


@dataclass(frozen=True, slots=True)
class Cell:
    """An image with up to two lines of text below it.

    `good` colors the first line: green for True, red for False.
    """

    picture: Path
    title: str
    subtitle: str = ""
    good: bool | None = None


@dataclass(frozen=True, slots=True)
class Row:
    """A row of images below a heading; "" for none."""

    heading: str
    cells: Sequence[Cell]


def contact_sheet(title: str, rows: Sequence[Row], path: Path) -> None:
    """Draw `rows` and write them atomically to `path`, as PNG."""
    title = printable(title)
    rows = [Row(printable(row.heading), row.cells) for row in rows]
    columns = max(len(row.cells) for row in rows)
    words = max(_length(title, 20), *(_length(row.heading, 16) for row in rows))
    height = _CELL + 2 * _LINE + _GAP
    sheet = Image.new(
        "RGB",
        (
            max(columns * (_CELL + _GAP), words + _GAP) + _GAP,
            3 * _LINE + _GAP + len(rows) * (height + 2 * _LINE + _GAP),
        ),
        "white",
    )
    draw = ImageDraw.Draw(sheet)
    draw.text((_GAP, _GAP), title, _INK, ImageFont.load_default(20))
    top = 3 * _LINE
    for row in rows:
        draw.text((_GAP, top), row.heading, _INK, ImageFont.load_default(16))
        top += 2 * _LINE - 6 if row.heading else 0
        for column, cell in enumerate(row.cells):
            _draw_cell(sheet, draw, cell, (_GAP + column * (_CELL + _GAP), top))
        top += height + _GAP
    with new_file(path) as file:
        sheet.crop((0, 0, sheet.width, top)).save(file, "PNG")


def _draw_cell(
    sheet: Image.Image, draw: ImageDraw.ImageDraw, cell: Cell, at: tuple[int, int]
) -> None:
    thumbnail = ImageOps.fit(decode(read_image(cell.picture)).convert("RGB"), (_CELL, _CELL))
    sheet.paste(thumbnail, at)
    color = {None: _INK, True: _GOOD, False: _BAD}[cell.good]
    left, top = at[0], at[1] + _CELL + 3
    draw.text((left, top), _fit(cell.title, 13), color, ImageFont.load_default(13))
    draw.text((left, top + _LINE), _fit(cell.subtitle, 12), _FAINT, ImageFont.load_default(12))


def _length(text: str, size: int) -> int:
    """Return the length of a line in pixels."""
    return math.ceil(ImageFont.load_default(size).getlength(text))


def _fit(text: str, size: int) -> str:
    """Return `text`, cut with an ellipsis if it is wider than a cell."""
    text, font = printable(text), ImageFont.load_default(size)
    if font.getlength(text) <= _CELL:
        return text
    while text and font.getlength(text + "…") > _CELL:
        text = text[:-1]
    return text.rstrip() + "…"
