"""Errors of the base module that no other file's tests reach."""

import subprocess
import sys

import pytest

ASK = "from dist_prune.models.transformers_networks import _transformers; _transformers()"


@pytest.mark.parametrize(
    ("text", "said"),
    [
        ("from os import name_of_a_newer_release", "installed but cannot be imported: cannot import name 'name_of_a"),
        ("import package_that_is_not_there", "package_that_is_not_there is not installed: pip install"),
    ],
)
def test_a_package_that_does_not_go_with_the_others_is_not_called_missing(tmp_path, text, said):
    (tmp_path / "transformers").mkdir()
    (tmp_path / "transformers/__init__.py").write_text(text + "\n")
    code = f"import sys; sys.path.insert(0, {str(tmp_path)!r}); {ASK}"
    found = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert found.returncode == 1
    assert "backbone.name: 'transformers:' needs transformers" in found.stderr
    assert said in found.stderr
    assert "dist-prune[transformers]" in found.stderr
