"""What a stage is given of a node, how long it may take, and which one goes first."""

import math
from pathlib import Path

import pytest

from dynat.config.params import Params, load
from dynat.errors import UserError
from dynat.fleet.needs import Command, Durations, Needs, needs, processes
from dynat.fleet.schedule import Node, Slots, fitting, longest_paths, shared


@pytest.fixture(scope="module")
def params() -> Params:
    return load(Path(__file__).parents[2] / "params.yaml")


def edited(params: Params, section: str, **values: object) -> Params:
    """``params`` with other values in a section of study.digits."""
    digits = params.study["digits"]
    changed = digits.model_copy(update={section: getattr(digits, section).model_copy(update=values)})
    return params.model_copy(update={"study": {**params.study, "digits": changed}})


def need(params: Params, command: str, gpus_here: bool = True, **meta: float) -> tuple[float, float]:
    found = needs(Command.parse(command), params, meta, gpus_here)
    return found.gpus, found.cpus


def test_a_stage_has_the_device_and_the_threads_of_its_study(params: Params) -> None:
    own = edited(params, "autoattack", workers=3)
    assert need(own, "python -m stages.train digits dynat 0") == (0, 1)
    assert need(own, "python -m stages.autoattack digits dynat 0") == (0, 3)
    assert need(own, "python -m stages.train cifar10_wrn34_10 dynat 0") == (1, 1)
    assert need(own, "python -m stages.train cifar10_tiny dynat 0") == (1, 1)
    assert need(own, "python -m stages.train cifar10_tiny dynat 0", gpus_here=False) == (0, 1)
    assert need(own, "python -m stages.prepare cifar10_wrn34_10") == (0, 1)
    assert need(own, "python -m stages.check") == (0, 1)
    cuda = own.model_copy(update={"settings": ["cifar10_wrn34_10"]})
    assert need(cuda, "python -m stages.check") == (1, 1)
    assert need(own, "something else") == (0, 1)
    assert need(own, "python -m stages.train digits dynat 0", gpus=0.5, cpus=2) == (0.5, 2)


def test_a_study_without_a_number_of_threads_has_a_node_for_itself(params: Params) -> None:
    wanted = need(edited(params, "machine", threads=None), "python -m stages.train digits dynat 0")
    assert wanted == (0, math.inf)
    nodes = [Node("1", "small", 2, 0), Node("2", "large", 16, 0)]
    assert fitting(Needs(*wanted), nodes) == Needs(0, 16)


@pytest.mark.parametrize(
    ("workers", "share", "expected"),
    [(4, 1.0, 4), (4, 0.5, 4), (4, 0.4, 3), (4, 0.05, 1), (1, 0.05, 1), (16, 1.0, 8)],
)
def test_where_stages_wait_each_has_the_workers_that_fit_into_its_share_of_the_cores(
    workers: int, share: float, expected: int
) -> None:
    nodes = [Node("1", "a", 4, 0), Node("2", "b", 4, 0)]
    assert shared(Needs(0, workers, workers), nodes, share) == Needs(0, expected, expected)
    assert shared(Needs(0, 2 * workers, workers), nodes * 2, share).workers == expected  # two threads each
    for own in (Needs(0, math.inf, workers), Needs(0, 4, 0)):  # has a node for itself; says what it needs
        assert shared(own, nodes, share) == own


def test_on_a_smaller_node_a_stage_has_fewer_workers(params: Params) -> None:
    nodes = [Node("1", "a", 4, 0), Node("2", "b", 4, 0)]
    assert fitting(Needs(0, 8, 8), nodes) == Needs(0, 4, 4)
    assert fitting(Needs(0, 16, 8), nodes) == Needs(0, 4, 2)
    command = Command.parse("python -m stages.autoattack digits dynat 0")
    own = edited(params, "autoattack", workers=3)
    assert needs(command, own, {}, False) == Needs(0, 3, 3)
    assert needs(command, own, {"cpus": 2}, False) == Needs(0, 2)


@pytest.mark.parametrize(
    ("launch", "expected"),
    [
        ("python", 1),
        ("torchrun --standalone --nproc-per-node=4", 4),
        ("torchrun --nproc_per_node 2", 2),
        ("torchrun --nnodes=1 --nproc-per-node=2", 2),
    ],
)
def test_a_launcher_has_a_gpu_per_process(launch: str, expected: int, params: Params) -> None:
    assert processes(launch) == expected
    launched = params.model_copy(update={"launch": launch})
    assert need(launched, f"{launch} -m stages.train cifar10_tiny dynat 0")[0] == expected


@pytest.mark.parametrize(
    ("launch", "word"),
    [
        ("torchrun --standalone --nproc-per-node=gpu", "nproc-per-node=gpu"),
        ("torchrun --nproc-per-node auto", "nproc-per-node=auto"),
        ("torchrun --nnodes=2 --nproc-per-node=8", "--nnodes"),
        ("torchrun --nnodes 1:4", "--nnodes"),
    ],
)
def test_a_launcher_that_cannot_be_placed_is_refused(launch: str, word: str) -> None:
    with pytest.raises(UserError, match=f"launch: {word}"):
        processes(launch)


def test_more_gpus_than_any_node_has_are_refused() -> None:
    with pytest.raises(UserError, match="4 GPUs are needed at once"):
        fitting(Needs(4, 1), [Node("1", "a", 8, 2), Node("2", "b", 8, 2)])


def test_the_longest_way_to_the_end_goes_first() -> None:
    upstream = {"a": set[str](), "b": set[str](), "c": {"a"}, "d": {"b", "c"}}
    seconds = {"a": 1.0, "b": 5.0, "c": 7.0, "d": 2.0}
    assert longest_paths(upstream, seconds, upstream.keys()) == {"a": 10, "b": 7, "c": 9, "d": 2}
    assert longest_paths(upstream, seconds, {"c", "d"}) == {"a": 9, "b": 2, "c": 9, "d": 2}


def test_stages_share_no_gpu_and_keep_off_gpu_nodes_that_they_do_not_need() -> None:
    slots = Slots({"g": Node("g", "gpu", 8, 2, "H100"), "c": Node("c", "cpu", 2, 0)})
    placed = [slots.place(f"gpu{i}", Needs(1, 1)) for i in range(3)]
    assert [node and node.id for node in placed] == ["g", "g", None]
    placed = [slots.place(f"cpu{i}", Needs(0, 1)) for i in range(3)]
    assert [node and node.id for node in placed] == ["c", "c", "g"]
    slots.give_back("gpu0")
    assert slots.place("other", Needs(1, 1), "A100") is None
    assert slots.place("other", Needs(1, 1), "H100") is not None


def test_a_stage_is_expected_to_take_what_its_last_run_or_one_like_it_took(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    commands = [Command("train", ("s", method, "0")) for method in ("a", "b")]
    assert Durations(commands).expected(commands[0]) == 600
    record = commands[0].record
    assert record is not None
    record.parent.mkdir(parents=True)
    record.write_text('{"seconds": 7.5}')
    durations = Durations(commands)
    assert [durations.expected(each) for each in commands] == [7.5, 7.5]
    durations.finished(commands[1], 2.5)
    assert durations.expected(Command("train", ("other", "a", "0"))) == 5
