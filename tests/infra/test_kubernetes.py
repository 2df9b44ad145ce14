"""The claims that infra/README.md makes of the Kubernetes manifests, and that what they name exists."""

import json
import re
from pathlib import Path
from typing import Any

import pytest
import yaml

FOLDER = Path(__file__).parents[2] / "infra" / "kubernetes"
KUSTOMIZATION = yaml.safe_load((FOLDER / "kustomization.yaml").read_text())
RESOURCES: list[dict[str, Any]] = [
    resource for file in KUSTOMIZATION["resources"] for resource in yaml.safe_load_all((FOLDER / file).read_text())
]
TEMPLATE = json.loads((FOLDER / "base-job-template.json").read_text())
README = (FOLDER.parent / "README.md").read_text()


def _of(kind: str) -> list[dict[str, Any]]:
    return [each for each in RESOURCES if each["kind"] == kind]


def _pods() -> dict[str, dict[str, Any]]:
    """Pod templates by name: of Deployments, of Ray's groups, and of a flow run."""
    pods = {each["metadata"]["name"]: each["spec"]["template"] for each in _of("Deployment")}
    spec = _of("RayCluster")[0]["spec"]
    pods["ray-head"] = spec["headGroupSpec"]["template"]
    pods |= {f"ray-{group['groupName']}": group["template"] for group in spec["workerGroupSpecs"]}
    pods["flow-run"] = TEMPLATE["job_configuration"]["job_manifest"]["spec"]["template"]
    return pods


PODS = _pods()
each_pod = pytest.mark.parametrize("name", PODS)


@each_pod
def test_pods_are_confined(name: str) -> None:
    spec = PODS[name]["spec"]
    assert spec["securityContext"]["runAsNonRoot"] is True
    assert spec["securityContext"]["seccompProfile"] == {"type": "RuntimeDefault"}
    for container in spec["containers"]:
        context = container["securityContext"]
        assert context["allowPrivilegeEscalation"] is False
        assert context["readOnlyRootFilesystem"] is True
        assert context["capabilities"] == {"drop": ["ALL"]}
        assert {"cpu", "memory"} <= container["resources"]["requests"].keys()
        assert "memory" in container["resources"]["limits"]
        mounted = {mount["name"] for mount in container["volumeMounts"]}
        assert mounted == {volume["name"] for volume in spec["volumes"]}
    # Only the worker talks to Kubernetes.
    assert (spec.get("serviceAccountName") == "prefect-worker") != (spec.get("automountServiceAccountToken") is False)


@each_pod
def test_what_a_pod_names_is_made_or_documented(name: str) -> None:
    configs = {each["name"] for each in KUSTOMIZATION["configMapGenerator"]}
    text = json.dumps(PODS[name])
    assert set(re.findall(r'"configMap(?:Ref)?": {"name": "([\w-]+)"', text)) <= configs
    secrets = set(re.findall(r'"secret(?:Key)?Ref": {"name": "([\w-]+)"', text))
    assert all(f"create secret generic {secret} " in README for secret in secrets)


def test_no_secret_is_contained() -> None:
    assert not _of("Secret")
    for config in KUSTOMIZATION["configMapGenerator"]:
        for literal in config.get("literals", []):
            assert not re.search(r"PASSWORD|SECRET|TOKEN|AUTH_STRING|ACCESS_KEY", literal)


def test_selectors_match_the_labels_of_pods() -> None:
    labels = {name: pod["metadata"]["labels"] for name, pod in PODS.items()}
    for deployment in _of("Deployment"):
        assert deployment["spec"]["selector"]["matchLabels"] == labels[deployment["metadata"]["name"]]
    for service in _of("Service"):
        pod = PODS[service["metadata"]["name"]]
        assert service["spec"]["selector"] == pod["metadata"]["labels"]
        ports = {port["name"] for port in pod["spec"]["containers"][0]["ports"]}
        assert {port["targetPort"] for port in service["spec"]["ports"]} <= ports


def _selects(selector: dict[str, Any], app: str) -> bool:
    values = [selector.get("matchLabels", {}).get("app")]
    values += [value for each in selector.get("matchExpressions", []) for value in each["values"]]
    return app in values


def test_network_policies_deny_all_and_then_open_what_each_pod_needs() -> None:
    policies = {each["metadata"]["name"]: each["spec"] for each in _of("NetworkPolicy")}
    assert policies["deny-all"] == {"podSelector": {}, "policyTypes": ["Ingress", "Egress"]}
    apps = {pod["metadata"]["labels"]["app"] for pod in PODS.values()}
    for app in apps:
        assert any(_selects(spec["podSelector"], app) for spec in policies.values())
    named = set(re.findall(r'"app": "([\w-]+)"', json.dumps(policies)))
    for values in re.findall(r'"key": "app", "operator": "In", "values": (\[.*?\])', json.dumps(policies)):
        named |= set(json.loads(values))
    assert named == apps


def test_ray_asks_for_its_token_and_its_nodes_run_the_installed_version() -> None:
    from importlib.metadata import version

    spec = _of("RayCluster")[0]["spec"]
    assert spec["authOptions"] == {"mode": "token", "secretName": "imagerag-ray"}
    assert spec["rayVersion"] == version("ray")
    gpu = next(group for group in spec["workerGroupSpecs"] if group["groupName"] == "gpu")["template"]["spec"]
    assert gpu["nodeSelector"]
    assert gpu["tolerations"][0]["key"] == "nvidia.com/gpu"
    assert gpu["containers"][0]["resources"]["limits"]["nvidia.com/gpu"] == 1


def test_the_example_job_selects_the_cluster() -> None:
    job = yaml.safe_load((FOLDER / "ray-job.yaml").read_text())
    assert job["spec"]["clusterSelector"] == {"ray.io/cluster": _of("RayCluster")[0]["metadata"]["name"]}


def test_prefects_worker_makes_a_job_of_the_template() -> None:
    from prefect.client.schemas.objects import FlowRun
    from prefect.utilities.templating import apply_values
    from prefect_kubernetes.worker import KubernetesWorkerJobConfiguration

    properties = TEMPLATE["variables"]["properties"]
    values = {name: each["default"] for name, each in properties.items() if "default" in each} | {"env": {"A": "1"}}
    configuration = KubernetesWorkerJobConfiguration(**apply_values(TEMPLATE["job_configuration"], values))
    configuration.prepare_for_flow_run(FlowRun(flow_id="00000000-0000-4000-8000-000000000000", name="run"))
    job = configuration.job_manifest
    container = job["spec"]["template"]["spec"]["containers"][0]
    assert container["command"] == ["/app/infra/docker/with-ray"]
    assert container["args"] == ["prefect", "flow-run", "execute"]
    env = {each["name"]: each for each in container["env"]}
    assert env["A"]["value"] == "1"
    assert env["RAY_AUTH_TOKEN"]["valueFrom"]["secretKeyRef"]["name"] == "imagerag-ray"
    assert job["metadata"]["namespace"] == "imagerag"
    assert "{{" not in json.dumps(job)
