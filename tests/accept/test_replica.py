"""What of an evaluation is compared beside its first images."""

import json
from pathlib import Path

import pytest
import torch

from dynat.accept import replica
from dynat.config.params import load
from dynat.data import splits
from dynat.data.sources import prepare
from dynat.networks.architectures import build
from dynat.networks.weights import load_network, save_weights


def test_the_logits_of_every_digit_by_every_stored_network_are_compared(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = load()
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("dynat.runtime.machine.device_of", lambda *asked: torch.device("cpu"))
    prepare(params.study["digits"].data, Path("data/digits.safetensors"))
    options = {"name": "cnn", "num_classes": 10, "in_channels": 1, "width": 4, "depth": 1}
    for name in ("target", "target.last", "guide"):
        weights = build(**options).state_dict()
        metadata = {"network": json.dumps(options), "epoch": "1", "precision": "fp32"}
        save_weights(Path(f"models/digits/dynat/0/{name}.safetensors"), weights, metadata)
    found = dict(replica.logits(params, "digits", "dynat", 0))
    x = splits.to_unit(splits.load(Path("data/digits.safetensors"), torch.device("cpu")).test_images)
    for name in ("target", "target.last", "guide"):
        own = torch.cat([value for key, value in found.items() if f"of {name}," in key])
        network, _ = load_network(Path(f"models/digits/dynat/0/{name}.safetensors"), torch.device("cpu"))
        torch.testing.assert_close(own, network(x).detach())
    assert sum(len(value) for value in found.values()) == 3 * len(x) == 1200
