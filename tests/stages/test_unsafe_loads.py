"""No file of this project can execute what a data file, a checkpoint or a parameter file brings along."""

import ast
from collections.abc import Iterator
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TREES = ("dynat", "stages", "tests")
UNPICKLERS = {"cPickle", "_pickle", "dill", "cloudpickle", "joblib", "shelve", "marshal", "jsonpickle"}
EXECUTORS = {"eval", "exec", "compile", "__import__", "execfile"}
SAFE_LOADERS = {"SafeLoader", "CSafeLoader", "BaseLoader", "CBaseLoader"}


def unsafe(source: str) -> Iterator[str]:
    """Line and reason for each construct that can run what it reads."""
    tree = ast.parse(source)
    safe = SAFE_LOADERS | safe_loaders_of(tree)
    for node in ast.walk(tree):
        reason = None
        if isinstance(node, ast.Import | ast.ImportFrom):
            reason = unsafe_import(node)
        elif isinstance(node, ast.ClassDef) and "pickle.Unpickler" in map(ast.unparse, node.bases):
            methods = {each.name for each in node.body if isinstance(each, ast.FunctionDef)}
            reason = None if "find_class" in methods else "an unpickler that finds any class"
        elif isinstance(node, ast.Call):
            reason = unsafe_call(node, safe)
        if reason:
            yield f"line {node.lineno}: {reason}"  # type: ignore[attr-defined]


def safe_loaders_of(tree: ast.Module) -> set[str]:
    """Classes of the file whose only base is a safe loader of yaml, plain or fetched by ``getattr``."""
    return {
        node.name
        for node in tree.body
        if isinstance(node, ast.ClassDef)
        and len(node.bases) == 1
        and any(ast.unparse(node.bases[0]).endswith(name) for name in ("yaml.SafeLoader", "yaml.SafeLoader)"))
    }


def unsafe_import(node: ast.Import | ast.ImportFrom) -> str | None:
    names = [alias.name for alias in node.names]
    if isinstance(node, ast.Import):
        return "imports what unpickles" if UNPICKLERS & {name.split(".")[0] for name in names} else None
    module = (node.module or "").split(".")[0]
    if module in UNPICKLERS | {"pickle"}:
        return "imports what unpickles"
    hidden = {"load", "unsafe_load", "full_load"} & set(names) and module in ("yaml", "torch", "numpy")
    return "hides which load it is" if hidden else None


def unsafe_call(call: ast.Call, safe_loaders: set[str]) -> str | None:
    name = ast.unparse(call.func)
    given = {keyword.arg: ast.unparse(keyword.value) for keyword in call.keywords}
    last = name.split(".")[-1]
    if name in EXECUTORS or (last == "eval" and (call.args or given)):
        return f"{name} runs text"
    if name in ("pickle.load", "pickle.loads", "pickle.Unpickler"):
        return f"{name} runs what it reads"
    if name == "torch.load" and given.get("weights_only") != "True":
        return "torch.load without weights_only=True"
    if name in ("torch.package.PackageImporter", "torch.hub.load", "torch.jit.load"):
        return f"{name} runs code"
    if name in ("np.load", "numpy.load") and given.get("allow_pickle", "False") != "False":
        return "numpy unpickles"
    if name in ("pd.read_pickle", "pandas.read_pickle"):
        return "pandas unpickles"
    if name in ("yaml.load", "yaml.load_all"):
        loader = given.get("Loader", ast.unparse(call.args[1]) if len(call.args) > 1 else "")
        if loader.split(".")[-1] not in safe_loaders:
            return f"yaml.load with {loader or 'no loader'}"
    if name.startswith("yaml.") and last.startswith(("unsafe_load", "full_load")):
        return f"{name} builds any object"
    if last in ("extractall", "extract") and given.get("filter") not in ("'data'", '"data"'):
        return f"{last} without filter='data'"
    if last == "unpack_archive":
        return "unpack_archive trusts names"
    if (name in ("os.system", "os.popen")) or given.get("shell") == "True":
        return "a shell reads text"
    return None


@pytest.mark.parametrize("tree", TREES)
def test_nothing_in_the_tree_loads_unsafely(tree: str) -> None:
    files = sorted((ROOT / tree).rglob("*.py"))
    assert files
    found = [f"{file.relative_to(ROOT)}: {reason}" for file in files for reason in unsafe(file.read_text())]
    assert found == []


@pytest.mark.parametrize(
    "source",
    [
        "import pickle\npickle.loads(b'')",
        "from pickle import loads",
        "import pickle\nclass Any(pickle.Unpickler): pass",
        "from joblib import load",
        "import torch\ntorch.load('a')",
        "torch.load('a', weights_only=False)",
        "torch.load('a', weights_only=flag)",
        "from torch import load",
        "yaml.load(text)",
        "yaml.load(text, yaml.Loader)",
        "yaml.load(text, Loader=yaml.UnsafeLoader)",
        "class _Loader(yaml.FullLoader): pass\nyaml.load(text, _Loader)",
        "yaml.unsafe_load(text)",
        "np.load(path, allow_pickle=True)",
        "archive.extractall(folder)",
        "archive.extract(member, filter='fully_trusted')",
        "shutil.unpack_archive(a, b)",
        "eval(text)",
        "exec(text)",
        "frame.eval('a + b')",
        "os.system(text)",
        "subprocess.run(text, shell=True)",
    ],
)
def test_the_search_finds(source: str) -> None:
    assert len(list(unsafe(source))) == 1


@pytest.mark.parametrize(
    "source",
    [
        "torch.load(file, map_location='cpu', weights_only=True)",
        "class _Loader(yaml.SafeLoader): pass\nyaml.load(text, Loader=_Loader)",
        "yaml.safe_load(text)",
        "class Inert(pickle.Unpickler):\n def find_class(self, module, name): ...\nInert(f).load()",
        "network.eval()",
        "archive.extractall(folder, filter='data')",
        "subprocess.run(['true'])",
        "re.compile('a')",
    ],
)
def test_the_search_leaves_alone(source: str) -> None:
    assert list(unsafe(source)) == []
