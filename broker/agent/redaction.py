"""What of a selector may be shown: some attestors put a container's environment and labels there, and secrets with them.

Knows texts only.
"""

import re
from collections.abc import Iterable
from typing import Final

from broker.spiffe import Selector

HIDDEN: Final = "<hidden>"
_SECRET: Final = (
    re.compile("(docker:env:[^=]+=).*", re.DOTALL),
    re.compile("(docker:label:[^:]+:).*", re.DOTALL),
    # Whatever else stands there, name or value.
    re.compile("(docker:(?:env|label):).*", re.DOTALL),
)


class Redaction:
    """Shows selectors without the values that may be secret. ``allowed``: beginnings of selectors that are shown whole."""

    def __init__(self, allowed: Iterable[str] = ()) -> None:
        self._allowed = tuple(one.rstrip(":=") for one in allowed)

    def __call__(self, selector: Selector) -> str:
        """Give the text to be shown."""
        text = str(selector)
        if any(self._is_below(text, beginning) for beginning in self._allowed):
            return text
        found = next(filter(None, (form.fullmatch(text) for form in _SECRET)), None)
        return text if found is None else f"{found[1]}{HIDDEN}"

    @staticmethod
    def _is_below(text: str, beginning: str) -> bool:
        # Whole words: docker:label:app allows nothing of docker:label:apple.
        return (
            bool(beginning)
            and text.startswith(beginning)
            and text[len(beginning) : len(beginning) + 1] in {"", ":", "="}
        )
