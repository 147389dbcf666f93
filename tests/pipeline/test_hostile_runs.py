"""What fails at the start instead of after hours, and what a run leaves to others: folders, variables, reports."""

import json
import shutil

import pytest
import yaml

from dist_prune import methods
from dist_prune.cli import main as cli
from dist_prune.cli.compare import markdown
from dist_prune.cli.comparison import collect
from dist_prune.config import loading
from dist_prune.config.safe_parsing import strict_json
from dist_prune.distributed import shared_folder
from dist_prune.errors import PruneError
from dist_prune.pipeline.ledger import bind_recipe
from dist_prune.pipeline.run_directory import clear_leftovers, run_directory
from dist_prune.run import main
from tests.support.launch import SMALL

QUICK = (*SMALL, "train.epochs=1", "finetune.epochs=1", "reruns=2", "report.latency_batches=[1]", "report.trackers=[]")
SEED = str(2**63 - 1)  # the largest
SECRET = "hunter2-is-no-token"


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("report.threads=1024",), "report.threads: 1024 threads; this machine has"),
        (("report.latency_batches=[60000]", "data.image_size=512"), "of 60,000 images one layer alone needs"),
        (("score.from=/nope",), "score.from: /nope has no finished scores"),
        (("score.compare=[l1,sensitivity]",), "score.compare: sensitivity trains weights while it scores"),
        (("score.compare=[l1,l1]",), "score.compare: each method once"),
        (("score.compare=[l1,l2]", "target.macs=", "select.threshold=0.7"), "score.compare: l1: "),
        (("data.padding=16384", "data.augment=crop"), "data.padding: 16384 pixels around images of side 8; at most 8"),
    ],
)
def test_it_is_said_before_any_work(tmp_path, capfd, words, said):
    code = main(["--recipe", "quickstart", "--run-dir", str(tmp_path / "run"), *SMALL, *words])
    output = "".join(capfd.readouterr())
    assert code == 2 and said in output, output
    assert "Traceback" not in output and "train 1/" not in output


def test_score_many_as_well(tmp_path, capsys):
    words = ["score-many", "quickstart", "--methods", "l1,sensitivity", "--run-dir", str(tmp_path / "run"), *SMALL]
    assert cli.main(words) == 2
    found = capsys.readouterr()
    assert "sensitivity trains weights" in found.err and "train 1/" not in found.out
    assert not (tmp_path / "run" / "dense.safetensors").exists()


@pytest.mark.parametrize("given", ["", "  ", "a" * 300, "b/" * 3000, "a\0b"])
def test_run_directories_that_are_none(given):
    with pytest.raises(PruneError, match="--run-dir: "):
        run_directory(given, "runs/x")


def test_an_empty_run_directory_is_refused(capfd):
    assert main(["--recipe", "quickstart", "--run-dir", ""]) == 2
    assert "--run-dir: it is empty" in capfd.readouterr().err
    assert main(["--recipe", "quickstart", "name=.."]) == 2
    assert "it cannot be dots alone" in capfd.readouterr().err


def test_what_a_kill_left_is_removed_and_links_are_not_followed(tmp_path):
    (tmp_path / "elsewhere").mkdir()
    (tmp_path / "run" / "round_1").mkdir(parents=True)
    gone = [tmp_path / "run" / ".report.json.17.tmp", tmp_path / "run" / "round_1" / ".scores.safetensors.4711.tmp"]
    kept = [tmp_path / "run" / name for name in ("report.json", ".lock", "a.17.tmp", ".x.tmp")]
    kept.append(tmp_path / "elsewhere" / ".report.json.17.tmp")
    for file in (*gone, *kept):
        file.write_text("x")
    (tmp_path / "run" / "there").symlink_to(tmp_path / "elsewhere")
    assert clear_leftovers(tmp_path / "run") == 2
    assert not any(file.exists() for file in gone) and all(file.exists() for file in kept)


def meet(ranks, folders):
    """What each rank says of its own folder."""
    try:
        shared_folder.check_shared_folder(folders[ranks.rank], ranks, patience_s=1)
    except PruneError as error:
        return str(error)
    return ""


def test_ranks_that_do_not_share_the_run_directory_are_named(pool, tmp_path):
    here, there = tmp_path / "here", tmp_path / "there"
    for folder in (here, there):
        folder.mkdir()
    (there / shared_folder.TOKEN).write_text("of another start")
    assert pool.run(3, meet, [here, here, here]) == ["", "", ""]
    assert not list(here.iterdir())
    said = pool.run(3, meet, [here, there, here])
    assert all("is not the same folder" in text and "rank 1 on" in text and "rank 2 on" not in text for text in said)
    assert "rank 2 on" in pool.run(3, meet, [here, here, tmp_path / "nowhere"])[0]


@pytest.fixture(scope="module")
def finished(tmp_path_factory):
    """A run whose recipe names variables; one that a kill left a file in."""
    folder = tmp_path_factory.mktemp("variables")
    source = folder / "tokens.yaml"
    tree = yaml.safe_load(loading.find("quickstart").read_text())
    tree["score"] = {**tree.get("score", {}), "record": "${A_TOKEN}/record.jsonl"}
    tree["seed"] = "${A_SEED}"
    source.write_text(yaml.safe_dump(tree))
    (folder / "run").mkdir()
    (folder / "run" / ".ledger.jsonl.1.tmp").write_text("x")
    with pytest.MonkeyPatch.context() as patch:
        patch.setenv("A_TOKEN", str(folder / SECRET))
        patch.setenv("A_SEED", SEED)
        assert main(["--recipe", str(source), "--run-dir", str(folder / "run"), *QUICK]) == 0
    return folder / "run"


def test_what_the_environment_filled_in_stands_nowhere(finished):
    body = json.loads((finished / "report.json").read_text())
    assert body["recipe"]["score"]["record"] == "${A_TOKEN}/record.jsonl" and body["recipe"]["seed"] == "${A_SEED}"
    assert body["seed"] == int(SEED)
    assert body["expanded"] == {"score.record": ["A_TOKEN"], "seed": ["A_SEED"]}
    page = (finished / "report.html").read_text()
    assert "Filled in from the environment: score.record (A_TOKEN); seed (A_SEED)." in page
    assert "${A_TOKEN}/record.jsonl" in (finished / "recipe.yaml").read_text()
    for file in finished.rglob("*"):
        assert not file.is_file() or SECRET.encode() not in file.read_bytes(), file
    assert not list(finished.rglob(".*.tmp"))


def test_another_value_of_a_variable_is_another_run(finished, tmp_path, monkeypatch, capfd):
    """The fingerprints are of the values, whatever is written down; a digest of them binds the run directory."""
    monkeypatch.setenv("A_TOKEN", str(tmp_path))
    before = json.loads((finished / "ledger.jsonl").read_text().splitlines()[0])["fingerprint"]
    copied = shutil.copytree(finished, tmp_path / "run")
    command = ["--recipe", str(finished.parent / "tokens.yaml"), "--run-dir", str(copied), *QUICK]
    monkeypatch.setenv("A_SEED", SEED)
    assert main(command) == 0  # another place for the record is the same run
    assert main([*command, f"seed={SEED}"]) == 0  # so is the value itself
    assert main(command) == 0
    lines = [json.loads(line) for line in (copied / "ledger.jsonl").read_text().splitlines()]
    assert {line["fingerprint"] for line in lines if line["stage"] == "train"} == {before}
    monkeypatch.setenv("A_SEED", "4")
    assert main(command) == 2
    assert "seed: '${A_SEED}' has another value here" in capfd.readouterr().err


def test_a_recipe_with_variables_is_bound_by_its_text(tmp_path, monkeypatch):
    monkeypatch.setenv("A_PLACE", "/secret/place")
    (tmp_path / "x.yaml").write_text(
        "backbone: {name: resnet8p_cifar}\ndata: {source: npz, root: '${A_PLACE}/${UNSET_ONE}', classes: [1, 2]}\n"
        "method: {name: l1}\nselect: {include: ['${A_PLACE}', b]}\n"
    )
    spec = loading.load(str(tmp_path / "x.yaml"), [], methods.options_of, need_environment=False)
    assert spec.data.root == "/secret/place/${UNSET_ONE}" and spec.select.include == ("/secret/place", "b")
    written = spec.written()
    assert written["data"]["root"] == "${A_PLACE}/${UNSET_ONE}" and written["select"]["include"] == ["${A_PLACE}", "b"]
    assert spec.resolved()["select"]["include"] == ["/secret/place", "b"]
    assert spec.expanded == {"data.root": ["A_PLACE", "UNSET_ONE"], "select.include.0": ["A_PLACE"]}
    bind_recipe(tmp_path / "run", written)
    assert "secret" not in (tmp_path / "run" / "recipe.yaml").read_text()


def test_reports_are_strict_json(finished):
    def fail(text):
        raise AssertionError(text)

    json.loads((finished / "report.json").read_text(), parse_constant=fail)
    assert json.loads(strict_json({"a": [float("nan"), float("-inf"), 1.5, (2,)]})) == {"a": [None, None, 1.5, [2]]}


@pytest.mark.parametrize(
    "text",
    ["[]", "{", "5", "null", "{}", "[" * 10**5, '{"dense": 5}', '{"dense": {"latency": {"x": {}}}}', "\ud800", "NaN"],
    ids=lambda text: text[:20],
)
def test_one_broken_report_does_not_end_the_comparison(finished, tmp_path, text, capsys):
    shutil.copytree(finished, tmp_path / "good")
    shutil.copytree(finished, tmp_path / "broken")
    (tmp_path / "broken" / "report.json").write_text(text, errors="surrogatepass")
    found = collect([tmp_path])
    assert len(found.rows) == 1
    assert [item["run"] for item in found.unfinished] == ["broken"]
    assert "report.json is unreadable" in found.unfinished[0]["why"]
    assert cli.main(["report", str(tmp_path / "broken")]) == 2
    assert "is damaged" in capsys.readouterr().err


def test_fields_of_other_types_make_a_report_unreadable(finished, tmp_path):
    body = json.loads((finished / "report.json").read_text())
    shutil.copytree(finished, tmp_path / "good")
    for number, (key, value) in enumerate(
        [("name", 5), ("recipe", []), ("dense", None), ("finetuned", {}), ("dense", {**body["dense"], "top1": "high"}),
         ("target", ["macs"]), ("finetuned", {**body["finetuned"], "images": "all"})]
    ):  # fmt: skip
        shutil.copytree(finished, tmp_path / f"odd_{number}")
        (tmp_path / f"odd_{number}" / "report.json").write_text(json.dumps({**body, key: value}))
    found = collect([tmp_path])
    assert len(found.rows) == 1 and len(found.unfinished) == 7


def test_a_comparison_brings_no_html(finished, tmp_path):
    shutil.copytree(finished, tmp_path / "good")
    body = json.loads((finished / "report.json").read_text())
    body["recipe"]["backbone"]["name"] = "<script>alert(1)</script>"
    (tmp_path / "good" / "report.json").write_text(json.dumps(body))
    text = markdown(collect([tmp_path]))
    assert "<script>" not in text and "&lt;script&gt;" in text


@pytest.mark.parametrize("option", ["--time=1\n#SBATCH --wrap=ls", "--time=1\r", "\n", " ", "--x\0"])
def test_an_option_of_sbatch_is_one_line(capsys, option):
    assert cli.main(["launch", "--slurm", "quickstart", f"--sbatch={option}"]) == 2
    assert "--sbatch: " in capsys.readouterr().err


def test_numbers_of_the_command_line(finished, capsys, monkeypatch):
    monkeypatch.setenv("A_TOKEN", SECRET)
    monkeypatch.setenv("A_SEED", SEED)
    for words, said in (
        (["--threads", "100000"], "this machine has"), (["--batches", "-3"], "-3 is no batch size"),
        (["--batches", "10000000"], "is no batch size"), (["--repeats", "0"], "--repeats: 0 is out of range"),
    ):  # fmt: skip
        assert cli.main(["latency", str(finished), *words]) == 2
        assert said in capsys.readouterr().err
    assert cli.main(["export", str(finished), "--format", "pt2", "--count", "0"]) == 2
    assert "--count: 0 is out of range" in capsys.readouterr().err
