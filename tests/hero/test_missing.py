"""Models, runs and places to write that are not there. Oracle: messages written by hand."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

CASES = [
    (["train", "quickstart", "--model.path", "empty"], "the folder holds no config.json"),
    (["eval", "empty", "--recipe", "quickstart"], "the folder holds no config.json"),
    (["rollout", "other", "--recipe", "quickstart"], "is not that of a transformers model"),
    (["eval", "young"], "a run without a best/ model"),
    (["eval", "broken"], "not the folder of a run: cannot read broken/config.json: expected"),
    (["train", "--resume", "broken"], "expected the settings env, eval, mode, model, rollout"),
    (["rollout", "tiny-shop", "--output", "empty"], "expected the name of a file to write"),
    (["merge", "empty", "--output", "new"], "holds no adapter"),
]
CODE = """
import contextlib, io, json, sys
from hero.cli import main
said = []
for arguments in json.loads(sys.argv[1]):
    with contextlib.redirect_stderr(io.StringIO()) as errors:
        assert main(arguments) == 1
    said.append(errors.getvalue())
assert "torch" not in sys.modules
print(json.dumps(said))
"""


def test_what_is_not_there_is_said_before_anything_is_loaded(tmp_path: Path) -> None:
    for name, content in (("other", '{"a": 1}'), ("young", '{"rollout": {}}'), ("broken", "{}")):
        (tmp_path / name).mkdir()
        (tmp_path / name / "config.json").write_text(content)
    (tmp_path / "broken" / "best").mkdir()
    (tmp_path / "broken" / "metrics.jsonl").touch()
    (tmp_path / "empty").mkdir()
    given = json.dumps([arguments for arguments, _ in CASES])
    done = subprocess.run(
        [sys.executable, "-c", CODE, given], cwd=tmp_path, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr
    for (arguments, message), said in zip(CASES, json.loads(done.stdout), strict=True):
        assert message in said, arguments
