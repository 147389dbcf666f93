"""Every recipe that ships loads, traces and can reach its target; its header says what a reader needs."""

from pathlib import Path

import pytest

from dist_prune import methods, reading
from dist_prune.preview import preview

ROOT = Path(__file__).resolve().parents[1]
FILES = sorted((ROOT / "recipes").glob("*.yaml"))


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_is_valid_and_its_network_can_be_cut(file):
    spec = reading.load(str(file), [], methods.options_of, need_environment=False)
    assert spec.name == file.stem
    kind = methods.find(spec.method["name"])
    body = preview(spec, kind(kind.Options()))
    assert any(not group["protected"] for group in body["groups"])


@pytest.mark.parametrize("file", FILES, ids=lambda file: file.stem)
def test_a_recipe_opens_with_what_a_reader_needs(file):
    head = [line for line in file.read_text().splitlines() if line.startswith("#")]
    for word in ("paper", "command", "cost"):
        assert any(line.startswith(f"# {word}") for line in head), f"{file.name} does not say its {word}"


@pytest.mark.parametrize("file", sorted((ROOT / "launch").glob("*.yaml")), ids=lambda file: file.stem)
def test_launch_configs_are_accelerate_s(file):
    from accelerate.commands.config.config_args import load_config_from_file

    assert load_config_from_file(str(file)).num_processes >= 1


def test_the_readme_s_reference_is_generated():
    from dist_prune.reading import reference

    text = (ROOT / "README.md").read_text()
    found = text[text.index("<!-- keys -->") + len("<!-- keys -->") : text.index("<!-- /keys -->")].strip()
    assert found == reference(), "paste what 'dist-prune list keys' prints"
