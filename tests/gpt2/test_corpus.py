import subprocess
import sys

import pytest

from flashlab.errors import UserError
from flashlab.gpt2 import corpus
from flashlab.gpt2.corpus import describe, embedded_documents


def test_it_is_a_few_megabytes_of_documents_that_are_text():
    documents = embedded_documents()
    names = [name for name, _ in documents]
    assert 5e6 < describe(documents)["bytes"] < 20e6
    assert len(set(names)) == len(names) > 300
    assert {"topics/with", "lib/argparse.py", "lib/asyncio/tasks.py"} <= set(names)
    assert not [name for name in names if {"test", "tests", "site-packages"} & set(name.split("/"))]
    assert "import" in dict(documents)["lib/argparse.py"]


def test_another_process_finds_the_same():
    code = "from flashlab.gpt2.corpus import *; print(describe(embedded_documents())['sha256'])"
    command = [sys.executable, "-X", "utf8=0", "-c", code]
    ran = subprocess.run(command, capture_output=True, text=True, check=True, env={"LC_ALL": "C", **path_of_package()})
    assert ran.stdout.strip() == describe(embedded_documents())["sha256"]


def path_of_package():
    return {"PYTHONPATH": ":".join(path for path in sys.path if path)}


def test_the_fingerprint_is_of_names_and_texts():
    documents = [("a", "bc"), ("d", "e")]
    others = [[("ab", "c"), ("d", "e")], [("a", "bc"), ("d", "f")], [("d", "e"), ("a", "bc")], [("a", "bc")]]
    assert describe(documents)["sha256"] not in [describe(other)["sha256"] for other in others]


def test_a_python_without_sources_is_refused(monkeypatch, tmp_path):
    (tmp_path / "argparse.py").write_text("pass")
    monkeypatch.setattr(corpus.sysconfig, "get_paths", lambda: {"stdlib": str(tmp_path)})
    with pytest.raises(UserError, match=r"has 0\.\d MB of the sources .* too little for a corpus; give text as SRC"):
        embedded_documents()
