"""Stage import: weights that somebody else trained -> ``models/<setting>/<name>/0``.

``target.safetensors`` are the weights as those of a training are; beside them is the code of a network that
is none of ours, which is run here and whenever they are read.
"""

import json
import shutil
from pathlib import Path

from dynat.data.download import module_file, weights
from dynat.errors import UserError
from dynat.runtime import machine
from dynat.runtime.files import replaced, sha256
from dynat.runtime.record import RunRecord
from dynat.runtime.stage import main, run_of_arguments


def stage() -> None:
    """Find the file, fit what it holds to its network, write both at once."""
    run = run_of_arguments(__doc__ or "")
    if run.method not in run.params.checkpoint:
        raise UserError(f"method {run.method!r} is not in params.yaml's checkpoint; it is trained")
    record = RunRecord("import", run)
    machine.pin(run.study.machine)
    import torch

    from dynat.data.splits import load
    from dynat.networks.imported import import_weights
    from dynat.networks.weights import CODE

    given, section, device = (
        run.params.checkpoint[run.method],
        f"checkpoint.{run.method}",
        torch.device("cpu"),
    )
    file, code, folder = weights(given, section), module_file(given), run.path("models")
    images = load(Path("data", f"{run.setting}.safetensors"), device).test_images
    with replaced(folder) as partial:
        if code is not None:
            shutil.copyfile(code, partial / CODE)
        try:
            spec = import_weights(given, file, partial, images[:2], run.study.data.classes)
        except UserError as error:
            raise UserError(f"{section}: {error}") from None
    model = sha256(folder / "target.safetensors")
    record.write(device, 1, 0, model, None)
    print(f"{file} -> {folder}: {json.dumps(spec)}")


if __name__ == "__main__":
    main(stage)
