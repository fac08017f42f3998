"""Label sets: the labels and prompt templates of zero-shot classification.

This module does not know how the texts are embedded (`serving.tasks.zero_shot`,
`serving.triton_models.label_cache`).
"""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Self

from serving.errors import TextError, TextTooLongError, excerpt
from serving.inputs.texts import each_text
from serving.limits import (
    MAX_LABEL_SET_BYTES,
    MAX_LABEL_TEXTS,
    MAX_LABELS,
    MAX_TEMPLATES,
    MAX_TEXT_BYTES,
)


@dataclass(frozen=True, slots=True)
class LabelSet:
    """Labels and prompt templates. With t templates, text i is label i // t in template i % t.

    Raises:
        TextError: there are no labels or no templates, a label is empty or occurs twice, a template
            has no `{}`, or a limit of `serving.limits` is exceeded.
    """

    labels: tuple[str, ...]
    templates: tuple[str, ...]

    def __post_init__(self) -> None:
        for text in (*self.labels, *self.templates):
            if not isinstance(text, str):
                raise TextError(
                    f"expected labels and templates to be str, got {type(text).__name__}"
                )
        if not self.labels:
            raise TextError("no labels to choose from", advice="give at least one")
        if not self.templates:
            raise TextError("no prompt templates", advice="give at least one, such as '{}'")
        refuse_numbers(len(self.labels), len(self.templates))
        self._check_sizes()
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
                    f"label {excerpt(label)} is given more than once",
                    advice="give each label once",
                )
            seen.add(label)
        for template in self.templates:
            if "{}" not in template:
                raise TextError(
                    f"template {excerpt(template)} has no {{}}",
                    advice="put {} where the label belongs",
                )

    def _check_sizes(self) -> None:
        """Check the sizes of all texts without building them.

        A template may contain `{}` thousands of times.
        """
        lengths = [_length(label) for label in self.labels]
        longest, total = max(lengths), 0
        for template in self.templates:
            places = template.count("{}")
            rest = _length(template) - places * len("{}")
            if (size := rest + places * longest) > MAX_TEXT_BYTES:
                raise TextError(
                    f"in prompt template {excerpt(template)}, the label has {size} bytes, more "
                    f"than the {MAX_TEXT_BYTES} allowed",
                    kind="labels",
                    index=lengths.index(longest),
                    advice="shorten the label or the template",
                )
            total += rest * len(lengths) + places * sum(lengths)
        if total > MAX_LABEL_SET_BYTES:
            raise TextError(
                f"labels x templates have {total} bytes, more than the {MAX_LABEL_SET_BYTES} "
                "allowed",
                advice="give fewer or shorter ones",
            )

    @classmethod
    def of(cls, labels: Iterable[str], templates: Iterable[str]) -> Self:
        """Return the label set of two iterables of strings.

        Raises:
            TextError: one of them is a single str or has no order, or see `LabelSet`.
        """
        if isinstance(labels, str) or isinstance(templates, str):
            raise TextError(
                "expected lists of labels and of templates, got one str",
                advice="pass a list, such as ['cat']",
            )
        return cls(tuple(each_text(labels, "labels")), tuple(each_text(templates, "templates")))

    def __len__(self) -> int:
        """Return the number of texts: labels x templates."""
        return len(self.labels) * len(self.templates)

    def texts(self, start: int = 0, stop: int | None = None) -> list[str]:
        """Return texts `start` to `stop` (default: all)."""
        return self.some(range(start, len(self) if stop is None else min(stop, len(self))))

    def some(self, indices: Iterable[int]) -> list[str]:
        """Return the texts with the given indices."""
        count = len(self.templates)
        return [
            self.templates[index % count].replace("{}", self.labels[index // count])
            for index in indices
        ]

    def by_template(self) -> list[int]:
        """Return the indices of all texts, template by template: shared prefixes are adjacent."""
        count = len(self.templates)
        return [index for start in range(count) for index in range(start, len(self), count)]

    def blamed(self, error: TextError, indices: Sequence[int]) -> TextError:
        """Return the error of a text in `some(indices)` as an error of its label and template."""
        label, template = divmod(indices[error.index or 0], len(self.templates))
        # Texts may be truncated on request, prompts of labels may not.
        too_long = isinstance(error, TextTooLongError)
        advice = "shorten the label or the template" if too_long else error.advice
        return type(error)(
            f"in prompt template {excerpt(self.templates[template])}: {error.reason}",
            kind="labels",
            index=label,
            advice=advice,
        )


def refuse_numbers(labels: int, templates: int) -> None:
    """Check the numbers of labels and templates against `serving.limits`.

    Raises:
        TextError: there are too many.
    """
    if labels > MAX_LABELS:
        raise TextError(
            f"{labels} labels are more than the {MAX_LABELS} allowed", advice="give fewer"
        )
    if templates > MAX_TEMPLATES:
        raise TextError(
            f"{templates} templates are more than the {MAX_TEMPLATES} allowed", advice="give fewer"
        )
    if (texts := labels * templates) > MAX_LABEL_TEXTS:
        raise TextError(
            f"{labels} labels x {templates} templates are {texts} texts, more than the "
            f"{MAX_LABEL_TEXTS} allowed",
            advice="give fewer labels or templates",
        )


def _length(text: str) -> int:
    """Return the size of `text` in bytes of UTF-8."""
    return len(text.encode("utf-8", "surrogatepass"))
