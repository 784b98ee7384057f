"""dvc.yaml and params.yaml as DVC sees them: each stage depends on exactly what it uses."""

import ast
import itertools
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import networkx
import pytest
from dvc.dependency import ParamsDependency
from dvc.repo import Repo
from dvc.stage import PipelineStage
from dvc.utils.hydra import apply_overrides, get_hydra_sweeps
from dvc.utils.serialize import dump_yaml, load_yaml

from dynat.config.params import load

ROOT = Path(__file__).parents[2]
FILE = ROOT / "params.yaml"
pytestmark = pytest.mark.filterwarnings("ignore:_NoneStep:DeprecationWarning")  # of a package that DVC uses
KINDS = ("train", "attack", "autoattack")  # run for each setting, method and seed
STAGES: dict[str, Any] = {  # each as a template
    name: stage.get("do", stage) for name, stage in load_yaml(ROOT / "dvc.yaml")["stages"].items()
}
TRAINED = {"baselines", "variants", "distilled", "guides", "guide_checkpoints"}
DERIVED = {  # properties of the parameters -> the keys that they are made of
    "trained": TRAINED,
    "methods": {*TRAINED, "checkpoints"},
    "runs": {*TRAINED, "checkpoints", "settings", "seeds"},
    "published_weights": {"checkpoints", "checkpoint"},
    "guide_run": {"checkpoint"},
    "study": set(),  # modern, attack.pgd: the models' metadata and the metrics of an attack change with them
}


def script_of(stage: str) -> Path:
    module = re.search(r" -m stages\.(\w+)", STAGES[stage]["cmd"])
    assert module
    return ROOT / "stages" / f"{module[1]}.py"


def code(source: Path) -> list[ast.AST]:
    """Every node of a file that can run: what only annotations need is left out."""
    tree = ast.parse(source.read_text(encoding="utf-8"))
    for node in ast.walk(tree):
        if isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING"):
            node.body = []
    return list(ast.walk(tree))


def test_no_stage_lists_a_file_of_the_library_and_each_depends_on_its_closure() -> None:
    for stage, entry in STAGES.items():
        name = script_of(stage).stem
        code = [dep for dep in entry["deps"] if re.match(r"(dynat|stages|metrics/code)\b", dep)]
        assert code == (["dynat", "stages"] if name == "check" else [f"metrics/code/{name}.json"])
    assert len((ROOT / "dvc.yaml").read_text(encoding="utf-8").splitlines()) <= 280


def reads(sources: set[Path], of: str) -> set[str]:
    """``machine``, ``data.classes``, ... for each ``<...>study[...].machine`` in the sources."""
    texts = [ast.unparse(node) for file in sources for node in code(file) if isinstance(node, ast.Attribute)]
    chains = [re.fullmatch(rf"(?:.*\.)?{of}(?:\[\w+\])?\.(\w+(?:\.\w+)*)", text) for text in texts]
    return {chain[1] for chain in chains if chain}


def test_a_stage_declares_exactly_the_sections_that_its_script_reads() -> None:
    for stage in STAGES.keys() - {"check", "tabulate"}:
        keys = [re.match(r"study\.\$\{item(?:\.setting)?\}\.(.*)", key) for key in STAGES[stage]["params"]]
        declared = {key[1] for key in keys if key}
        setup = {ROOT / "dynat/methods/setup.py"} if stage.startswith("train") else set()
        read = reads({script_of(stage), *setup}, "study")
        if stage == "train_guide":  # Params.study_of puts the guide in the target's place
            assert "target" not in declared
            read.discard("target")
        if "distilled" in stage:  # its guide's network is that of the weights that it depends on
            assert "guide" not in declared
            read.discard("guide")
        longest = {key for key in read if not any(other.startswith(f"{key}.") for other in read)}
        uncovered = {k for k in longest if not any(f"{k}.".startswith(f"{d}.") for d in declared)}
        unused = {d for d in declared if not any(f"{k}.".startswith(f"{d}.") for k in read)}
        assert (stage, uncovered, unused) == (stage, set(), set())
    library = {*(ROOT / "dynat/paper").rglob("*.py"), script_of("tabulate")}
    read = {key for name in reads(library, "params") for key in DERIVED.get(name.split(".")[0], {name})}
    assert read == {*STAGES["tabulate"]["params"]}


def test_a_distilled_method_has_the_stages_of_others_under_its_own_name_and_learns_from_its_guide() -> None:
    guide = "models/${item.setting}/guide-${item.guide}/${item.seed}"
    for name in KINDS:
        other, distilled = STAGES[f"{name}_baseline"], dict(STAGES[f"{name}_distilled"])
        learns = [guide] if name == "train" else []
        assert {*distilled["deps"]} >= {*learns}
        distilled["deps"] = [dep for dep in distilled["deps"] if dep not in learns]
        text = json.dumps(other).replace("${item.method}", "${item.method}-${item.guide}")
        params = [key for key in other["params"] if name != "train" or not key.endswith(".guide")]
        expected = json.loads(text) | {"params": params}
        expected["matrix"] = {"setting": "${settings}", "method": "${distilled}"}
        expected["matrix"] |= {"guide": "${guides}", "seed": "${seeds}"}
        assert distilled == expected
    assert STAGES["train_guide"]["outs"] == [guide.replace("guide}", "method}")]


@pytest.mark.parametrize("name", KINDS)
def test_a_method_distilled_from_a_checkpoint_differs_in_its_guide_alone(name: str) -> None:
    pair = [STAGES[f"{name}_distilled"], STAGES[f"{name}_distilled_checkpoint"]]
    trained, imported = (json.dumps(stage, sort_keys=True) for stage in pair)
    own = trained.replace("${guides}", "${guide_checkpoints}")
    assert own.replace("guide-${item.guide}/${item.seed}", "${item.guide}/0") == imported


@pytest.mark.parametrize("name", KINDS)
def test_a_pair_of_stages_differs_only_in_its_list_and_in_alpha(name: str) -> None:
    baseline, dynat = (dict(STAGES[f"{name}_{family}"]) for family in ("baseline", "dynat"))
    matrix = {"setting": "${settings}", "seed": "${seeds}"}
    assert baseline.pop("matrix") == {**matrix, "method": "${baselines}"}
    assert dynat.pop("matrix") == {**matrix, "method": "${variants}"}
    own = {"alpha"} if name == "train" else set()
    assert {*dynat.pop("params")} == {*baseline.pop("params")} | own
    assert baseline == dynat


# --------------------------------------------------------------------- everything selected, expanded by DVC


def test_the_readme_shows_the_numbers_of_the_digits_table() -> None:
    rows = {name: table_rows(ROOT / name) for name in ("README.md", "metrics/tables/digits.md")}
    shown, made = rows["README.md"], rows["metrics/tables/digits.md"]
    assert len(shown) == len(made) > 5
    for row in shown:
        (own,) = (each for each in made if each["Method"] == row["Method"])
        assert row.items() <= own.items()


def table_rows(path: Path) -> list[dict[str, str]]:
    """The rows of a file's first Markdown table of methods, by heading."""
    text = path.read_text(encoding="utf-8")
    table = re.search(r"^\| Method .*\n(?:\|.*\n)+", text, re.MULTILINE)
    assert table is not None
    head, _, *rows = ([cell.strip() for cell in line.strip("|").split("|")] for line in table[0].splitlines())
    return [dict(zip(head, row, strict=True)) for row in rows]


def test_a_method_distilled_from_a_checkpoint_waits_for_its_import_alone(tmp_path: Path) -> None:
    (tmp_path / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    lists = {"settings": ["cifar10_tiny"], "seeds": [0, 1], "distilled": ["rslad"], "variants": []}
    name = "pyautoattack_resnet18"
    chosen = {**lists, "checkpoints": {name: "cifar10_tiny"}, "guide_checkpoints": [name]}
    dump_yaml(tmp_path / "params.yaml", load_yaml(FILE) | chosen)
    load(tmp_path / "params.yaml")
    with Repo.init(str(tmp_path), no_scm=True) as repo:
        graph = repo.index.graph
        found = {s.name: {x.name for x in networkx.descendants(graph, s)} for s in repo.index.stages}
    for seed in (0, 1):
        cell = f"@cifar10_tiny-rslad-{name}-{seed}"
        before = {"check", "prepare@cifar10_tiny", f"import@{name}"}
        assert found[f"train_distilled_checkpoint{cell}"] == before
        for kind in ("attack", "autoattack"):
            waits = {*before, f"train_distilled_checkpoint{cell}"}
            assert found[f"{kind}_distilled_checkpoint{cell}"] == waits


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Repo]:
    """A repository whose params.yaml selects every setting and recipe, and two seeds."""
    folder, params = tmp_path_factory.mktemp("repo"), load_yaml(FILE)
    recipes = load(FILE).recipes.items()
    family = {name for name, recipe in recipes if recipe.trains_guide}
    distilled = {name for name, recipe in recipes if recipe.frozen_guide}
    params["settings"], params["seeds"] = list(params["study"]), [0, 1]
    params["variants"] = sorted(family)
    params["distilled"], params["guides"] = sorted(distilled), ["dynat"]
    params["baselines"] = sorted(params["recipes"].keys() - family - distilled)
    params["checkpoints"] = {"pyautoattack_resnet18": "cifar10_tiny"}
    dump_yaml(folder / "params.yaml", params)
    (folder / "dvc.yaml").write_bytes((ROOT / "dvc.yaml").read_bytes())
    with Repo.init(str(folder), no_scm=True) as repo:
        yield repo


def stages(repo: Repo) -> dict[str, PipelineStage]:
    return {stage.name: stage for stage in repo.index.stages}


def keys_of(stage: PipelineStage) -> set[str]:
    return {key for dep in stage.deps if isinstance(dep, ParamsDependency) for key in dep.params}


def test_dvc_expands_the_matrix_into_one_stage_per_setting_method_and_seed(whole: Repo) -> None:
    params = load(Path(whole.root_dir, "params.yaml"))
    expected = {f"prepare@{setting}" for setting in params.study} | {"check", "tabulate"}
    for kind, setting, seed in itertools.product(KINDS, params.study, (0, 1)):
        expected |= {f"{kind}_baseline@{setting}-{method}-{seed}" for method in params.baselines}
        expected |= {f"{kind}_dynat@{setting}-{method}-{seed}" for method in params.variants}
        pairs = itertools.product(params.distilled, params.guides)
        expected |= {f"{kind}_distilled@{setting}-{method}-{guide}-{seed}" for method, guide in pairs}
        expected |= {f"train_guide@{setting}-{guide}-{seed}" for guide in params.guides}
    expected |= {f"{kind}@pyautoattack_resnet18" for kind in ("import", "attack_checkpoint")}
    expected |= {"autoattack_checkpoint@pyautoattack_resnet18"}
    assert {*stages(whole)} == expected
    assert "attack_dynat@cifar10_wrn34_10-dynat_inner_awp-0" in expected


def test_every_parameter_that_a_stage_depends_on_is_there(whole: Repo) -> None:
    params = load_yaml(Path(whole.root_dir, "params.yaml"))
    for name, stage in stages(whole).items():
        for key in keys_of(stage):
            section: Any = params
            for part in key.split("."):
                assert part in section, f"{name}: {key}"
                section = section[part]


@pytest.mark.parametrize(
    ("key", "expected"),
    [
        ("alpha", r"train_dynat@.*"),
        ("recipes.dynat", r"train_(dynat|guide)@\w+-dynat-\d"),
        ("recipes.rslad", r"train_distilled@\w+-rslad-\w+-\d"),
        ("study.digits.target", r"train_(baseline|dynat|distilled)@digits-.*"),
        ("checkpoint.pyautoattack_resnet18", r"import@pyautoattack_resnet18"),
        ("recipes.pgd_at", r"train_baseline@\w+-pgd_at-\d"),
        ("study.digits.data", r"prepare@digits"),
        ("study.digits.train", r"train_\w+@digits-.*"),
        ("study.digits.attack", r"attack_\w+@digits-.*"),
        ("study.digits.autoattack", r"autoattack_\w+@digits-.*"),
        ("seeds", r"tabulate"),
    ],
)
def test_a_parameter_touches_its_own_stages_and_no_other(whole: Repo, key: str, expected: str) -> None:
    touched = {name for name, stage in stages(whole).items() if key in keys_of(stage)}
    assert touched == {name for name in stages(whole) if re.fullmatch(expected, name)} != set()


def test_every_attack_waits_for_its_own_training_and_the_tables_for_every_attack(whole: Repo) -> None:
    upstream = {
        s.name: {x.name for x in networkx.descendants(whole.index.graph, s)} for s in whole.index.stages
    }
    assert upstream["check"] == set()  # a refused parameter stops DVC before it removes any output
    for name in upstream.keys() - {"check", "tabulate"}:
        kind, _, cell = name.partition("@")
        setting = "cifar10_tiny" if cell == "pyautoattack_resnet18" else cell.split("-")[0]
        data, model = {"check", f"prepare@{setting}"} - {name}, set()
        if kind.startswith(("attack", "autoattack")):
            family = kind.split("_")[1]
            model = {f"import@{cell}" if family == "checkpoint" else f"train_{family}@{cell}"}
        if kind.endswith("distilled"):
            _, _, guide, seed = cell.split("-")
            model |= {f"train_guide@{setting}-{guide}-{seed}"}
        assert upstream[name] == data | model
    assert upstream["tabulate"] == upstream.keys() - {"tabulate"}


# --------------------------------------------------------------------- dvc exp run -S


OVERRIDES: dict[str, dict[str, object]] = {
    "alpha=0.5": {"alpha": 0.5},
    "alpha=010": {"alpha": 10},
    "settings=[digits]": {},
    "seeds=[0,1]": {"seeds": [0, 1]},
    "study.digits.train.epsilon=8/255": {"study.digits.train.epsilon": 8 / 255},
    "study.digits.train.lr=1e-3": {"study.digits.train.lr": 0.001},
    "study.digits.attack.pgd=[10,20]": {"study.digits.attack.pgd": [10, 20]},
    "recipes.dynat.inner.loss=ce": {"recipes.dynat.inner.loss": "ce"},
    "recipes.dynat.schedule.epochs=120": {"recipes.dynat.schedule.epochs": 120},
    "recipes.dynat_awp.awp.gamma=1e-3": {"recipes.dynat_awp.awp.gamma": 0.001},
}


@pytest.mark.parametrize("override", OVERRIDES)
def test_an_override_changes_its_key_alone_and_keeps_every_comment(tmp_path: Path, override: str) -> None:
    path = tmp_path / "params.yaml"
    path.write_bytes(FILE.read_bytes())
    apply_overrides(path, [override])
    before, after = (flat(load(file).model_dump()) for file in (FILE, path))
    assert {key: after[key] for key in after if after[key] != before.get(key, ...)} == OVERRIDES[override]
    assert before.keys() == after.keys()
    assert comments(path) == comments(FILE)


def flat(values: object, path: str = "") -> dict[str, object]:
    if not isinstance(values, dict):
        return {path[1:]: values}
    return {k: v for key, inner in values.items() for k, v in flat(inner, f"{path}.{key}").items()}


def comments(path: Path) -> list[str]:
    lines = path.read_text(encoding="utf-8").splitlines()
    return [line.partition("#")[2].strip() for line in lines if "#" in line]


def test_every_override_that_the_texts_recommend_works(tmp_path: Path) -> None:
    pages = {*(ROOT / "docs").glob("*.md")} - {ROOT / "docs/your-own.md"}  # which tests/test_docs.py runs
    texts = "".join(file.read_text(encoding="utf-8") for file in [FILE, ROOT / "README.md", *sorted(pages)])
    found = {
        (quoted or bare).rstrip(".,;:") for quoted, bare in re.findall(r"-S (?:'([^']+)'|([^\s)`']+))", texts)
    }
    values: dict[str, list[str]] = {}  # by key
    for override in sorted(found - {"key=value"}):
        for sweep in get_hydra_sweeps({"params.yaml": [override]}):
            values.setdefault(override.partition("=")[0], []).extend(sweep["params.yaml"])
    assert values
    for together in itertools.zip_longest(*values.values()):  # each key's first, second, ...
        path = tmp_path / "params.yaml"
        path.write_bytes(FILE.read_bytes())
        apply_overrides(path, [override for override in together if override])
        assert load_yaml(path)["recipes"].keys() == load(path).recipes.keys(), "DVC reads what it wrote"
