"""The scripts and the manifest of docs/cluster.md, as far as a machine without SLURM and Kubernetes can tell.

No schema is at hand: the manifest's fields are held against those that KubeRay's documentation names for a
RayJob of ``ray.io/v1``, and against the fleet's own command line.
"""

import re
import shlex
import subprocess
from pathlib import Path
from typing import Any

import pytest
import yaml

from dynat.fleet.__main__ import _options

PAGE = (Path(__file__).parents[2] / "docs/cluster.md").read_text(encoding="utf-8")
BLOCKS = re.findall(r"^```(\w*)\n(.*?)^```", PAGE, re.MULTILINE | re.DOTALL)
SCRIPTS = [text for _, text in BLOCKS if text.startswith("#!")]
COMMANDS = re.findall(r"python -m dynat\.fleet ?([^`\n\[]*)", PAGE)
SPEC = {"entrypoint", "shutdownAfterJobFinishes", "rayClusterSpec"}
WORKERS = {"groupName", "replicas", "minReplicas", "maxReplicas", "rayStartParams", "template"}


def test_there_are_two_scripts_of_slurm() -> None:
    assert len(SCRIPTS) == 2


@pytest.mark.parametrize("text", SCRIPTS)
def test_a_script_is_sound_shell_and_its_directives_stand_before_its_commands(text: str) -> None:
    done = subprocess.run(["bash", "-n"], input=text, capture_output=True, text=True)
    assert (done.returncode, done.stderr) == (0, "")
    head, *lines = text.splitlines()
    assert head == "#!/bin/bash"
    directives = [line.startswith("#SBATCH ") for line in lines]
    assert sorted(directives, reverse=True) == directives  # sbatch reads none after the first command


@pytest.mark.parametrize("arguments", COMMANDS)
def test_the_fleet_has_the_options_that_it_is_called_with(arguments: str) -> None:
    words = shlex.split(arguments.replace('"', ""))
    assert _options(words).targets == []


def manifest() -> dict[str, Any]:
    (text,) = [text for kind, text in BLOCKS if kind == "yaml"]
    return dict(yaml.safe_load(text))


def test_the_manifest_is_a_ray_job_with_the_fields_that_it_needs_and_no_other() -> None:
    job = manifest()
    assert job.keys() == {"apiVersion", "kind", "metadata", "spec"}
    assert (job["apiVersion"], job["kind"]) == ("ray.io/v1", "RayJob")
    assert re.fullmatch("[a-z0-9]([-a-z0-9]*[a-z0-9])?", job["metadata"]["name"])
    assert job["spec"].keys() == SPEC
    cluster = job["spec"]["rayClusterSpec"]
    assert cluster.keys() == {"headGroupSpec", "workerGroupSpecs"}
    assert cluster["headGroupSpec"].keys() == {"rayStartParams", "template"}
    for group in cluster["workerGroupSpecs"]:
        assert group.keys() == WORKERS
        assert group["minReplicas"] <= group["replicas"] <= group["maxReplicas"]
    for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"]):
        assert all(isinstance(value, str) for value in group["rayStartParams"].values())


def test_all_pods_mount_the_repository_under_one_path_and_start_there() -> None:
    cluster = manifest()["spec"]["rayClusterSpec"]
    pods = [group["template"]["spec"] for group in (cluster["headGroupSpec"], *cluster["workerGroupSpecs"])]
    for pod in pods:
        assert pod.keys() == {"containers", "volumes"}
        (container,), (volume,) = pod["containers"], pod["volumes"]
        mount = {"name": volume["name"], "mountPath": container["workingDir"]}
        assert container["volumeMounts"] == [mount]
        assert all(isinstance(each["value"], str) for each in container["env"])
    assert (
        len(
            {str((p["volumes"], p["containers"][0]["workingDir"], p["containers"][0]["image"])) for p in pods}
        )
        == 1
    )
    assert f"cd {pods[0]['containers'][0]['workingDir']} && " in manifest()["spec"]["entrypoint"]
