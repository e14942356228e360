"""The configuration for another machine: Kubernetes, Modal, Compose. What a cluster would refuse is asserted."""

import ast
import importlib.util
import json
import shlex
from pathlib import Path

import kubernetes_validate
import pytest
import yaml
from adapters import base_model, save_adapter
from kube_rules import substituted

from dpo_cli.config.resolve import resolve
from dpo_cli.errors import UserError
from dpo_cli.stages import serve_config

CONTAINERS = ["k8s", "modal", "compose"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    folder = tmp_path_factory.mktemp("saved")
    base = base_model(folder / "models/base")
    save_adapter(folder / "adapters/sft", base)
    save_adapter(folder / "adapters/dpo", base, seed=1)
    return folder


@pytest.fixture
def work(saved, monkeypatch):
    monkeypatch.chdir(saved)
    return saved


def render(form, *sets):
    own = ["model.base=models/base", "model.adapter=adapters/sft", "model.dpo_adapter=adapters/dpo", "gke.bucket=shelf"]
    config = resolve(sets=[*own, *sets], environment={}).config
    return serve_config.render(serve_config.plan(config), config, form)


def app_of(text, folder):
    """The module that a Modal file is."""
    (folder / "serve_app.py").write_text(text)
    spec = importlib.util.spec_from_file_location("serve_app", folder / "serve_app.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def words(form, text, folder):
    """vLLM's command line as it will be run there."""
    if form == "modal":
        return app_of(text, folder).COMMAND
    if form == "compose":
        service = yaml.safe_load(text)["services"]["vllm"]
        assert "$" not in "".join(service["command"]).replace("$$", "")  # it would be a variable
        return [word.replace("$$", "$") for word in service["entrypoint"] + service["command"]]
    container = next(yaml.safe_load_all(text))["spec"]["template"]["spec"]["containers"][0]
    return [substituted(word, {}) for word in container["command"] + container["args"]]


@pytest.mark.parametrize("form", CONTAINERS)
def test_the_same_server_as_here_with_paths_below_vol_and_open_to_the_network(work, tmp_path, form):
    found = words(form, render(form, "model.name=it's $HOME"), tmp_path)
    assert found[:3] == ["vllm", "serve", "/vol/models/base"]
    modules = [json.loads(word) for word in found if word.startswith('{"name"')]
    assert modules == [
        {"name": "it's $HOME", "path": "/vol/adapters/sft", "base_model_name": "/vol/models/base"},
        {"name": "seinfeld-dpo", "path": "/vol/adapters/dpo", "base_model_name": "/vol/models/base"},
    ]
    assert found[found.index("--host") + 1] == "0.0.0.0"
    here = json.loads(render("json"))["arguments"]
    assert found[found.index("--max-lora-rank") + 1] == str(here["max-lora-rank"])


@pytest.mark.parametrize("form", CONTAINERS)
def test_a_base_on_the_hub_keeps_its_name_and_a_folder_outside_its_last_part(work, tmp_path, form, monkeypatch):
    monkeypatch.setenv("HF_HUB_CACHE", str(tmp_path))
    save_adapter(tmp_path / "x/mine", work / "models/base")
    file = tmp_path / "x/mine/adapter_config.json"
    file.write_text(json.dumps(json.loads(file.read_text()) | {"base_model_name_or_path": "tiny/base"}))
    sets = ["model.base=tiny/base", f"model.adapter={tmp_path}/x/mine", "model.dpo_adapter=nowhere"]
    found = words(form, render(form, *sets), tmp_path)
    assert found[2] == "tiny/base"
    assert '"path":"/vol/mine"' in found[-1]


@pytest.mark.parametrize("form", CONTAINERS)
def test_runtime_loading_reaches_the_server(work, tmp_path, form):
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" not in render(form)
    assert "VLLM_ALLOW_RUNTIME_LORA_UPDATING" in render(form, "serve.runtime_loading=true")


def test_kubernetes_takes_it_and_its_restricted_policy_does(work):
    deployment, service = yaml.safe_load_all(render("k8s"))
    for document in (deployment, service):
        kubernetes_validate.validate(document, "1.36", strict=True)
        assert document["metadata"]["name"] == "nothing-gpt-serve"  # where generate looks for it
    pod = deployment["spec"]["template"]["spec"]
    [container] = pod["containers"]
    assert pod["securityContext"]["runAsNonRoot"] and pod["securityContext"]["runAsUser"] > 0
    assert pod["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    assert container["securityContext"] == {"allowPrivilegeEscalation": False, "capabilities": {"drop": ["ALL"]}}
    assert not any("hostPath" in volume for volume in pod["volumes"])
    assert pod["nodeSelector"] == {"cloud.google.com/gke-accelerator": "nvidia-l4"}
    requests, limits = container["resources"]["requests"], container["resources"]["limits"]
    assert requests["nvidia.com/gpu"] == limits["nvidia.com/gpu"] == "1"
    assert ":latest" not in container["image"]


def test_the_parts_of_the_manifest_fit_each_other(work):
    deployment, service = yaml.safe_load_all(render("k8s"))
    pod = deployment["spec"]["template"]
    [container] = pod["spec"]["containers"]
    labels = pod["metadata"]["labels"]
    assert deployment["spec"]["selector"]["matchLabels"] == service["spec"]["selector"] == labels
    assert {mount["name"] for mount in container["volumeMounts"]} == {
        volume["name"] for volume in pod["spec"]["volumes"]
    }
    [port] = container["ports"]
    assert service["spec"]["ports"][0] == {"name": "http", "port": 8000, "targetPort": port["name"]}
    for probe in ("startupProbe", "readinessProbe", "livenessProbe"):
        assert container[probe]["httpGet"]["port"] == port["name"]
    startup = container["startupProbe"]["periodSeconds"] * container["startupProbe"]["failureThreshold"]
    assert startup < deployment["spec"]["progressDeadlineSeconds"]
    assert pod["metadata"]["annotations"]["gke-gcsfuse/volumes"] == "true"
    bucket = next(volume for volume in pod["spec"]["volumes"] if "csi" in volume)
    assert bucket["csi"]["volumeAttributes"]["bucketName"] == "shelf"


@pytest.mark.parametrize("form", CONTAINERS)
def test_no_secret_is_written_down(work, monkeypatch, form):
    monkeypatch.setenv("HF_TOKEN", "hf_very_secret")
    assert "hf_very_secret" not in render(form)


def test_without_a_bucket_the_setting_is_named(work):
    with pytest.raises(UserError) as caught:
        render("k8s", "gke.bucket=none")
    assert caught.value.where == "gke.bucket"


def test_modal_knows_the_app_by_what_it_asks_for(work, tmp_path):
    app = app_of(render("modal"), tmp_path)
    info = app.serve.info()
    assert app.app.name == "nothing-gpt-serve"
    assert (info.gpus, info.timeout) == ([("L4", 1)], 86400)
    assert set(info.volumes) == {"/vol", "/cache"}


def test_compose_mounts_what_is_here_where_it_is_looked_for(work):
    service = yaml.safe_load(render("compose", "serve.port=9000"))["services"]["vllm"]
    mounts = {volume["target"]: volume for volume in service["volumes"]}
    for there in ("models/base", "adapters/sft", "adapters/dpo"):
        assert mounts[f"/vol/{there}"]["source"] == str(work / there)
        assert mounts[f"/vol/{there}"]["read_only"]
    assert service["ports"] == ["127.0.0.1:9000:8000"]
    assert service["deploy"]["resources"]["reservations"]["devices"][0]["capabilities"] == ["gpu"]


def test_two_folders_of_one_name_outside_are_refused(work, tmp_path):
    for place in ("a", "b"):
        save_adapter(tmp_path / place / "same", work / "models/base")
    with pytest.raises(UserError, match="same name"):
        render("compose", f"model.adapter={tmp_path}/a/same", f"model.dpo_adapter={tmp_path}/b/same")


def test_no_secret_of_the_pod_is_served_as_a_name(work):
    """What Kubernetes makes of the args is what was meant, `$(HF_TOKEN)` in a name included."""
    deployment = yaml.safe_load(render("k8s", "model.dpo_name=x$(HF_TOKEN)$$y").split("---")[0])
    [container] = deployment["spec"]["template"]["spec"]["containers"]
    args = [substituted(word, {"HF_TOKEN": "hf-secret-value"}) for word in container["args"]]
    assert not any("hf-secret-value" in word for word in args)
    assert any('"name":"x$(HF_TOKEN)$$y"' in word.replace(" ", "") for word in args)


@pytest.mark.parametrize("form", ["cli", "json", "yaml", *CONTAINERS])
def test_each_format_says_how_to_try_the_new_adapter(work, form):
    own = ["model.base=models/base", "model.adapter=adapters/sft", "model.dpo_adapter=adapters/dpo", "gke.bucket=shelf"]
    config = resolve(sets=own, environment={}).config
    lines = serve_config.how_to_try(serve_config.plan(config), config, form)
    words = shlex.split(lines[-1])
    assert words[0] == "curl" and json.loads(words[words.index("-d") + 1])["model"] == "seinfeld-dpo"
    if form in ("k8s", "modal"):
        assert any(str(Path("models/base").absolute()) in line for line in lines[:-1]), "the base is on this machine"


def test_what_comes_from_settings_is_quoted_in_the_modal_app(work):
    text = render("modal", 'serve.image=vllm/vllm-openai:v0.32.0"+evil()+"', "modal.volume=o'clock")
    calls = [ast.unparse(node.func) for node in ast.walk(ast.parse(text)) if isinstance(node, ast.Call)]
    assert "evil" not in calls and "modal.Volume.from_name" in calls
