"""Measured times: threads that a process may use, what makes a time reliable, and what is shown where none is."""

import platform
import subprocess
import sys
import textwrap
from collections import Counter

import pytest
import torch
from torch import nn

from dist_prune.distributed import cpu_count as counted
from dist_prune.training.latency import ROUNDS, WARMUP, measure_latency
from dist_prune.training.timing_noise import FAR, is_reliable, speedup, speedup_text, timing_doubts
from tests.support.launch import ROOT

CPU = torch.device("cpu")


@pytest.fixture
def machine(tmp_path, monkeypatch):
    """A machine of 8 cores with control groups of its own: ``tell(path of the group, {file: text})``."""
    monkeypatch.setattr(counted.os, "sched_getaffinity", lambda _: set(range(8)), raising=False)
    own = tmp_path / "own"
    own.write_text("0::/\n")

    def tell(groups: str, files: dict[str, str]):
        own.write_text(groups)
        for name, text in files.items():
            (tmp_path / "fs" / name).parent.mkdir(parents=True, exist_ok=True)
            (tmp_path / "fs" / name).write_text(text)
        return tmp_path / "fs", own

    return tell


@pytest.mark.parametrize(
    ("groups", "files", "cores"),
    [
        ("0::/\n", {"cpu.max": "max 100000\n"}, 8),
        ("0::/\n", {"cpu.max": "300000 100000\n"}, 3),
        ("0::/\n", {"cpu.max": "150000 100000\n"}, 1),  # a second thread would be stopped half of the time
        ("0::/\n", {"cpu.max": "50000 100000\n"}, 1),
        ("0::/\n", {"cpu.max": "1600000 100000\n"}, 8),  # the affinity is smaller
        # a job's step inside its job: the smallest grant on the way up
        ("0::/job/step\n", {"job/step/cpu.max": "max 100000", "job/cpu.max": "400000 100000"}, 4),
        # a container that sees the host's path, but only its own group
        ("0::/docker/abc\n", {"cpu.max": "200000 100000\n"}, 2),
        ("0::/../other\n", {"cpu.max": "200000 100000\n"}, 2),
        ("4:cpu,cpuacct:/docker/a\n1:name=x:/\n", {
            "cpu,cpuacct/docker/a/cpu.cfs_quota_us": "250000\n", "cpu,cpuacct/docker/a/cpu.cfs_period_us": "100000\n",
        }, 2),
        ("2:cpu:/docker/a\n", {"cpu/cpu.cfs_quota_us": "-1\n", "cpu/cpu.cfs_period_us": "100000\n"}, 8),
        ("2:cpu:/docker/a\n0::/\n", {"cpu/cpu.cfs_quota_us": "500000", "cpu/cpu.cfs_period_us": "100000"}, 5),
        ("3:cpuset:/\n", {"cpuset/cpu.cfs_quota_us": "100000", "cpuset/cpu.cfs_period_us": "100000"}, 8),
        ("", {}, 8),
    ],
)  # fmt: skip
def test_cores_follow_affinity_and_quota(machine, groups, files, cores):
    assert counted.cores(*machine(groups, files)) == cores


@pytest.mark.parametrize(("asked", "threads"), [(None, 3), ("2", 2), ("2,1", 2), ("64", 3), ("0", 3), ("x", 3)])
def test_threads_follow_what_was_asked_for(machine, asked, threads):
    environment = {} if asked is None else {"OMP_NUM_THREADS": asked}
    assert counted.threads(environment, *machine("0::/", {"cpu.max": "300000 100000"})) == threads


def times_of(script: dict[str, list[float]]):
    """A clock that is written down: network's name -> seconds of each round, warm-up included."""
    models = {name: nn.Conv2d(3, 2 + number, 1) for number, name in enumerate(script)}
    names, turns = {id(model): name for name, model in models.items()}, Counter()

    def timer(model, x, device) -> float:
        name = names[id(model)]
        turns[name] += 1
        values = script[name]
        return values[(turns[name] - 1) % len(values)]

    return models, timer, turns


def quiet(seconds: float, repeats: int = 4) -> list[float]:
    return [9.0] * WARMUP + [seconds] * repeats


def test_quiet_times_are_measured_once():
    models, timer, turns = times_of({"dense": quiet(0.4), "pruned": quiet(0.1)})
    found = measure_latency(models, (3, 4, 4), (1,), 4, CPU, 1, timer)
    assert {name: of["1"]["ms"] for name, of in found.items()} == {"dense": 400.0, "pruned": 100.0}
    assert all(of["1"]["reliable"] and of["1"]["rounds"] == 1 and "why" not in of["1"] for of in found.values())
    assert turns["dense"] == WARMUP + 4
    assert speedup_text(found["dense"]["1"], found["pruned"]["1"]) == "4.00x", "a ratio above 1 is faster"
    assert speedup_text(found["pruned"]["1"], found["dense"]["1"]) == "0.25x"


def test_a_disturbed_round_is_measured_again():
    busy = [9.0] * WARMUP + [0.1, 0.2, 0.2, 0.2]
    models, timer, turns = times_of({"dense": quiet(0.4) * 2, "pruned": busy + quiet(0.1)})
    found = measure_latency(models, (3, 4, 4), (1,), 4, CPU, 1, timer)
    assert found["pruned"]["1"]["ms"] == 100.0
    assert found["pruned"]["1"]["rounds"] == 2 and found["pruned"]["1"]["reliable"]
    assert turns["dense"] == turns["pruned"] == 2 * (WARMUP + 4), "all take turns again"


def test_a_machine_that_stays_busy_gives_no_ratio():
    busy = [9.0] * WARMUP + [0.1, 0.2, 0.3, 0.3]
    models, timer, turns = times_of({"dense": quiet(0.4), "pruned": busy})
    found = measure_latency(models, (3, 4, 4), (1,), 4, CPU, 1, timer)
    assert turns["pruned"] == ROUNDS * (WARMUP + 4), "bounded"
    assert found["dense"]["1"]["reliable"] and not found["pruned"]["1"]["reliable"]
    assert "2.50 times as long as the best one" in found["pruned"]["1"]["why"]
    assert speedup_text(found["dense"]["1"], found["pruned"]["1"]) == "not reliable"
    assert speedup(found["dense"]["1"], found["pruned"]["1"]) is None


def test_a_whole_round_under_load_is_found_by_the_next_one():
    """All passes of the first round are alike, and twice too slow: a later best pass tells."""
    models, timer, _ = times_of(
        {"dense": quiet(0.8) + quiet(0.4), "pruned": [9.0] * WARMUP + [0.2, 0.2, 0.4, 0.4] + quiet(0.1)}
    )
    found = measure_latency(models, (3, 4, 4), (1,), 4, CPU, 1, timer)
    assert (found["dense"]["1"]["ms"], found["pruned"]["1"]["ms"]) == (400.0, 100.0)


def test_twins_that_differ_are_not_reliable():
    """Pruned and finetuned are of one architecture; dense is not."""
    models = {"dense": nn.Conv2d(3, 8, 3), "pruned": nn.Conv2d(3, 4, 3), "finetuned": nn.Conv2d(3, 4, 3)}
    models["other order"] = nn.Conv2d(3, 4, 3).to(memory_format=torch.channels_last)  # it may take another time
    seconds = {id(model): taken for model, taken in zip(models.values(), (0.4, 0.1, 0.15, 0.2), strict=True)}
    found = measure_latency(models, (3, 4, 4), (1,), 4, CPU, 1, lambda model, x, device: seconds[id(model)])
    assert {name: of["1"]["reliable"] for name, of in found.items()} == {
        "dense": True, "pruned": False, "finetuned": False, "other order": True,
    }  # fmt: skip
    assert "finetuned and pruned are of one architecture" in found["pruned"]["1"]["why"]
    assert timing_doubts({"a": 1.0, "b": 1.1}, {"a": 1.0, "b": 1.1}, [["a", "b"]]) == {}


def test_a_short_pass_does_not_feel_its_neighbour():
    """A network that comes behind another one finds its weights gone from the caches; behind itself it does not."""
    models = {"dense": nn.Conv2d(3, 8, 3), "pruned": nn.Conv2d(3, 4, 3)}
    seen: list[int] = []

    def timer(model, x, device) -> float:
        cold = not seen or seen[-1] != id(model)
        seen.append(id(model))
        return {id(models["dense"]): 0.002, id(models["pruned"]): 0.001}[id(model)] * (3 if cold else 1)

    found = measure_latency(models, (3, 4, 4), (1,), 4, CPU, 1, timer)
    assert [of["1"]["ms"] for of in found.values()] == [2.0, 1.0]


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="it is glibc's allocator that has to settle")
def test_timed_passes_do_not_wait_for_memory():
    """In a fresh process the activations of a pass are page faults, over and over, of the larger network above all."""
    code = """
        import resource, torch
        from dist_prune.training.latency import measure_latency as latency
        seen = []
        def timer(model, x, device):
            before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
            model(x)
            seen.append(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
            return 1.0
        model = torch.nn.Sequential(*(torch.nn.Conv2d(8, 8, 1) for _ in range(6)))
        latency({"one": model}, (8, 64, 64), (16,), 5, torch.device("cpu"), 1, timer)
        print(sorted(seen[-5:])[2])
    """
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(code)], capture_output=True, text=True, check=True, cwd=ROOT
    )
    pages = 16 * 8 * 64 * 64 * 4 / 4096  # of one activation
    assert int(done.stdout) < pages / 4


def test_the_real_clock():
    found = measure_latency({"one": nn.Conv2d(3, 8, 3)}, (3, 16, 16), (1, 2), 3, CPU, 1)
    assert set(found["one"]) == {"1", "2"}
    for figures in found["one"].values():
        assert 0 < figures["ms_best"] <= figures["ms"]
        assert figures["reliable"] == (figures["ms"] <= FAR * figures["ms_best"])
        assert 1 <= figures["rounds"] <= ROUNDS
        assert figures["rounds"] == ROUNDS or figures["reliable"]


def test_reports_of_older_versions_are_judged_by_what_they_have():
    assert is_reliable({"ms": 1.0})
    assert is_reliable({"ms": 1.2, "ms_best": 1.0})
    assert not is_reliable({"ms": 2.0, "ms_best": 1.0})
