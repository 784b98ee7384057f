"""A training as it is set up: engine, networks and the key of its resume state are what was asked for."""

import copy
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from dynat.config.params import parse
from dynat.data.sources import prepare
from dynat.errors import UserError
from dynat.methods import setup
from dynat.methods.setup import is_compiled, set_up
from dynat.methods.training import Training
from dynat.runtime import distributed, machine
from dynat.runtime.stage import Run

TREE = yaml.safe_load((Path(__file__).parents[2] / "params.yaml").read_text())
TREE["study"] = {"digits": TREE["study"]["digits"]}
TREE["study"]["digits"]["machine"] = {"device": "cpu"}
for each in TREE["recipes"].values():
    each.pop("per_study", None)


@pytest.fixture(autouse=True, scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    """The current folder of these tests, with prepared digits; switches of torch as they were, afterwards."""
    mode, filled = torch.get_deterministic_debug_mode(), torch.utils.deterministic.fill_uninitialized_memory
    tf32 = torch.backends.cudnn.allow_tf32
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp("setup"))
        prepare(parse(TREE).study["digits"].data, Path("data/digits.safetensors"))
        yield Path.cwd()
    torch.set_deterministic_debug_mode(mode)
    torch.utils.deterministic.fill_uninitialized_memory = filled
    torch.backends.cudnn.allow_tf32 = tf32


def made(method: str = "dynat", seed: int = 0, **edits: Any) -> tuple[Training, dict[str, str], str]:
    """By ``set_up`` with edits of the digits' study, such as ``train__batch``."""
    tree = copy.deepcopy(TREE)
    for name, value in edits.items():
        section, key = name.split("__")
        tree["study"]["digits"][section][key] = value
    return set_up(Run("digits", method, seed, parse(tree)))


def test_whatever_the_bits_depend_on_gives_another_resume_state(
    folder: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(setup, "code_key", str)  # the real one takes a second
    keys = [made()[2], made("dynat_inner")[2], made(seed=1)[2], made(train__batch=31)[2]]
    keys += [made(target__width=16)[2], made(train__precision="bf16")[2]]
    with monkeypatch.context() as patch:
        patch.setattr(setup, "code_key", lambda stage: f"another {stage}")
        keys.append(made()[2])
    with monkeypatch.context() as patch:
        patch.setattr(distributed, "size", lambda: 2)
        patch.setattr(distributed, "join", lambda device: None)
        keys.append(made()[2])
    with monkeypatch.context() as patch:
        patch.setattr(machine, "fingerprint", lambda device: {"cpu": "another"})
        keys.append(made()[2])
    for compiler in ("one", "another"):
        monkeypatch.setattr(machine, "compiler", lambda key, device, found=compiler: found)
        keys.append(made(train__engine="compiled")[2])
    prepare(parse(TREE).study["digits"].data.model_copy(update={"split_seed": 1}), folder / "data/more")
    content, other = (Path("data", name).read_bytes() for name in ("digits.safetensors", "more"))
    Path("data/digits.safetensors").write_bytes(other)
    keys.append(made()[2])
    Path("data/digits.safetensors").write_bytes(content)
    assert len(set(keys)) == len(keys) == 12
    assert made()[2] == keys[0]


def test_equal_seeds_give_equal_weights_in_the_layout_that_convolutions_like_and_others_others() -> None:
    one, again, other = made()[0], made()[0], made(seed=1)[0]
    assert (one.seed, other.seed) == (0, 1)
    for name in ("target", "guide"):
        weights, same, different = (each.networks[name].state_dict() for each in (one, again, other))
        assert all(torch.equal(weights[key], same[key]) for key in weights)
        assert any(not torch.equal(weights[key], different[key]) for key in weights)
        for parameter in one.networks[name].parameters():
            assert parameter.ndim < 4 or parameter.is_contiguous(memory_format=torch.channels_last)


def test_the_engine_has_the_guide_that_its_recipe_needs_and_no_other() -> None:
    run, metadata, _ = made()
    assert run.engine.guide is run.networks["guide"]
    assert metadata.keys() == {"target", "guide"}
    run, metadata, _ = made("pgd_at")
    assert run.engine.guide is None
    assert metadata.keys() == run.networks.keys() == {"target"}


@pytest.mark.parametrize(
    ("asked", "products", "tf32"),
    [("fp32", torch.float32, False), ("tf32", torch.float32, True), ("bf16", torch.bfloat16, False)],
)
def test_matrix_products_are_in_the_precision_that_the_machine_gives(
    asked: str, products: torch.dtype, tf32: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(machine, "precision_of", lambda wanted, device: wanted)
    run, *_ = made(train__precision=asked)
    assert (run.engine.precision, run.precision) == (products, asked)
    assert torch.backends.cudnn.allow_tf32 == tf32


def test_batch_norms_are_folded_but_where_bits_are_pinned(monkeypatch: pytest.MonkeyPatch) -> None:
    assert made()[0].engine.fold
    monkeypatch.setattr(machine, "refuse_unfit", lambda *asked: None)
    assert not made(machine__instructions="avx2")[0].engine.fold


def test_only_an_attack_in_eval_mode_is_compiled_and_then_the_key_names_the_setting(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    asked: list[tuple[str, str]] = []
    monkeypatch.setattr(
        machine, "compiler", lambda key, device: asked.append((key, device.type)) or "compiler"
    )
    assert made(train__engine="compiled")[0].engine.inner.compiled
    assert asked == [("study.digits.train.engine", "cpu")]
    for method in ("pgd_at", "natural"):  # attacks in train mode, and not at all
        assert not made(method, train__engine="compiled")[0].engine.inner.compiled
    assert not made(train__engine="graph")[0].engine.inner.compiled
    assert len(asked) == 1
    params = parse(TREE)
    study = params.study["digits"]
    graph = study.model_copy(update={"train": study.train.model_copy(update={"engine": "graph"})})
    assert is_compiled(graph, params.recipe("digits", "dynat"), "cuda")


def test_what_only_the_data_tells_is_refused_before_the_first_step_by_its_key(
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    with pytest.raises(UserError, match=r"^study\.digits\.train\.batch: 1298 is larger than the 1297"):
        made(train__batch=1298)
    with pytest.raises(UserError, match=r"^study\.digits\.machine\.device: cuda"):
        made(machine__device="cuda")
