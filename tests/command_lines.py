"""Commands as documents and examples write them: do they have these flags, and these choices?"""

from __future__ import annotations

import shlex
from itertools import pairwise

from tests.unit.exporter.cli.flags.test_help_page import COMMANDS


def unknown_words(line: str) -> list[str]:
    """Flags of a command line that the command does not have, and values that a flag does not take.

    Args:
        line: ``medusa-export plan --ckpt model``; what follows a pipe, a redirection or a comment is left out.
    """
    name, *words = shlex.split(line, comments=True)
    ends = [index for index, word in enumerate(words) if word in ("|", ">", "&", "&&", ";")]
    words = words[: ends[0]] if ends else words
    sub = (name, *words[:1]) if (name, *words[:1]) in COMMANDS else (name,)
    known = {option for param in COMMANDS[sub].params for option in (*param.opts, *param.secondary_opts)}
    found = [word for word in words if word.startswith("--") and word.split("=")[0] not in known]
    choices = {item.name: item.flag.choices for item, _ in COMMANDS[sub].flags.values() if item.flag.choices}
    return found + [
        f"{flag} {value}" for flag, value in pairwise(words) if flag in choices and value not in choices[flag] and "$" not in value
    ]  # fmt: skip
