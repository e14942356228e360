"""What the cluster is asked for: valid by the schema and by our own rules, and each known trap avoided."""

import copy
import json
import os
import re
import subprocess
import sys

import pytest
import yaml
from gke_jobs import IMAGE, pod, rendered, settings, spec_of
from kube_rules import amount, faults, restricted_pod, unknown_fields

from dpo_cli.data import jsonl
from dpo_cli.errors import UserError
from dpo_cli.jobs.backends import gke

KINDS = {
    "train on spot": ([], {}),
    "train": (["gke.spot=false"], {}),
    "train sft": ([], {"stage": "sft"}),
    "train on two cards": ([], {"gpus": 2}),
    "train on three nodes": ([], {"nodes": 3, "gpus": 2}),
    "train in a queue": (["gke.queue_name=team-a"], {}),
    "train in a compute class": (["gke.compute_class=gpus"], {}),
    "generate": ([], {"command": "generate"}),
    "judge": ([], {"command": "judge"}),
}


@pytest.fixture(autouse=True)
def folder(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return tmp_path


@pytest.mark.parametrize("kind", KINDS)
def test_a_real_server_would_take_it(kind):
    sets, given = KINDS[kind]
    for document in rendered(settings(*sets), **given):
        assert unknown_fields(document) is None
        assert faults(document) == []
        if document["kind"] == "Job":
            assert list(restricted_pod(document["spec"]["template"]["spec"])) == []


BREAKAGES = {
    "quantity": (lambda job: _limits(job).update(memory="24 GB"), "no quantity"),
    "GPU": (lambda job: _requests(job).update({"nvidia.com/gpu": "2"}), "must be requested as it is limited"),
    "name": (lambda job: job["metadata"].update(name="Nothing_DPO"), "metadata.name"),
    "long name": (lambda job: job["metadata"].update(name="a" * 63), "metadata.name"),
    "restart policy": (lambda job: _pod(job).update(restartPolicy="Always"), "restartPolicy"),
    "failure policy": (lambda job: _pod(job).update(restartPolicy="OnFailure"), "must be Never"),
    "volume": (lambda job: _pod(job)["volumes"].pop(), "no volume 'shared-memory'"),
    "container of a rule": (lambda job: _pod(job)["initContainers"].clear(), "no container 'wait-for-data'"),
    "root": (lambda job: _pod(job)["securityContext"].pop("runAsNonRoot"), "root"),
    "field": (lambda job: job["spec"].update(backofLimit=2), "backofLimit"),
}  # fmt: skip


@pytest.mark.parametrize("breakage", BREAKAGES)
def test_the_rules_see_what_is_wrong(breakage):
    breaks, message = BREAKAGES[breakage]
    job = copy.deepcopy(rendered(settings())[0])
    breaks(job)
    found = [*faults(job), *restricted_pod(_pod(job)), unknown_fields(job) or ""]
    assert any(message in fault for fault in found), found


def _pod(job):
    return job["spec"]["template"]["spec"]


def _limits(job):
    return _pod(job)["containers"][0]["resources"]["limits"]


def _requests(job):
    return _pod(job)["containers"][0]["resources"]["requests"]


def test_spot_is_asked_for_by_selector_not_by_toleration_alone():
    spot, reserved = pod(settings()), pod(settings("gke.spot=false"))
    assert spot["nodeSelector"] == {
        "cloud.google.com/gke-accelerator": "nvidia-l4", "cloud.google.com/gke-spot": "true",
    }  # fmt: skip
    assert any(one["key"] == "cloud.google.com/gke-spot" for one in spot["tolerations"])
    assert reserved["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    assert not any("spot" in one["key"] for one in reserved["tolerations"])
    assert spot["terminationGracePeriodSeconds"] <= 25 < reserved["terminationGracePeriodSeconds"]


def test_no_card_and_no_gpu_node_where_nothing_is_trained():
    for command in ("generate", "judge"):
        template = pod(settings(), command=command)
        assert not {"nodeSelector", "tolerations"} & set(template)
        assert "nvidia.com/gpu" not in template["containers"][0]["resources"]["limits"]


@pytest.mark.parametrize("gpu, name", [("L4", "nvidia-l4"), ("h100", "nvidia-h100-80gb"), ("nvidia-x", "nvidia-x")])
def test_a_card_has_the_name_that_gke_gives_it(gpu, name):
    template = pod(settings(f"gke.gpu={gpu}"), gpus=4)
    assert template["nodeSelector"]["cloud.google.com/gke-accelerator"] == name
    assert template["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == "4"
    with pytest.raises(UserError, match="no GPU 'L4O'"):
        rendered(settings("gke.gpu=L4O"))


def test_the_first_rule_forgives_preemption_and_the_others_end_the_job():
    for command in ("train", "judge"):
        spec = rendered(settings(), command=command)[0]["spec"]
        first, second, third, fourth = spec["podFailurePolicy"]["rules"]
        assert (first["action"], first["onPodConditions"][0]["type"]) == ("Ignore", "DisruptionTarget")
        # SIGTERM without a disruption, and a crash after a checkpoint was saved, go on for free.
        assert (second["action"], second["onExitCodes"]["values"]) == ("Ignore", [75, 143])
        # What no second try would mend: a crash that saved nothing, configuration, gates, budget.
        codes = {"containerName": command, "operator": "In", "values": [1, 2, 3, 4]}
        assert third == {"action": "FailJob", "onExitCodes": codes}
        assert fourth["action"] == "FailJob" and fourth["onExitCodes"]["containerName"] == "wait-for-data"
        assert spec["backoffLimit"] == 2
        assert spec["podReplacementPolicy"] == "Failed"
        assert spec["ttlSecondsAfterFinished"] == 604800
        assert spec["activeDeadlineSeconds"] >= 48 * 3600  # it counts the wait for a spot node
        assert spec["template"]["spec"]["restartPolicy"] == "Never"


def test_our_process_is_the_first_one_and_no_shell_stands_before_it():
    container = pod(settings())["containers"][0]
    assert container["command"] == ["python", "-m", "dpo_cli.jobs.worker"]
    assert "args" not in container


def test_the_wait_for_data_is_bounded():
    container = pod(settings("data=/vol/data/dpo"))["initContainers"][0]
    assert container["command"][:2] == ["timeout", "600"]
    assert "/vol/data/dpo/train.jsonl" in container["command"]
    assert "/vol/data/dpo/completions.jsonl" in pod(settings(), command="judge")["initContainers"][0]["command"]


def test_the_bucket_is_mounted_so_that_a_killed_process_loses_nothing():
    job = rendered(settings())[0]
    volume = next(one["csi"] for one in _pod(job)["volumes"] if "csi" in one)
    assert volume["driver"] == "gcsfuse.csi.storage.gke.io" and not volume.get("readOnly")
    options = volume["volumeAttributes"]["mountOptions"].split(",")
    user = _pod(job)["securityContext"]["runAsUser"]
    assert {"implicit-dirs", f"uid={user}", f"gid={user}", "metadata-cache:negative-ttl-secs:0"} <= set(options)
    assert "write:enable-streaming-writes:false" in options  # else fsync keeps nothing
    assert any(re.fullmatch(r"file-system:rename-dir-limit:\d+", option) for option in options)  # the adapter's folder
    annotations = job["spec"]["template"]["metadata"]["annotations"]
    assert annotations["gke-gcsfuse/volumes"] == "true"
    assert "0" not in annotations.values()  # no limit: refused on Autopilot's GPU nodes
    mounts = {mount["name"]: mount["mountPath"] for mount in _pod(job)["containers"][0]["volumeMounts"]}
    assert mounts["bucket"] == "/vol"


def test_caches_are_on_the_nodes_disk_and_shared_memory_is_within_the_memory():
    template = pod(settings())
    volumes = {volume["name"]: volume.get("emptyDir") for volume in template["volumes"]}
    container = template["containers"][0]
    environment = {one["name"]: one.get("value") for one in container["env"]}
    mounts = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    assert environment["HF_HOME"].startswith("/cache/") and volumes[mounts["/cache"]] == {"sizeLimit": "30Gi"}
    shared = volumes[mounts["/dev/shm"]]
    assert shared is not None and shared["medium"] == "Memory"
    limits = container["resources"]["limits"]
    assert amount(shared["sizeLimit"]) * 4 < amount(limits["memory"])
    assert amount("30Gi") <= amount(limits["ephemeral-storage"])  # else the pod is evicted for its cache


def test_a_mounted_file_is_synced_no_more_often_than_its_object_may_change():
    given = {one["name"]: one.get("value") for one in pod(settings(), command="judge")["containers"][0]["env"]}
    code = "from dpo_cli.data import jsonl; print(jsonl.SYNC_SECONDS)"
    seen = subprocess.run(
        [sys.executable, "-c", code], env=os.environ | {jsonl.SYNC: given[jsonl.SYNC]}, capture_output=True, text=True
    ).stdout
    assert 1 < float(seen) <= 10  # a pod that is killed without a word loses so much


SECRETS = {"HF_TOKEN": "hf-secret", "WANDB_API_KEY": "wandb-secret", "OPENAI_API_KEY": "openai-secret"}


def test_keys_come_by_reference_and_nothing_secret_is_sent(monkeypatch):
    for name in SECRETS:
        monkeypatch.setenv(name, f"value-of-{name}")
    wanted = {"train": {"HF_TOKEN", "WANDB_API_KEY"}, "generate": set(), "judge": {"OPENAI_API_KEY"}}
    for command, names in wanted.items():
        text = gke.render(spec_of(settings(), command), settings())
        assert "value-of-" not in text
        found = {
            one["name"]: one["valueFrom"]["secretKeyRef"]
            for one in pod(settings(), command=command)["containers"][0]["env"]
            if "valueFrom" in one
        }
        assert found == {name: {"name": SECRETS[name], "key": name} for name in names}
    assert not any("valueFrom" in one for one in pod(settings("gke.hf_secret=none", "gke.wandb_secret=none"))
                   ["containers"][0]["env"])  # fmt: skip


def test_the_spec_is_sent_without_this_machines_paths(folder):
    (folder / "data" / "dpo").mkdir(parents=True)
    (folder / "data" / "dpo" / "train.jsonl").write_text('{"prompt": "a", "chosen": "b", "rejected": "c"}\n')
    config = settings(f"runs={folder}/runs", f"model.dpo_adapter={folder}/out")
    text = gke.render(spec_of(config), config)
    assert str(folder) not in text
    sent = _sent(text)
    assert sent["config"]["data"].startswith("/vol/uploads/")
    assert sent["config"]["runs"] == "/vol/runs"


def _sent(text):
    environment = next(yaml.safe_load_all(text))["spec"]["template"]["spec"]["containers"][0]["env"]
    return json.loads(next(one["value"] for one in environment if one["name"] == "NOTHING_DPO_SPEC"))


def test_generate_samples_from_the_clusters_server_unless_another_is_named():
    config = settings()
    sent = _sent(gke.render(spec_of(config, "generate"), config))
    assert sent["config"]["generate"]["url"] == "http://nothing-gpt-serve:8000/v1"
    config = settings("generate.url=http://other:1/v1")
    assert _sent(gke.render(spec_of(config, "generate"), config))["config"]["generate"]["url"] == "http://other:1/v1"


def test_several_nodes_are_an_indexed_job_whose_first_pod_is_found_by_name():
    job, service = rendered(settings(), nodes=3, gpus=2)
    name = job["metadata"]["name"]
    assert (job["spec"]["completionMode"], job["spec"]["completions"], job["spec"]["parallelism"]) == ("Indexed", 3, 3)
    template = _pod(job)
    assert service["metadata"]["namespace"] == job["metadata"]["namespace"] == "default"
    assert template["subdomain"] == service["metadata"]["name"] == name
    assert service["spec"]["clusterIP"] == "None" and service["spec"]["publishNotReadyAddresses"] is True
    assert service["spec"]["selector"] == {"batch.kubernetes.io/job-name": name}
    environment = {one["name"]: one for one in template["containers"][0]["env"]}
    assert environment["MASTER_ADDR"]["value"] == f"{name}-0.{name}"
    rank = environment["NODE_RANK"]["valueFrom"]["fieldRef"]["fieldPath"]
    assert rank == "metadata.annotations['batch.kubernetes.io/job-completion-index']"
    assert len(rendered(settings())) == 1


def test_a_queue_starts_the_job_and_a_compute_class_chooses_the_node():
    job = rendered(settings("gke.queue_name=team-a"))[0]
    assert job["metadata"]["labels"]["kueue.x-k8s.io/queue-name"] == "team-a"
    assert job["spec"]["suspend"] is True
    assert "suspend" not in rendered(settings())[0]["spec"]
    assert pod(settings("gke.compute_class=gpus"))["nodeSelector"] == {"cloud.google.com/compute-class": "gpus"}


@pytest.mark.parametrize("image", [IMAGE.partition("@")[0], "host/nothing-dpo:latest", "host/nothing-dpo@sha256:12"])
def test_an_image_without_a_digest_is_refused(image):
    with pytest.raises(UserError, match="no digest") as refused:
        rendered(settings(f"gke.image={image}"))
    assert "gcloud artifacts docker images describe" in str(refused.value.hint)
    allowed = pod(settings(f"gke.image={image}", "gke.allow_tag=true"))
    assert allowed["containers"][0]["image"] == allowed["initContainers"][0]["image"] == image


@pytest.mark.parametrize("key", ["image", "bucket"])
def test_what_must_be_set_is_asked_for(key):
    with pytest.raises(UserError) as refused:
        rendered(settings(f"gke.{key}=none"))
    assert refused.value.where == f"gke.{key}" and refused.value.hint


def test_every_setting_changes_what_is_asked_for():
    changes = {
        "namespace": "team", "bucket": "other", "image": IMAGE.replace("0", "1"), "service_account": "other",
        "gpu": "T4", "spot": "false", "cpu": "7", "memory": "30Gi", "disk": "40Gi", "deadline_hours": "1",
        "queue_name": "q", "compute_class": "c", "hf_secret": "x", "wandb_secret": "x",
    }  # fmt: skip
    before = _without_hash(rendered(settings()))
    for key, value in changes.items():
        assert _without_hash(rendered(settings(f"gke.{key}={value}"))) != before, key


def _without_hash(documents):
    """Without the spec and its hash, in which every setting is."""
    for document in documents:
        document["metadata"].pop("annotations", None)
        container = _pod(document)["containers"][0]
        container["env"] = [one for one in container["env"] if one["name"] != "NOTHING_DPO_SPEC"]
    return documents


def test_names_are_the_clusters_and_no_two_runs_share_one():
    names = [rendered(settings(), name=name)[0]["metadata"]["name"] for name in ("dpo", "DPO", "d.po", "d" * 200)]
    assert names[0] == "nothing-dpo-train-dpo"
    assert len(set(names)) == 4


def test_what_is_printed_is_what_is_submitted():
    config = settings()
    spec = spec_of(config, nodes=2)
    assert list(yaml.safe_load_all(gke.render(spec, config))) == rendered(config, nodes=2)
