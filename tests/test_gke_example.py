"""The example's image, which nothing here can build, and its settings."""

import re
import tomllib
from pathlib import Path

import yaml
from gke_jobs import spec_of
from kube_rules import faults

from dpo_cli.config.resolve import resolve
from dpo_cli.jobs.backends import gke
from dpo_cli.jobs.backends._gke_render import USER

ROOT = Path(__file__).parents[1]
DOCKERFILE = ROOT / "examples" / "gke" / "Dockerfile"
PROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]


def instructions():
    """(instruction, rest) of each line that is one, continued lines joined."""
    text = DOCKERFILE.read_text().replace("\\\n", " ")
    lines = [line.strip() for line in text.splitlines() if line.strip() and not line.startswith("#")]
    return [(line.partition(" ")[0], line.partition(" ")[2]) for line in lines]


def all_of(kind):
    return [rest for name, rest in instructions() if name == kind]


def test_what_the_image_is_made_of_is_there_and_pinned():
    assert all_of("FROM") == ["${BASE} AS light"], "by digest, which build.sh finds"
    script = DOCKERFILE.with_name("build.sh").read_text()
    version = re.search(r"python:3\.(\d+)-slim-\w+", script)
    oldest = re.fullmatch(r">=3\.(\d+)", PROJECT["requires-python"])
    assert version and oldest and int(version[1]) >= int(oldest[1])
    assert "BASE=$python@$digest" in script
    ignored = (ROOT / ".dockerignore").read_text().split()
    for copy in all_of("COPY"):
        for source in copy.replace("${LOCK}", "train").split()[:-1]:
            assert (ROOT / source).exists(), source
            assert f"!{source.partition('/')[0]}" in ignored, f"{source} would not be sent to the builder"
    assert not all_of("ADD")
    installs = [command for command in all_of("RUN") if "pip install" in command]
    assert "--require-hashes" in installs[0] and all("--no-deps" in command for command in installs)
    assert {lock.stem for lock in (ROOT / "dpo_cli/jobs/locks").glob("*.txt")} == set(
        re.search(r"for lock in ([\w ]+);", script)[1].split()
    )


def test_the_image_runs_as_the_job_expects_and_holds_no_secret():
    assert all_of("USER") == [f"{USER}:{USER}"]
    names = [name for name, _ in instructions()]
    assert names.index("USER") > max(at for at, name in enumerate(names) if name in ("RUN", "COPY"))
    config = resolve(file=DOCKERFILE.with_name("nothing-dpo.toml"), environment={}).config
    job = next(yaml.safe_load_all(gke.render(spec_of(config), config)))
    assert faults(job) == []
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert all_of("CMD") == [str(container["command"]).replace("'", '"')]
    assert not re.search(r"TOKEN|API_KEY|PASSWORD", DOCKERFILE.read_text())
    assert not any(one["name"] == "WANDB_API_KEY" for one in container["env"])


def test_the_examples_settings_name_no_unknown_one():
    text = DOCKERFILE.with_name("nothing-dpo.toml").read_text()
    commented = re.findall(r'^# (\w+) = ("[^"]*")', text, re.MULTILINE)
    assert len(commented) >= 5
    sets = [f"gke.{key}={value}" for key, value in commented]
    assert resolve(sets=sets, environment={}).config.gke.queue_name == "team-queue"
