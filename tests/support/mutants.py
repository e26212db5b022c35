"""Broken builds of the account machine: the product's source with replacements, run from memory.

The product is never edited. A replacement that no longer applies is an error here, so a mutant cannot quietly stop
being one when the source is reworded.
"""

from __future__ import annotations

import sys
from pathlib import Path
from types import ModuleType

import pytest

import channels.account
import channels.model

SOURCES = {"account": Path(channels.account.__file__).read_text(), "model": Path(channels.model.__file__).read_text()}
Change = tuple[str, str, str]
"""(module, old text, new text); the first place where the old text stands is changed."""


def build(patch: pytest.MonkeyPatch, *changes: Change, with_laws: bool) -> tuple[ModuleType, ModuleType]:
    """The modules ``channels.model`` and ``channels.account`` from their source, with replacements.

    ``with_laws=False`` switches the machine's own ``check`` off: a mutant then has to be noticed by what it does, not by
    the alarm that happens to be next to it.
    """
    sources = dict(SOURCES)
    for where, old, new in changes:
        assert old in sources[where], f"the mutant no longer applies, say it in today's words: {old}"
        sources[where] = sources[where].replace(old, new, 1)
    made = []
    for name in ("model", "account"):
        module = ModuleType(f"channels.{name}")
        patch.setitem(sys.modules, module.__name__, module)
        exec(compile(sources[name], f"<mutant {name}>", "exec"), module.__dict__)
        made.append(module)
    model, account = made
    if not with_laws:
        account.__dict__["check"] = lambda account: None
    return model, account
