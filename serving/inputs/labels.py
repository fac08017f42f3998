"""A set of labels and the templates they are put into: the texts that zero-shot embeds.

Does not know: what embeds them (`zero_shot`, `label_sets`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from serving.errors import TextError
from serving.inputs.tokenizer import excerpt
from serving.limits import (
    MAX_LABEL_SET_BYTES,
    MAX_LABEL_TEXTS,
    MAX_LABELS,
    MAX_TEMPLATES,
    MAX_TEXT_BYTES,
)


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Labels and the templates they are put into; text i is label i // t in template i % t.

    Raises:
        TextError: no labels, an empty one, the same one twice, no templates, one without `{}`, or
            more of them than `serving.limits` allow.
    """

    labels: tuple[str, ...]
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        for text in (*self.labels, *self.templates):
            if not isinstance(text, str):
                raise TextError(f"expected labels and templates to be str, got {text!r}")
        if not self.labels:
            raise TextError("no labels to choose from; give at least one")
        if not self.templates:
            raise TextError("no templates to put labels into; give at least one, such as '{}'")
        refuse_numbers(len(self.labels), len(self.templates))
        self._refuse_sizes()
        seen: set[str] = set()
        for index, label in enumerate(self.labels):
            if not label.strip():
                raise TextError(
                    f"the label is empty or only whitespace: {excerpt(label)}",
                    kind="labels",
                    index=index,
                )
            if label in seen:
                raise TextError(
                    f"label {excerpt(label)} is given more than once; labels must differ"
                )
            seen.add(label)
        for template in self.templates:
            if "{}" not in template:
                raise TextError(f"template {excerpt(template)} has no {{}} for the label to go")

    def _refuse_sizes(self) -> None:
        """Of the texts, before one is made: a template may repeat a label thousands of times."""
        lengths = [_length(label) for label in self.labels]
        longest, total = max(lengths), 0
        for template in self.templates:
            places = template.count("{}")
            rest = _length(template) - places * len("{}")
            if (size := rest + places * longest) > MAX_TEXT_BYTES:
                raise TextError(
                    f"put into the prompt template {excerpt(template)}, the label has {size} "
                    f"bytes, more than the {MAX_TEXT_BYTES} allowed",
                    kind="labels",
                    index=lengths.index(longest),
                    advice="shorten either",
                )
            total += rest * len(lengths) + places * sum(lengths)
        if total > MAX_LABEL_SET_BYTES:
            raise TextError(
                f"labels x templates have {total} bytes, more than the {MAX_LABEL_SET_BYTES} "
                "allowed; give fewer, or shorter ones"
            )

    @classmethod
    def of(cls, labels: Sequence[str], templates: Sequence[str]) -> Self:
        """Of any sequences, but not of one str, which is a sequence too."""
        if isinstance(labels, str) or isinstance(templates, str):
            raise TextError("expected lists of labels and of templates, got one str; pass [str]")
        return cls(tuple(labels), tuple(templates))

    def __len__(self) -> int:
        """Texts."""
        return len(self.labels) * len(self.templates)

    def texts(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Texts `start` to `stop` (default: all)."""
        return self.some(range(start, len(self) if stop is None else min(stop, len(self))))

    def some(self, indices: Iterable[int]) -> list[str]:
        """The texts `indices`."""
        count = len(self.templates)
        return [
            self.templates[index % count].replace("{}", self.labels[index // count])
            for index in indices
        ]

    def by_template(self) -> list[int]:
        """Indices of all texts, template by template: texts that begin alike come together."""
        count = len(self.templates)
        return [index for start in range(count) for index in range(start, len(self), count)]

    def blamed(self, error: TextError, indices: Sequence[int]) -> TextError:
        """Return the error of one of `some(indices)` as one of its label and template."""
        label, template = divmod(indices[error.index or 0], len(self.templates))
        return type(error)(
            f"put into the prompt template {excerpt(self.templates[template])}: {error.reason}",
            kind="labels",
            index=label,
            advice=error.advice,
        )


def refuse_numbers(labels: int, templates: int) -> None:
    """Refuse more labels or templates than `serving.limits` allow, before one is looked at.

    Raises:
        TextError: there are more.
    """
    if labels > MAX_LABELS:
        raise TextError(f"{labels} labels are more than the {MAX_LABELS} allowed; give fewer")
    if templates > MAX_TEMPLATES:
        raise TextError(
            f"{templates} templates are more than the {MAX_TEMPLATES} allowed; give fewer"
        )
    if (texts := labels * templates) > MAX_LABEL_TEXTS:
        raise TextError(
            f"{labels} labels x {templates} templates are {texts} texts, more than the "
            f"{MAX_LABEL_TEXTS} allowed; give fewer of either"
        )


def _length(text: str) -> int:
    """Bytes in UTF-8."""
    return len(text.encode("utf-8", "surrogatepass"))
