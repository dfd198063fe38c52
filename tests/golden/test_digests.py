"""The names of finished work stay what they were: a changed digest throws a user's gradients
away.
"""

from __future__ import annotations

import json
from pathlib import Path

from tests.golden.digests import FILE, digests


def test_recipe_digests_are_those_on_users_disks(tmp_path: Path) -> None:
    assert json.loads(json.dumps(digests(tmp_path))) == json.loads(FILE.read_text())
