"""What `accuracy.py` measured; as data, as a table for people."""

from dataclasses import dataclass

from rich.markup import escape
from rich.table import Table

REFERENCE = "eager:fp32"


@dataclass(frozen=True, slots=True, kw_only=True)
class Row:
    """A runner's accuracy; shares are 0..1."""

    runner: str
    top1: float
    top1_low: float
    top1_high: float
    top5: float | None
    """None of five labels and fewer, where it says nothing."""
    agreement: float
    """Pictures that are given the same label as by eager float32."""
    difference: float
    """`top1` less that of eager float32."""
    difference_low: float
    difference_high: float
    passed: bool | None
    """The gate's verdicts in the manifest, both towers; None where it gave none."""
    image_ms: float
    """A picture."""
    text_ms: float
    """A text, one label in one template."""


@dataclass(frozen=True, slots=True, kw_only=True)
class Accuracy:
    """All that was measured on a folder."""

    pictures: int
    labels: int
    templates: list[str]
    image_batch: int
    """Pictures in a timed batch."""
    text_batch: int
    skipped: list[str]
    """Pictures that cannot be read, each with its reason."""
    left_out: dict[str, str]
    """Runners that cannot run here, each with its reason."""
    notes: list[str]
    methods: dict[str, str]
    rows: list[Row]
    """Eager float32 first, then by accuracy."""

    def remarks(self) -> list[str]:
        """What people should read beside the table."""
        remarks = [f"note: {note}" for note in self.notes]
        remarks += [f"without {name}: {reason}" for name, reason in self.left_out.items()]
        remarks += [f"skipped {reason}" for reason in self.skipped[:5]]
        if self.skipped:
            remarks.append(f"skipped {len(self.skipped)} pictures that cannot be read")
        return remarks


def table(result: Accuracy, title: str) -> Table:
    """What people read of a measurement."""
    counts = (
        f"{result.pictures} pictures, {result.labels} labels x {len(result.templates)} templates"
    )
    caption = f"in brackets: 95 %; ms an item in batches of {result.image_batch} pictures, "
    shown = Table(
        title=f"{title}: {counts}",
        caption=f"{caption}{result.text_batch} texts",
        caption_justify="left",
    )
    shown.add_column("runner")
    for column in ("top-1", "top-5", "agrees", "to fp32", "gate", "image ms", "text ms"):
        shown.add_column(column, justify="right")
    verdicts = {True: "passed", False: "refused", None: "-"}
    for row in result.rows:
        low, high = row.difference_low, row.difference_high
        away = f"{row.difference:+.2%} [{100 * low:+.2f}, {100 * high:+.2f}]"
        shown.add_row(
            row.runner,
            escape(f"{row.top1:.2%} [{100 * row.top1_low:.1f}, {100 * row.top1_high:.1f}]"),
            "-" if row.top5 is None else f"{row.top5:.2%}",
            f"{row.agreement:.2%}",
            "-" if row.runner == REFERENCE else escape(away),
            verdicts[row.passed],
            f"{row.image_ms:.2f}",
            f"{row.text_ms:.2f}",
        )
    return shown
