"""Publish the weights of a run, and the audit that holds them, in a format that others read.

RUN is setting/method/seed, such as digits/dynat/0; DIR is made, or is an empty folder. What the audit does
not hold is not published (exit status 2, one line). Formats: robustbench, huggingface, onnx, torch.export,
mlflow.
"""

import argparse
import importlib
import os
import tempfile
from pathlib import Path

from dynat.audit.crate import export
from dynat.errors import UserError
from dynat.publish.audited import audited, write_lineage
from dynat.runtime.files import explained
from dynat.runtime.stage import main

FORMATS = {
    "robustbench": "robustbench",
    "huggingface": "huggingface",
    "onnx": "onnx_file",
    "torch.export": "torch_export",
    "mlflow": "mlflow_registry",
}
OF_OURS = ("huggingface", "mlflow")  # what says how the weights were trained
INSTALL = "install it with uv sync --extra publish"


def publish(arguments: list[str] | None = None) -> None:
    """Write the folder, all of it or nothing; :class:`UserError` where that is not to be."""
    options = _options(arguments)
    folder: Path = options.folder
    with explained(folder):
        if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
            raise UserError(f"{folder}: is not an empty folder; name a new one")
        folder.absolute().parent.mkdir(parents=True, exist_ok=True)
    try:
        write = importlib.import_module(f"dynat.publish.{FORMATS[options.format]}").write
    except ModuleNotFoundError as error:
        raise UserError(f"--as {options.format} needs the package {error.name}; {INSTALL}") from None
    release = audited(Path(), options.run)
    if release.method in release.params.checkpoint and options.format in OF_OURS:
        text = f"{options.run}: trained elsewhere, so there is no recipe, licence or MLflow run of ours to"
        raise UserError(f"{text} publish --as {options.format}; robustbench, onnx and torch.export need none")
    with explained(folder), tempfile.TemporaryDirectory(dir=folder.absolute().parent, prefix=".") as scratch:
        made = Path(scratch) / "made"
        made.mkdir()
        write_lineage(release, made)
        if options.crate:
            export(Path(), made / "crate", release.cells, release.found)
        for line in write(release, made):
            print(line)
        if folder.exists():
            folder.rmdir()
        os.replace(made, folder)
    size = sum(path.stat().st_size for path in folder.rglob("*") if path.is_file())
    print(f"{release.name} as {options.format}: {folder}, {size / 1e6:.1f} MB; {release.summary}")


def _options(arguments: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser("python -m dynat.publish", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("run", metavar="RUN")
    parser.add_argument("--as", dest="format", choices=FORMATS, required=True, metavar="FORMAT")
    parser.add_argument("folder", type=Path, metavar="DIR")
    parser.add_argument("--crate", action="store_true", help="also a Workflow Run RO-Crate, in DIR/crate")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main(publish)
