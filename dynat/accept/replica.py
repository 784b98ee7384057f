"""What stages compute with one tree of code, as hashes by name: ``python -m dynat.accept`` runs it on two.

A script: ``PYTHONPATH`` says which ``dynat`` it imports, the present folder is a workspace with params.yaml
and the recorded data and models. Reads its work as JSON from standard input, and writes to the file that it
is given ``{"values": {stage: [[name, hash], ...]}, "executed": {module: [line, ...]}}``.
"""

import hashlib
import importlib
import json
import sys
from collections.abc import Iterator
from pathlib import Path
from types import FrameType, ModuleType
from typing import Any, Self

FIRST = 5  # steps from the beginning of a training
STEPS = 2  # at every epoch at which something changes, from the stored weights
IMAGES, BATCH = 1000, 200  # test images whose logits are compared, and at once
Values = Iterator[tuple[str, Any]]


class Untracked:
    """In the place of ``runtime.tracking.Tracker``, on which no output's byte depends: logs nothing."""

    def __init__(self, *run: object) -> None: ...

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *error: object) -> None: ...

    def __getattr__(self, name: str) -> Any:
        return lambda *arguments: None


def main() -> None:
    """Do the work."""
    request, answer = json.load(sys.stdin), Path(sys.argv[1]).resolve()
    executed: dict[str, set[int]] = {name: set() for name in request["modules"]}

    def trace(frame: FrameType, event: str, argument: object) -> Any:
        lines = executed.get(frame.f_globals.get("__name__", ""))
        if lines is None or frame.f_code.co_name == "<module>":
            return None
        lines.add(frame.f_lineno)
        return trace

    tracking: Any = ModuleType("dynat.runtime.tracking")
    tracking.Tracker, sys.modules[tracking.__name__] = Untracked, tracking
    sys.settrace(trace)
    values = {}
    for stage in request["stages"]:
        kind, run = stage["kind"], [stage["setting"], stage["method"], stage["seed"]]
        work = train(*run) if kind == "train" else script(kind, run)
        values[stage["name"]] = [(name, _hash(value)) for name, value in work]
    sys.settrace(None)
    lines = {name: sorted(found) for name, found in executed.items()}
    answer.write_text(json.dumps({"values": values, "executed": lines}))


def pin(setting: str) -> Any:
    """The parameters of the workspace, with the machine pinned for ``setting``, once in a process."""
    from dynat.config.params import load
    from dynat.runtime import machine

    params = load()
    if "torch" not in sys.modules:
        machine.pin(params.study[setting].machine)
        machine.pin = lambda machine: None
    return params


def train(setting: str, method: str, seed: int) -> Values:
    """The first steps; two of each epoch at which the recipe changes something; an epoch's end; the files."""
    params = pin(setting)
    from dynat.methods.setup import set_up
    from dynat.networks.weights import load_weights
    from dynat.runtime import machine
    from dynat.runtime.stage import Run

    run = Run(setting, method, seed, params)
    training, metadata, _ = set_up(run)
    yield from machine.fingerprint(training.engine.device).items()
    yield from _state("before the first step", training)
    yield from _steps("epoch 0", training, 0, FIRST, [])
    losses: list[Any] = []
    for epoch in turns(training.recipe):
        for name, network in training.networks.items():
            network.load_state_dict(load_weights(run.path("models") / f"{name}.safetensors")[0])
        yield from _steps(f"epoch {epoch} from the stored weights", training, epoch, STEPS, losses)
    for name, value in training.close_epoch(losses).items():
        yield f"at the end of an epoch: {name}", value
    training.restore(training.state())
    training.write(Path("written"), metadata)
    for file in sorted(Path("written").iterdir()):
        yield str(file), file.read_bytes()


def turns(recipe: Any) -> list[int]:
    """The epochs at which rate, perturbation, weights, averaging or early stop change, and the last."""
    stop, schedule = recipe.inner.stop, recipe.schedule
    first = {0, 1, schedule.epochs - 1, recipe.weights.begin, *schedule.drops}
    first |= {recipe.awp.begin} if recipe.awp else set()
    first |= {recipe.ema.begin} if recipe.ema else set()
    first |= {stop.ramp_until, *stop.budget} if stop else set()
    return sorted(epoch for epoch in first if 0 <= epoch < schedule.epochs)


def _steps(place: str, training: Any, epoch: int, count: int, losses: list[Any]) -> Values:
    for number, batch in zip(range(count), training.batches(epoch), strict=False):
        training.begin(epoch, number)
        losses.append(training.engine.step(batch))
        training.update_average(epoch)
        for name, value in losses[-1]._asdict().items():
            yield f"{place}, step {number}: {name}", value.item()
        yield from _state(f"{place}, step {number}", training)


def _state(place: str, training: Any) -> Values:
    for owner, network in training.networks.items():
        for name, value in network.state_dict().items():
            yield f"{place}: {owner} {name}", value
    for name, value in training.average.state_dict().items() if training.average else ():
        yield f"{place}: moving average {name}", value
    for number, state in training.engine.optimizer.state_dict()["state"].items():
        for name, value in state.items():
            yield f"{place}: {name} of parameter {number}", value


def script(kind: str, run: list[Any]) -> Values:
    """Every file that the script of another stage writes in the workspace; the logits of an evaluation."""
    evaluation = kind in ("attack", "autoattack")
    params = pin(run[0]) if evaluation else None
    sys.argv = [kind, *(str(part) for part in run if part is not None)]
    before = _written()
    if status := importlib.import_module(f"stages.{kind}").stage():
        sys.exit(f"stages.{kind} ended with {status}")
    for path in sorted(_written() - before):
        yield str(path), path.read_bytes()
    if evaluation:
        yield from logits(params, *run)


def logits(params: Any, setting: str, method: str, seed: int) -> Values:
    """Those of the first ``IMAGES`` test images by every stored network of a run, on the study's device."""
    import torch

    from dynat.data.splits import load, to_unit
    from dynat.networks.weights import load_network
    from dynat.runtime import machine

    device = machine.device_of(params.study[setting].machine, f"study.{setting}.machine")
    images = load(Path("data", f"{setting}.safetensors"), device).test_images[:IMAGES]
    for path in sorted(Path("models", setting, method, str(seed)).glob("*.safetensors")):
        network, _ = load_network(path, device)
        for first, batch in enumerate(images.split(BATCH)):
            with torch.no_grad():
                yield f"logits of {path.stem}, test images from {BATCH * first} on", network(to_unit(batch))


def _written() -> set[Path]:
    """The files below data, models and metrics but runs, which is what a machine says of itself."""
    paths = [
        path for folder in ("data", "models", "metrics") for path in Path(folder).rglob("*") if path.is_file()
    ]
    return {path for path in paths if path.parts[:2] != ("metrics", "runs")}


def _hash(value: Any) -> str:
    """SHA-256 of a tensor's or a file's bytes, or of a plain value's text."""
    if hasattr(value, "detach"):
        array = value.detach().cpu().contiguous().numpy()
        value = f"{array.dtype} {array.shape} ".encode() + array.tobytes()
    return hashlib.sha256(value if isinstance(value, bytes) else repr(value).encode()).hexdigest()


if __name__ == "__main__":
    main()
