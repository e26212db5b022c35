"""What every test shares. ``--hypothesis-profile=deep`` searches for longer where a machine has a deep setting."""

from __future__ import annotations

from hypothesis import settings

# An example that takes longer on a busy machine is no failure: timing belongs in bench/.
settings.register_profile("default", deadline=None)
settings.register_profile("deep", max_examples=1_500, stateful_step_count=80, deadline=None)
