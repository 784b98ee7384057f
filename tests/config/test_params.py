"""Whatever stands in params.yaml is read as people mean it, or refused in one line that names the key."""

import copy
import itertools
import re
import string
from pathlib import Path
from typing import Any

import pytest
import yaml
from dvc.utils.hydra import apply_overrides
from dvc.utils.serialize import load_yaml
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from dynat.config.params import load, parse, recipe_of
from dynat.errors import UserError

FILE = Path(__file__).parents[2] / "params.yaml"
TREE = load_yaml(FILE)  # as DVC reads it
SMALL = {
    **TREE,
    "baselines": ["pgd_at"],
    "variants": ["dynat"],
    "study": {"digits": TREE["study"]["digits"]},
    "recipes": {name: {**TREE["recipes"][name], "per_study": {}} for name in ("pgd_at", "dynat")},
}
GONE = object()
SLOW_DATA = [HealthCheck.too_slow, HealthCheck.data_too_large]


def changed(path: str, value: object, tree: dict[str, Any] = SMALL) -> dict[str, Any]:
    """A copy of the tree with ``value`` at the dotted ``path``."""
    tree = copy.deepcopy(tree)
    *heads, last = path.split(".")
    section = tree
    for head in heads:
        section = section.setdefault(head, {})
    section[last] = value
    if value is GONE:
        del section[last]
    return tree


def refusal(values: object) -> str:
    """The message with which ``parse`` refuses, without the file's name."""
    with pytest.raises(UserError) as caught:
        parse(values)
    assert_one_line(str(caught.value))
    return str(caught.value).removeprefix("params.yaml: ")


def assert_one_line(message: str) -> None:
    assert message.startswith("params.yaml: ")
    assert len(message) < 400
    assert message.isprintable(), "a line break or a control character would reach the terminal"


# What is typed after -S, and the message; one that begins with a colon follows the key.
WRONG = r"""
alpha=abc | : must be a number such as 0.031, 1e-3 or 8/255, found 'abc'
alpha=-1 | : Input should be greater than or equal to 0, found -1
alpha=HUGE | : must be a finite number of at most 1e+30 in size, found 1000
alpha=NINES | : must be a finite number of at most 1e+30 in size, found '999999999999
alhpa=1 | : unknown 'alhpa'; did you mean 'alpha'?
settings=digits | : Input should be a valid list, found 'digits'
settings=[digit] | : unknown 'digit'; did you mean 'digits'?
settings=[../digits] | : String should match pattern '^[A-Za-z0-9][A-Za-z0-9_]*$', found '../digits'
variants=[dynta] | : unknown 'dynta'; did you mean 'dynat'?
baselines=[pgdat] | : unknown 'pgdat'; did you mean 'pgd_at'?
~study | : Field required
study.digits.trian={} | : unknown 'trian'; did you mean 'train'?
study.digits.train.epslion=1 | : unknown 'epslion'; did you mean 'epsilon'?
study.digits.train.epsilon=1.5 | : Input should be less than or equal to 1, found 1.5
study.digits.attack.n=5000 | : 5000 is more than the 400 test images
study.digits.autoattack.n=[200,5000] | : 5000 is more than the 400 test images
study.digits.train.steps=0 | : Input should be greater than or equal to 1, found 0
study.digits.attack.epsilon=0 | : Input should be greater than 0, found 0
study.digits.attack.step=0 | : Input should be greater than 0, found 0
study.digits.attack.pgd=[] | : List should have at least 1 item after validation, not 0
study.digits.autoattack.epsilon=0 | : Input should be greater than 0, found 0
study.digits.train.lr=1e300 | : must be a finite number of at most 1e+30 in size
study.digits.data.split_seed=4294967296 | : Input should be less than 4294967296
study.digits.attack.epsilon=1.5 | : Input should be less than or equal to 1, found 1.5
study.digits.autoattack.epsilon=1.5 | : Input should be less than or equal to 1, found 1.5
study.digits.data.test=null | : the digits have no test set of their own
study.digits.data.archive=a.tar | : the digits need none
study.digits.data={source: image_folder, archive: a/b, classes: 2} | study.digits.data.archive: String should
study.digits.data={source: image_folder, archive: .., classes: 2} | study.digits.data.archive: String should
study.digits.data={source: image_folder, archive: /a, classes: 2} | study.digits.data.archive: String should
study.digits.data={source: image_folder, archive: ../a.tar, classes: 2} | study.digits.data.archive: String
study.digits.data={source: image_folder, archive: '', classes: 2} | study.digits.data.archive: String should
study.digits.data={source: cifar10, archive: a.gz, classes: 10} | study.digits.data.md5: give the archive
seeds=[0,0] | : one is selected twice
settings=[digits,digits] | : 'digits' is selected twice
baselines=[pgd_at,pgd_at] | : 'pgd_at' is selected twice
baselines=[dynat] | variants: 'dynat' is selected twice
variants=[pgd_at] | : 'pgd_at' is selected twice
study.digits.data.source=cifar10 | study.digits.data.archive: the digits need none, any other source
study.digits.target.widen=10 | : name=cnn takes only depth, stem_stride, width
study.no good={} | study.'no good': String should match pattern '^[A-Za-z0-9][A-Za-z0-9_]*$', found 'no good'
recipes.dynat.iner={} | : unknown 'iner'; did you mean 'inner'?
recipes.dynat.inner.loss=KL | : Input should be 'ce', 'kl', 'ce_dynamic', 'kl_guide', 'kl_guide_moving' or
recipes.dynat.inner.stop={threshold: [1]} | recipes.dynat.inner.stop.threshold: Field required, found [1]
recipes.dynat.awp={gama: 1} | recipes.dynat.awp.gama: unknown 'gama'; did you mean 'gamma'?
recipes.dynat.schedule.drops={x: 1} | recipes.dynat.schedule.drops.x: must be a number such
recipes.dynat.per_study.digit={} | recipes.dynat.per_study: unknown 'digit'; did you mean 'digits'?
checkpoints={theirs: digits} | : unknown 'theirs'; did you mean pyautoattack_resnet18?
checkpoints={pyautoattack_resnet18: digit} | checkpoints.pyautoattack_resnet18: unknown 'digit'; did you mean
checkpoint.pyautoattack_resnet18.network=null | : give one of ours, or else a module of your own
checkpoint.pyautoattack_resnet18.module=a.py:N | checkpoint.pyautoattack_resnet18.network: give one of ours
checkpoint.pyautoattack_resnet18.package=null | checkpoint.pyautoattack_resnet18.file: a name without folders
checkpoint.pyautoattack_resnet18.file=../w.pt | : String should match pattern
checkpoint.pyautoattack_resnet18.mean=[0.5] | checkpoint.pyautoattack_resnet18.std: give mean and std together
checkpoint.pyautoattack_resnet18.sha256=abc | : String should match pattern
checkpoint.pgd_at={file: w, origin: x, network: {name: wrn}} | : is the name of a recipe too; choose another
recipes.dynat.per_study.digits.inner.los=1 | : unknown 'los'; did you mean 'loss'?
""".strip().splitlines()


@pytest.mark.parametrize("case", WRONG)
def test_a_wrong_value_is_refused_in_one_line_that_names_the_key(case: str) -> None:
    override, expected = case.split(" | ")
    path, _, text = override.partition("=")
    value = {"HUGE": 10**400, "NINES": "9" * 5000, "": GONE}.get(text) or yaml.safe_load(text)
    message = refusal(changed(path.removeprefix("~"), value))
    assert message.startswith(path.removeprefix("~") + expected if expected[0] == ":" else expected)


def test_a_variant_without_a_guide_is_refused() -> None:
    swapped = {**changed("variants", ["pgd_at"]), "baselines": ["dynat"]}
    assert refusal(swapped) == "variants: 'pgd_at' trains no guide; select it in baselines"


def test_a_checkpoint_in_a_setting_that_is_not_selected_is_refused() -> None:
    message = refusal(changed("checkpoints", {"pyautoattack_resnet18": "cifar10_tiny"}, TREE))
    assert message.startswith(
        "settings: must have 'cifar10_tiny', which checkpoints.pyautoattack_resnet18 is"
    )


ELSEWHERE = TREE["checkpoint"]["pyautoattack_resnet18"]
IMPORTED = {  # a method that learns from weights trained elsewhere
    "settings": ["cifar10_tiny"],
    "distilled": ["rslad"],
    "checkpoints": {"pyautoattack_resnet18": "cifar10_tiny"},
    "guide_checkpoints": ["pyautoattack_resnet18"],
}


@pytest.mark.parametrize(
    ("lists", "message"),
    [
        ({"baselines": ["rslad"]}, "baselines: 'rslad' has a frozen guide; select it in distilled"),
        ({"variants": ["rslad"]}, "variants: 'rslad' has a frozen guide; select it in distilled"),
        ({"distilled": ["rslad"]}, "guides: name the recipe whose target guides those of distilled"),
        ({"distilled": ["trades"], "guides": ["trades"]}, "distilled: 'trades' has no frozen guide; select"),
        ({"distilled": ["rslad"], "guides": ["ard"]}, "guides: 'ard' has a frozen guide itself"),
        ({"distilled": ["rslad"], "guides": ["trade"]}, "guides: unknown 'trade'; did you mean 'trades'?"),
        ({"distilled": ["rslad", "rslad"], "guides": ["trades"]}, "distilled: 'rslad' is selected twice"),
        (
            {"distilled": ["rslad"], "guide_checkpoints": ["them"]},
            "guide_checkpoints: unknown 'them'; did you mean pyautoattack_resnet18?",
        ),
        (
            {"guide_checkpoints": ["pyautoattack_resnet18"]},
            "checkpoints: must import 'pyautoattack_resnet18' of guide_checkpoints: -S '+checkpoints.pyauto",
        ),
        (
            {
                **IMPORTED,
                "settings": ["digits", "cifar10_tiny"],
                "checkpoint": dict.fromkeys(("pyautoattack_resnet18", "other"), ELSEWHERE),
                "checkpoints": {"pyautoattack_resnet18": "cifar10_tiny", "other": "digits"},
            },
            "checkpoints.other: is not cifar10_tiny, as 'pyautoattack_resnet18' of guide_checkpoints; leave",
        ),
        ({"checkpoint": {"guide": ELSEWHERE}}, "checkpoint.guide: is what frozen guides are named by"),
        (
            {**IMPORTED, "settings": ["digits", "cifar10_tiny"]},
            "settings: must be [cifar10_tiny] alone, where 'pyautoattack_resnet18' of guide_checkpoints is",
        ),
    ],
)
def test_a_method_in_the_wrong_list_is_refused_with_the_right_one(lists: Any, message: str) -> None:
    assert refusal({**TREE, **lists}).startswith(message)


def test_a_distilled_method_is_selected_once_for_every_guide_and_named_after_both() -> None:
    lists = {"baselines": ["pgd_at"], "variants": ["dynat"], "distilled": ["ard", "saad"]}
    params = parse({**TREE, **lists, "guides": ["trades", "dynat"], "alpha": 0.5})
    own = ["ard-trades", "ard-dynat", "saad-trades", "saad-dynat"]
    assert params.trained == ["pgd_at", "dynat", *own]
    assert params.frozen_guides == ["guide-trades", "guide-dynat"]
    found = {
        each: (recipe_of(each), params.guide_run(each, 3)) for each in ("ard-dynat", "guide-dynat", "ard")
    }
    assert found == {
        "ard-dynat": ("ard", ("guide-dynat", 3)),
        "guide-dynat": ("dynat", None),
        "ard": ("ard", None),
    }
    assert params.recipe("digits", "ard-dynat").guide == "frozen"
    assert [params.recipe("digits", each).alpha for each in ("dynat", "guide-dynat")] == [0.5, 1]


def test_a_method_learns_from_guides_trained_here_and_elsewhere_which_have_one_seed() -> None:
    params = parse({**TREE, **IMPORTED, "baselines": [], "variants": [], "guides": ["trades"], "seeds": [3]})
    name = "pyautoattack_resnet18"
    assert params.trained == ["rslad-trades", f"rslad-{name}"]
    assert params.runs[-1] == ("cifar10_tiny", name, 0)
    assert params.guide_run(f"rslad-{name}", 3) == (name, 0)
    assert params.recipe("cifar10_tiny", f"rslad-{name}") == params.recipe("cifar10_tiny", "rslad-trades")


def test_what_becomes_a_frozen_guide_is_trained_on_the_guides_network() -> None:
    params = parse(TREE)
    study = params.study["cifar10_wrn34_10"]
    guide = params.study_of("cifar10_wrn34_10", "guide-trades")
    assert guide == study.model_copy(update={"target": study.guide}) != study
    for method in ("trades", "rslad-trades"):
        assert params.study_of("cifar10_wrn34_10", method) == study


def test_an_empty_selection_is_refused_before_it_empties_the_tables() -> None:
    nothing = {**changed("variants", []), "baselines": []}
    assert refusal(nothing).startswith("baselines: must name a method")


@pytest.mark.parametrize("values", [None, [], 3, "text", {}, {3: 4}, {None: 1}, {(1, 2): 1}, {"\x1b[2J": 1}])
def test_what_is_no_params_file_at_all_is_refused(values: object) -> None:
    assert refusal(values)


NOT_YAML = {
    "": "Input should be a valid dictionary or instance of Params, found null",
    "alpha: 1\nseeds: [0\n": "cannot be read: while parsing a flow sequence",
    "alpha: 1\nalpha: 2\n": "cannot be read: 'alpha' stands there twice",
    "study: {digits: {}, digits: {}}\n": "cannot be read: 'digits' stands there twice",
    "recipes: {a: {drops: {5: 1, 05: 2}}}\n": "cannot be read: 5 stands there twice",
    "alpha: &a 1\n": "cannot be read: write out the value of the anchor",
    "study: {a: &a {b: *a}}\n": "cannot be read: write out the value of the anchor",
    "recipes:\n  a: *b\n": "cannot be read: write out the value of the anchor",
    "<<: {alpha: 1}\n": "'<<': unknown '<<'",
    "? [1, 2]\n: 3\n": "cannot be read: while constructing a mapping",
    "alpha: !!python/object/apply:os.system [id]\n": "cannot be read: could not determine",
    "alpha: !!bool perhaps\n": "cannot be read: ",
    "\x00\x01": "cannot be read: ",
}  # fmt: skip


@pytest.mark.parametrize(("text", "message"), NOT_YAML.items(), ids=range(len(NOT_YAML)))
def test_broken_yaml_is_refused_in_one_line(tmp_path: Path, text: str, message: str) -> None:
    assert refused_file(tmp_path, text.encode()).startswith(message)


def test_a_binary_file_and_a_folder_are_refused_in_one_line(tmp_path: Path) -> None:
    assert refused_file(tmp_path, b"\x80\x81\xff" * 100).startswith("cannot be read: ")
    (tmp_path / "params.yaml").unlink()
    with pytest.raises(UserError, match=r"params.yaml: not found; run from the top of the repository"):
        load(tmp_path / "params.yaml")
    (tmp_path / "params.yaml").mkdir()
    with pytest.raises(UserError, match="cannot be read"):
        load(tmp_path / "params.yaml")


def refused_file(folder: Path, content: bytes) -> str:
    (folder / "params.yaml").write_bytes(content)
    with pytest.raises(UserError) as caught:
        load(folder / "params.yaml")
    message = str(caught.value).removeprefix(f"{folder}/")
    assert_one_line(message)
    return message.removeprefix("params.yaml: ")


words = st.sampled_from(["8/255", "1e999", "nan", "~", "digits", "dynat", "pgd_at", "ce", "mse", "guide"])
numbers = st.integers() | st.integers(-(10**500), 10**500) | st.floats()
scalars = st.none() | st.booleans() | numbers | words | st.text(max_size=20)
known = st.sampled_from(["inner", "outer", "awp", "per_study", "epsilon", "alpha"])
keys = st.text(max_size=8) | st.integers(-5, 200) | st.none() | known
anything = st.recursive(
    scalars, lambda s: st.lists(s, max_size=3) | st.dictionaries(keys, s, max_size=3), max_leaves=8
)


def places(values: Any) -> list[tuple[Any, Any]]:
    """Every (section, key) and (list, index) of the tree."""
    pairs = list(values.items()) if isinstance(values, dict) else list(enumerate(values))
    below = [place for _, inner in pairs if isinstance(inner, dict | list) for place in places(inner)]
    return [(values, key) for key, _ in pairs] + below


@settings(max_examples=150, deadline=None, suppress_health_check=SLOW_DATA)
@given(st.data())
def test_any_change_of_any_value_is_accepted_or_refused_in_one_line(data: st.DataObject) -> None:
    tree = copy.deepcopy(SMALL)
    for _ in range(data.draw(st.integers(1, 2))):
        section, key = data.draw(st.sampled_from(places(tree)))
        if (how := data.draw(st.sampled_from(["replace", "add", "delete"]))) == "delete":
            del section[key]
        elif how == "add" and isinstance(section, dict):
            section[data.draw(keys)] = data.draw(anything)
        else:
            section[key] = data.draw(anything)
    try:
        params = parse(tree)
    except UserError as error:
        assert_one_line(str(error))
    else:  # then every cell of the matrix can be asked for
        assert all(params.recipe(setting, method) for setting in params.study for method in params.recipes)


@settings(max_examples=60, deadline=None)
@given(
    st.integers(0, 10**6), st.text(max_size=12) | st.text(string.punctuation + "\n\t a0"), st.integers(0, 9)
)
def test_any_text_in_the_file_is_accepted_or_refused_in_one_line(
    tmp_path_factory: pytest.TempPathFactory, at: int, noise: str, lost: int
) -> None:
    text = yaml.safe_dump(SMALL, sort_keys=False, default_flow_style=None)
    at %= len(text)
    path = tmp_path_factory.getbasetemp() / "params.yaml"
    path.write_bytes((text[:at] + noise + text[at + lost :]).encode("utf-8", "surrogatepass"))
    try:
        load(path)
    except UserError as error:
        assert_one_line(str(error).removeprefix(f"{path.parent}/"))


def test_more_test_images_than_the_study_keeps_cannot_be_attacked() -> None:
    cifar10 = {**TREE["study"]["cifar10_wrn34_10"]["data"], "test": 9}
    assert "n: 200 is more than the 9 test images" in refusal(changed("study.digits.data", cifar10))


def test_a_compiled_inner_loop_and_pinned_bits_exclude_each_other() -> None:
    tree = changed("study.digits.train.engine", "compiled")
    both = refusal(tree)
    assert both.startswith("study.digits.train.engine: ")
    assert "machine.instructions=null" in both
    tree["study"]["digits"]["machine"]["instructions"] = None
    assert parse(tree).study["digits"].train.engine == "compiled"


def test_dvc_tracks_the_values_that_are_used() -> None:
    ours, tracked = load(FILE), parse(TREE)
    assert ours.study == tracked.study
    for setting, method in itertools.product(ours.study, ours.recipes):
        assert ours.recipe(setting, method) == tracked.recipe(setting, method)


def lists(tree: dict[str, Any], prefix: str = "") -> list[str]:
    """The dotted keys of all lists."""
    found = [f"{prefix}{key}" for key, value in tree.items() if isinstance(value, list)]
    for key, value in tree.items():
        found += lists(value, f"{prefix}{key}.") if isinstance(value, dict) else []
    return found


@pytest.mark.slow
def test_dvc_can_empty_and_set_every_list_and_no_comment_is_lost(tmp_path: Path) -> None:
    text = FILE.read_text()
    comments = sorted(re.findall("#.*", text))
    every, path = lists(yaml.safe_load(text)), tmp_path / "params.yaml"
    alone = (
        "settings",
        "variants",
        "seeds",
        *(key for key in every if "digits" in key or "wrn34_10.data" in key),
    )
    for keys in (every, *([key] for key in alone)):
        path.write_text(text)
        for value in ([], [1, 2], []):
            apply_overrides(path, [f"{key}={value}" for key in keys])  # what -S does
            now = path.read_text()
            assert sorted(re.findall("#.*", now)) == comments
            tree = yaml.safe_load(now)
            for key in keys:
                section = tree
                for part in key.split("."):
                    section = section[int(part) if part.isdigit() else part]
                assert section == value


def test_runs_of_one_radius_are_one_and_a_run_on_too_many_images_is_named() -> None:
    tree = changed(
        "study.digits.autoattack.runs", [{"epsilon": 0.05, "n": [30]}, {"epsilon": "12/255", "n": [9]}]
    )
    tree["study"]["digits"]["autoattack"]["runs"] += [
        {"epsilon": 0.12, "n": [400, 200]},
        {"epsilon": 0.05, "n": [40]},
    ]
    runs = parse(tree).study["digits"].autoattack.by_radius
    found = {key: (run.epsilon, run.n) for key, run in runs.items()}
    assert found == {"": (0.12, [200, 400]), " at 0.05": (0.05, [30, 40]), " at 12-255": (12 / 255, [9])}
    tree["study"]["digits"]["autoattack"]["runs"][1]["n"] = [401]
    assert refusal(tree).startswith("study.digits.autoattack.runs.1.n: 401 is more than the 400 test images")
