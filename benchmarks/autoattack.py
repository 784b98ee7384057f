"""AutoAttack: plain ``pyautoattack`` against this project's path, in one process, alternating.

Both attack the same images with the same weights and seed, in the same chunks (the package draws its random
numbers for a chunk), on as many cores: --threads of torch, which the project divides among its --workers.
The plain run is that of the package's own example: the network as it is loaded, in eval mode, not frozen,
contiguous, with PyTorch's defaults, so on CUDA with TF32 in convolutions. Every success that the project
claims is checked again.

    python -m benchmarks.autoattack                                  # the digits network of the repository
    python -m benchmarks.autoattack --network resnet18-narrow --n 8  # sizes of CIFAR-10, random weights
    python -m benchmarks.autoattack --setting cifar10_resnet18 --device cuda --precision bf16 --n 1000
"""

import argparse
import copy
import os
import statistics
import time
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import TYPE_CHECKING, Any

from dynat.config.attack import AutoAttack
from dynat.config.params import Machine, Study, load
from dynat.runtime import machine as environment
from dynat.runtime.record import circumstances

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

    from dynat.evaluation.evidence import Evidence

NETWORKS: dict[str, dict[str, Any]] = {  # with random weights, as large as those of CIFAR-10
    "resnet18": {"name": "resnet"},
    "resnet18-narrow": {"name": "resnet", "width": 16},  # a sixteenth of the multiply-adds
    "preact_resnet18-narrow": {"name": "preact_resnet", "width": 16},
    "wrn34_10": {"name": "wrn", "depth": 34, "widen": 10},
}


@dataclass(frozen=True)
class Case:
    """What both runs attack."""

    network: "nn.Module"
    images: "Tensor"  # uint8 [n,C,H,W]
    labels: "Tensor"  # int64 [n]
    spec: AutoAttack
    cores: int


def main(arguments: Sequence[str] | None = None) -> None:
    """Print the seconds of both runs, their ratio with its spread, and the verdicts that differ."""
    options = _options(arguments)
    study = load().study[options.setting]
    spec = study.autoattack.model_copy(
        update={"precision": options.precision or study.autoattack.precision}
        | {"epsilon": options.epsilon or study.autoattack.epsilon}
        | {"batch": options.batch or study.autoattack.batch, "workers": options.workers}
    )
    machine = Machine(device=options.device or study.machine.device, instructions=study.machine.instructions)
    environment.pin(machine)
    device = environment.device_of(machine, "machine")
    case = _case(options, study, spec, device)
    print(_title(options, case, device))
    ratios = []
    for _ in range(options.rounds):
        start = _now(device)
        expected = plain(case)
        between = _now(device)
        found = project(case)
        seconds = between - start, _now(device) - between
        ratios.append(seconds[0] / seconds[1])
        differing = int((found.robust != expected).sum())
        print(
            f"plain {seconds[0]:.1f} s  project {seconds[1]:.1f} s  ratio {ratios[-1]:.2f}  robust "
            f"{int(expected.sum())} and {int(found.robust.sum())} of {len(expected)}  verdicts that differ "
            f"{differing}  false successes {false_successes(case, found)}",
            flush=True,
        )
    spread = f"{min(ratios):.2f} to {max(ratios):.2f} in {len(ratios)} rounds"
    print(f"ratio {statistics.median(ratios):.2f} (median; {spread})")


def plain(case: Case) -> "Tensor":
    """The package's verdicts, bool [n]: robust samples."""
    import torch
    from pyautoattack import AutoAttack as Package

    from dynat.data.splits import to_unit

    torch.set_num_threads(case.cores)
    network = copy.deepcopy(case.network).requires_grad_(True).to(memory_format=torch.contiguous_format)
    spec = case.spec
    package = Package(network, eps=spec.epsilon, seed=spec.seed, device=case.images.device)
    robust = []
    torch.set_deterministic_debug_mode("default")
    with environment.convolutions(environment.precision_of("auto", case.images.device)):
        for first in range(0, len(case.images), spec.batch):
            x, y = to_unit(case.images[first : first + spec.batch]), case.labels[first : first + spec.batch]
            _, predicted = package.run_standard_evaluation(x, y, batch_size=spec.batch)
            robust.append(predicted == y)
    torch.set_deterministic_debug_mode("error")
    return torch.cat(robust)


def project(case: Case) -> "Evidence":
    """The project's evidence after the last attack."""
    import torch

    from dynat.evaluation.autoattack import STANDARD, evaluate
    from dynat.evaluation.chunks import Chunks

    on_processes = case.images.device.type == "cpu" and case.spec.workers > 1
    torch.set_num_threads(max(1, case.cores // case.spec.workers) if on_processes else case.cores)
    with TemporaryDirectory() as folder:

        def keep(name: str, chunk: dict[str, Any]) -> None:  # files, as the stage keeps them
            torch.save(chunk, Path(folder, name))

        def kept(name: str) -> dict[str, Any] | None:
            path = Path(folder, name)
            return torch.load(path, weights_only=True) if path.exists() else None

        chunks = Chunks(kept, keep, shared=True)
        found, _ = evaluate(case.network, case.images, case.labels, case.spec, chunks)
    return found[STANDARD[-1]]


def false_successes(case: Case, found: "Evidence") -> int:
    """Images of the evidence outside the ball, outside [0,1], or classified rightly by the network."""
    from dynat.data.splits import to_unit
    from dynat.evaluation.evidence import predict

    x, y = to_unit(case.images)[found.indices], case.labels[found.indices]
    far = (found.images - x).abs().flatten(1).amax(1) > case.spec.epsilon + 1e-6
    outside = (found.images.flatten(1).amin(1) < 0) | (found.images.flatten(1).amax(1) > 1)
    wrong = 0
    for first in range(0, len(x), case.spec.batch):
        part = slice(first, first + case.spec.batch)
        right = predict(case.network, found.images[part]) == y[part]
        wrong += int((right | far[part] | outside[part]).sum())
    return wrong


def _case(options: argparse.Namespace, study: Study, spec: AutoAttack, device: "torch.device") -> Case:
    import torch

    from dynat.data import splits as data
    from dynat.networks import architectures as networks
    from dynat.networks.weights import load_network

    cores = options.threads or study.machine.threads or os.cpu_count() or 1
    if options.network is None:
        files = options.weights or Path("models", options.setting, "dynat", "0", "target.safetensors")
        network, _ = load_network(files, device)
        stored = data.load(options.data or Path("data", f"{options.setting}.safetensors"), device)
        count = options.n or max(spec.n)
        return Case(network, stored.test_images[:count], stored.test_labels[:count], spec, cores)
    torch.manual_seed(0)
    network = networks.build(num_classes=10, **NETWORKS[options.network])
    images = torch.randint(0, 256, (options.n or 8, 3, 32, 32), dtype=torch.uint8)
    with torch.no_grad():
        network.train()(torch.rand(64, 3, 32, 32))  # batch-norm statistics of such noise
        labels = network.eval().requires_grad_(False)(images / 255).argmax(1)
    network = network.to(device).to(memory_format=torch.channels_last)
    return Case(network, images.to(device), labels.to(device), spec, cores)


def _title(options: argparse.Namespace, case: Case, device: "torch.device") -> str:
    known = circumstances(device)
    hardware, versions = known["hardware"], known["versions"]
    what = f"{options.network}, random weights" if options.network else f"{options.setting}"
    where = hardware["processor"] if device.type == "cpu" else hardware["accelerator"]
    workers = f"workers {case.spec.workers}, " if device.type == "cpu" else ""
    return (
        f"{what}: n {len(case.images)}, epsilon {case.spec.epsilon:.4g}, chunks of {case.spec.batch}, "
        f"{workers}{case.spec.precision}\n{where}, threads {case.cores}, {hardware['cpu']}, "
        f"torch {versions['torch']}, pyautoattack {versions['pyautoattack']}"
    )


def _now(device: "torch.device") -> float:
    import torch

    if device.type == "cuda":
        torch.cuda.synchronize(device)
    return time.perf_counter()


def _options(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--setting", default="digits", help="study of params.yaml: attack, machine, files")
    parser.add_argument("--weights", type=Path, help="default: models/<setting>/dynat/0/target.safetensors")
    parser.add_argument("--data", type=Path, help="default: data/<setting>.safetensors")
    parser.add_argument("--network", choices=NETWORKS, help="random weights and images instead of files")
    parser.add_argument("--n", type=int, help="images; default: the study's, 8 with --network")
    parser.add_argument("--epsilon", type=float, help="default: the study's")
    parser.add_argument("--batch", type=int, help="size of a chunk; default: the study's")
    parser.add_argument("--threads", type=int, help="of either run; default: the study's, or all cores")
    parser.add_argument("--workers", type=int, default=1, help="processes of the project on a CPU")
    parser.add_argument("--device", choices=("auto", "cpu", "cuda"), help="default: the study's")
    parser.add_argument(
        "--precision", choices=("fp32", "tf32", "bf16"), help="of the project; default: the study's"
    )
    parser.add_argument("--rounds", type=int, default=3, help="alternations")
    return parser.parse_args(arguments)


if __name__ == "__main__":
    main()
