"""The verb `fewer lm`."""

from __future__ import annotations

import json
import sysconfig
from pathlib import Path

import pytest

from fewer.tasks.language_corpus import is_validation


@pytest.fixture(scope="module")
def texts():
    folder = Path(sysconfig.get_path("stdlib"))
    held_out = next(file.name for file in sorted(folder.glob("*.py")) if is_validation(file.name))
    return [str(folder / name) for name in ("argparse.py", "ast.py", "typing.py", "calendar.py", "inspect.py", held_out)]


def test_the_language_models_verbs_say_where_the_model_is(fewer, tmp_path, texts):
    cache = {"FEWER_CACHE": str(tmp_path / "cache")}
    words = ["--preset", "family-micro", "--text", texts[0]]
    assert "is not trained yet" in fewer("lm", "info", *words, **cache).stdout
    path = fewer("lm", "path", *words, **cache).stdout.strip()
    assert Path(path, "model.safetensors").exists()
    assert json.loads(fewer("lm", "info", *words, "--json", **cache).stdout)["folder"] == path
    assert "removed" in fewer("lm", "clear", **cache).stdout
    assert not Path(path).exists()
    assert "expected family-s or family-micro" in fewer("lm", "path", "--preset", "huge", status=2, **cache).stderr
