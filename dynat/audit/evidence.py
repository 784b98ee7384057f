"""What only the stored outputs can prove: a witness of every broken sample, attacks and steps repeated.

The one module of the audit that imports torch, and only when called: the CPU is pinned before.
"""

import random
import sys
from dataclasses import dataclass
from typing import TYPE_CHECKING

from dynat.audit.link import Link, absent, broken, good
from dynat.audit.printed import Printed, Source
from dynat.config.params import Study
from dynat.errors import UserError
from dynat.evaluation.verdicts import decode
from dynat.runtime import machine as environment
from dynat.runtime.files import read_csv, read_json

if TYPE_CHECKING:
    import torch
    from torch import Tensor, nn

FLOAT = 1e-6  # of the ball and of [0,1]
MARGIN = 1e-4  # of logits: other hardware rounds differently, and an attack stops as soon as it succeeds
SAMPLES = 20  # robust verdicts that are attacked again
REFUTED = 0.1  # the share of them that rounding does not explain
TOLERANCE = 1e-3  # relative, of a replayed loss on another kind of machine
FILES = {"best": "target.safetensors", "last": "target.last.safetensors"}


@dataclass
class Stored:
    """The network, images and evidence behind one source."""

    network: "nn.Module"
    images: "Tensor"  # uint8 [n,C,H,W]
    labels: "Tensor"  # int64 [n]
    robust: list[bool]  # [n]
    indices: "Tensor"  # int64 [b]
    adversarial: "Tensor"  # float32 [b,C,H,W]


def _device(study: Study) -> "torch.device":
    if "torch" not in sys.modules:
        environment.pin(study.machine)
    return environment.device_of(study.machine)


def _needed(shown: Printed, *names: str) -> None:
    missing = [name for name in names if not (shown.root / name).exists()]
    if missing:
        raise UserError(f"{', '.join(missing)} not here; run dvc repro, or dvc pull from your remote")


def _stored(shown: Printed, source: Source, device: "torch.device") -> Stored:
    import torch

    from dynat.data.splits import load
    from dynat.networks.weights import load_network, load_weights
    from dynat.runtime.files import sha256

    _, _, setting, method, name = source["file"].split("/")
    seed = name.removesuffix(".json")
    witness = source["verdicts"].replace(".verdicts.json", ".witness.safetensors")
    weights = f"models/{setting}/{method}/{seed}/{FILES[source['checkpoint']]}"
    _needed(shown, weights, f"data/{setting}.safetensors", witness)
    verdicts = read_json(shown.root, source["verdicts"]) or {}
    evidence = verdicts[source["checkpoint"]][source["attack"]]
    data = load(shown.root / f"data/{setting}.safetensors", device)
    network, _ = load_network(shown.root / weights, device)
    model = sha256(shown.root / weights.replace(".last.", "."))
    if model != (read_json(shown.root, source["file"]) or {}).get("model_sha256"):
        raise ValueError(f"{source['file']} is of other weights than {weights}")
    n = evidence["n"]
    images, labels = data.test_images[:n], data.test_labels[:n]
    state, _ = load_weights(shown.root / witness)
    base = f"{source['checkpoint']}/{source['attack']}"
    nothing = torch.zeros(0, dtype=torch.long), torch.zeros(0, *images.shape[1:])
    indices = state.get(f"{base}/indices", nothing[0])
    adversarial = state.get(f"{base}/images", nothing[1])
    robust = decode(evidence["robust"], n)
    return Stored(network, images, labels, robust, indices.to(device), adversarial.to(device))


def witness(shown: Printed, source: Source) -> list[Link]:
    """Every verdict of a source against the stored weights and adversarial images.

    Raises :class:`UserError` if weights, data or witness are not here or unreadable.
    """
    setting = source["file"].split("/")[2]
    study = shown.params.study[setting]
    device = _device(study)
    stored = _stored(shown, source, device)
    spec = study.autoattack if source["file"].startswith("metrics/autoattack/") else study.attack
    subject = f"witness {source['file'].removesuffix('.json')} {source['checkpoint']}/{source['attack']}"
    faults = _faults(stored, spec.epsilon)
    again = "run dvc repro -f of the attack, or restore witness and verdicts with dvc checkout"
    if faults:
        return [broken("evidence", subject, fault, again) for fault in faults]
    count, wrong = len(stored.indices), len(stored.robust) - sum(stored.robust) - len(stored.indices)
    text = (
        f"{count} of {count} adversarial images lie in the ball of {spec.epsilon:.6g} and in [0,1] and fool "
        f"the stored weights, which err on {wrong} clean ones"
    )
    links = [good("evidence", subject, text)]
    if source["attack"] != "clean" and any(stored.robust):
        links.append(_attack_again(stored, source, study))
    return links


def _faults(stored: Stored, epsilon: float) -> list[str]:
    import torch

    from dynat.data.splits import to_unit

    natural, n = to_unit(stored.images), len(stored.robust)
    if len(natural) != n:
        return [f"verdicts of {n} samples, but {len(natural)} test images"]
    robust = torch.tensor(stored.robust, device=natural.device)
    indices, adversarial = stored.indices, stored.adversarial
    if indices.numel() and (int(indices.min()) < 0 or int(indices.max()) >= n):
        return ["indices beyond the samples"]
    if adversarial.shape != (len(indices), *natural.shape[1:]) or len(indices.unique()) != len(indices):
        return ["indices and images do not fit together"]
    if not adversarial.isfinite().all():
        return ["an image is not finite"]
    with torch.no_grad():
        clean = _margins(stored.network, natural, stored.labels)
        broken_margins = _margins(stored.network, adversarial, stored.labels[indices])
    has_witness = torch.zeros(n, dtype=torch.bool, device=natural.device)
    has_witness[indices] = True
    distance = (
        (adversarial - natural[indices]).abs().flatten(1).amax(1) if len(indices) else natural[:0, 0, 0, 0]
    )
    counted = {
        f"adversarial images lie outside the ball of {epsilon:.6g}": distance > epsilon + FLOAT,
        "adversarial images leave [0,1]": ((adversarial < -FLOAT) | (adversarial > 1 + FLOAT))
        .flatten(1)
        .any(1),
        "adversarial images are classified right by the stored weights": broken_margins > MARGIN,
        "samples are called robust and have a witness": has_witness & robust,
        "samples are called broken without a witness": ~robust & ~has_witness & (clean > MARGIN),
        "samples are called robust, but err already when clean": robust & (clean < -MARGIN),
    }
    return [f"{int(flags.sum())} {what}" for what, flags in counted.items() if flags.any()]


def _margins(network: "nn.Module", images: "Tensor", labels: "Tensor") -> "Tensor":
    """Logit of the true class minus the largest other one, float [B]; negative where misclassified."""
    import torch

    parts = [torch.zeros(0, device=images.device)]
    for x, y in zip(images.split(500), labels.split(500), strict=True):
        if len(x):
            logits = network(x)
            true = logits.gather(1, y[:, None]).squeeze(1)
            others = logits.scatter(1, y[:, None], float("-inf")).amax(1)
            parts.append(true - others)
    return torch.cat(parts)


def _attack_again(stored: Stored, source: Source, study: Study) -> Link:
    """Repeat the attack on a few robust samples; for AutoAttack, whose draws depend on the batch, APGD."""
    import torch

    from dynat.data.splits import to_unit
    from dynat.evaluation import whitebox as evaluation
    from dynat.methods import attacks

    survivors = [index for index, robust in enumerate(stored.robust) if robust]
    chosen = torch.tensor(sorted(random.sample(survivors, min(SAMPLES, len(survivors)))))
    where = chosen.to(stored.images.device)
    x, y, name = to_unit(stored.images[where]), stored.labels[where], source["attack"]
    union = source["file"].startswith("metrics/autoattack/")
    spec = study.attack.model_copy(
        update={"epsilon": study.autoattack.epsilon, "seed": study.autoattack.seed} if union else {}
    )
    noise = evaluation.sample_noise(x, spec.seed, chosen)
    start = attacks.uniform_start(x, spec.epsilon, noise)
    if union or name == "apgd-ce":
        adversarial, what = evaluation.apgd(stored.network, x, y, noise, spec), "a fresh APGD-CE"
    elif name == "fgsm":
        loss = attacks.cross_entropy(y)
        adversarial = attacks.ascend(
            stored.network, loss, x, x, epsilon=spec.epsilon, step=spec.epsilon, steps=1
        )
        what = "FGSM again"
    else:
        objective = attacks.margin if name == "cw" else attacks.cross_entropy
        steps = spec.cw_steps if name == "cw" else int(name.removeprefix("pgd"))
        ((_, adversarial, _),) = evaluation.pgd(stored.network, x, y, start, spec, [steps], objective)
        what = f"{name} again from the same start"
    fallen = int((evaluation.predict(stored.network, adversarial) != y).sum())
    subject = f"robust {source['file'].removesuffix('.json')} {source['checkpoint']}/{name}"
    text = f"{len(x) - fallen} of {len(x)} random robust samples withstand {what}"
    if fallen > max(1, REFUTED * len(x)):
        return broken("evidence", subject, text, "their verdicts are wrong; run dvc repro -f of the attack")
    if fallen:
        return absent("evidence", subject, f"{text}; rounding or chance explains so few")
    return good("evidence", subject, text)


# --------------------------------------------------------------------------------------------------- replay


def replay(shown: Printed, run: str, steps: int) -> list[Link]:
    """The first training steps of ``run`` (``setting/method/seed``) against its recorded losses.

    Raises :class:`UserError` if data or ``trace.csv`` are not here.
    """
    setting, method, seed = run.split("/")
    trace = f"models/{run}/trace.csv"
    _needed(shown, trace, f"data/{setting}.safetensors")
    record = read_json(shown.root, f"metrics/runs/train/{run}.json") or {}
    if (processes := record.get("processes", 1)) > 1:  # each had batch statistics of its own
        return [
            absent("replay", f"replay {run}", f"not repeated: {processes} processes trained it, here is one")
        ]
    recorded = read_csv(shown.root, trace)[:steps]
    study = shown.params.study[setting]
    device = _device(study)
    now = _losses(shown, setting, method, int(seed), len(recorded))
    hardware = record.get("hardware", {})
    same = environment.fingerprint(device).items() <= hardware.items() and not study.train.compile
    gaps = [
        0.0 if float(row[name]) == value else abs(float(row[name]) - value) / max(abs(value), 1e-12)
        for row, values in zip(recorded, now, strict=True)
        for name, value in values.items()
    ]
    worst, subject = max(gaps, default=0.0), f"replay {run}"
    where = "compiled anew" if study.train.compile else "on another kind of machine"
    kind = "on the same kind of machine" if same else f"{where}, tolerance {TOLERANCE:g}"
    if not gaps or worst > (0 if same else TOLERANCE):
        text = f"the losses of the first {len(recorded)} steps differ by up to {worst:.2g} {kind}"
        advice = "these code, data, parameters and seed did not train it; run dvc repro -f of the training"
        return [broken("replay", subject, text, advice)]
    how = "to the bit" if not worst else f"within {worst:.2g}"
    return [
        good("replay", subject, f"the first {len(recorded)} steps give the recorded losses {how}, {kind}")
    ]


def _losses(shown: Printed, setting: str, method: str, seed: int, steps: int) -> list[dict[str, float]]:
    """Losses of the first steps of a training, as ``trace.csv`` names them."""
    from dynat.methods.setup import set_up
    from dynat.runtime.stage import Run

    training, _, _ = set_up(Run(setting, method, seed, shown.params))
    losses: list[dict[str, float]] = []
    for epoch in range(training.recipe.schedule.epochs):
        training.engine.set_epoch(epoch)
        for batch in training.batches(epoch):
            if len(losses) == steps:
                return losses
            done = training.engine.step(batch)
            losses.append({"target_loss": done.target_loss.item(), "guide_loss": done.guide_loss.item()})
    return losses
