"""What ``dist-prune list methods`` reads from source files is what the classes say."""

from dist_prune import methods
from dist_prune.cli.method_sources import read_methods


def test_source_files_and_classes_agree():
    found = read_methods()
    assert sorted(found) == sorted(methods._METHODS.own_names())
    for name, declared in found.items():
        assert (declared.paper, declared.needs) == (methods.find(name).paper, methods.find(name).needs), name
        assert declared.needs is not None, name


def test_a_method_of_a_folder_and_one_without_needs(tmp_path):
    (tmp_path / "one.py").write_text('class Helper:\n    x = 1\n\n\nclass One(Method):\n    paper = "A, 2020"\n')
    (tmp_path / "two").mkdir()
    (tmp_path / "two" / "method.py").write_text(
        'class Two(base.WeightRanking):\n    paper = ("B, "\n        "2021")\n    '
        'needs = Needs(forward=None, note="x")\n'
    )
    found = read_methods(tmp_path)
    assert {name: declared.paper for name, declared in found.items()} == {"one": "A, 2020", "two": "B, 2021"}
    assert found["one"].needs is None and found["two"].needs is not None and found["two"].needs.cost == "x"
