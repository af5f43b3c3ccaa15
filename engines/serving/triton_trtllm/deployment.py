"""How to start Triton on a repository for a TensorRT-LLM engine: launch.sh, docker compose, Kubernetes, and the README beside them.

TensorRT-LLM's ranks are processes of one MPI job: the first one serves, the others load the engine alone. Source:
launch_triton_server.py of TensorRT-LLM's triton_backend.
"""

from __future__ import annotations

from medusa_export.engines.serving.triton_trtllm.configs import BLS, ENGINE, ENSEMBLE, MOUNT, EngineFacts, TrtllmServing

LAUNCH = r"""#!/usr/bin/env bash
# Starts Triton on this repository, in {container}: bash launch.sh [further flags].
# On loopback; HOST=0.0.0.0 lets others in, as a container's own loopback is closed to all. {ranks}
set -euo pipefail
models="${{MODELS:-{mount}}}"
if [ "$models" != {mount} ]; then
  echo "error: got the repository at $models; expected {mount}, which its configurations name" >&2
  exit 2
fi
command -v tritonserver >/dev/null || {{
  echo "error: tritonserver: got no such program; expected {container}; run it there" >&2
  exit 2
}}
# Triton recurses through an HTTP body: with the usual stack of 8 MB, one of 4 MB ends the server.
ulimit -s 262144 2>/dev/null || echo "warning: the stack stays at $(ulimit -s) KB: keep large bodies away from this server" >&2
shared=(--model-repository "$models" --disable-auto-complete-config --exit-timeout-secs 30)
host="${{HOST:-127.0.0.1}}"
first=("${{shared[@]}}" --http-address "$host" --http-port "${{HTTP_PORT:-8000}}"
  --grpc-address "$host" --grpc-port "${{GRPC_PORT:-8001}}"
  --metrics-address "$host" --metrics-port "${{METRICS_PORT:-8002}}" --backend-config python,shm-region-prefix-name=medusa0_)
{start}
"""
ONE_RANK = 'exec tritonserver "${first[@]}" "$@"'
MANY_RANKS = r"""job=(mpirun --allow-run-as-root -n 1 tritonserver "${{first[@]}}" "$@")
for rank in $(seq 1 {last}); do
  job+=(: -n 1 tritonserver "${{shared[@]}}" --model-control-mode explicit --load-model {engine} --allow-http false --allow-grpc false
    --allow-metrics false --backend-config "python,shm-region-prefix-name=medusa${{rank}}_")
done
exec "${{job[@]}}"
"""
COMPOSE = """# docker compose up; the ports are on this machine alone.
services:
  medusa:
    image: {container}
    command: ["bash", "{mount}/launch.sh"]
    volumes: [".:{mount}:ro"]
    environment: {{PYTHONDONTWRITEBYTECODE: "1", HOST: 0.0.0.0}}
    ports: ["127.0.0.1:8000:8000", "127.0.0.1:8001:8001", "127.0.0.1:8002:8002"]
    shm_size: {shm}gb
    ulimits: {{memlock: -1, stack: 268435456}}
    stop_grace_period: 45s
    deploy:
      resources:
        reservations:
          devices: [{{driver: nvidia, count: {tp}, capabilities: [gpu]}}]
    healthcheck:
      test: ["CMD", "curl", "-sf", "http://127.0.0.1:8000/v2/health/ready"]
      interval: 10s
      start_period: 10m
"""
KUBERNETES = """# kubectl apply -f kubernetes.yaml; this directory lies on the volume that the claim names.
apiVersion: apps/v1
kind: Deployment
metadata: {{name: medusa}}
spec:
  replicas: 1
  selector: {{matchLabels: {{app: medusa}}}}
  template:
    metadata: {{labels: {{app: medusa}}}}
    spec:
      terminationGracePeriodSeconds: 45
      containers:
        - name: tritonserver
          image: {container}
          command: ["bash", "{mount}/launch.sh"]
          env: [{{name: PYTHONDONTWRITEBYTECODE, value: "1"}}, {{name: HOST, value: 0.0.0.0}}]
          ports:
            - {{name: http, containerPort: 8000}}
            - {{name: grpc, containerPort: 8001}}
            - {{name: metrics, containerPort: 8002}}
          resources: {{limits: {{nvidia.com/gpu: {tp}}}}}
          startupProbe: {{httpGet: {{path: /v2/health/ready, port: http}}, periodSeconds: 10, failureThreshold: 90}}
          readinessProbe: {{httpGet: {{path: /v2/health/ready, port: http}}, periodSeconds: 5}}
          livenessProbe: {{httpGet: {{path: /v2/health/live, port: http}}, periodSeconds: 10}}
          volumeMounts:
            - {{name: models, mountPath: {mount}, readOnly: true}}
            - {{name: shm, mountPath: /dev/shm}}
      volumes:
        - {{name: models, persistentVolumeClaim: {{claimName: medusa-models}}}}
        - {{name: shm, emptyDir: {{medium: Memory, sizeLimit: {shm}Gi}}}}
---
apiVersion: v1
kind: Service
metadata: {{name: medusa}}
spec:
  selector: {{app: medusa}}
  ports:
    - {{name: http, port: 8000, targetPort: http}}
    - {{name: grpc, port: 8001, targetPort: grpc}}
    - {{name: metrics, port: 8002, targetPort: metrics}}
"""
README = """# A TensorRT-LLM engine with Medusa, for Triton

Engine of TensorRT-LLM {release}, {tp} GPU{s}, a tree of {draft} draft tokens; {container} runs it, and
needs nothing else. The engine runs on the kind of GPU that it was built on, and with this release, only.

    docker run --rm --gpus {gpus} --shm-size {shm}g --ulimit memlock=-1 --ulimit stack=268435456 -e HOST=0.0.0.0 \\
      -p 127.0.0.1:8000:8000 -p 127.0.0.1:8001:8001 -p 127.0.0.1:8002:8002 \\
      -v "$PWD:{mount}:ro" {container} bash {mount}/launch.sh

`docker compose up` does the same, also for this machine alone, and kubernetes.yaml is a start for a cluster. The repository has to
be mounted at `{mount}`: its configurations name that path.{ranks}

    curl -s 127.0.0.1:8000/v2/models/{bls}/generate \\
      -d '{{"text_input": "Why is the sky blue?", "max_tokens": 128}}'
    curl -s 127.0.0.1:8000/v2/models/{bls}/generate_stream \\
      -d '{{"text_input": "Why is the sky blue?", "max_tokens": 128, "stream": true}}'

| model | for |
|---|---|
| `{bls}` | text in and out: whole characters, stop words of any form, counts of tokens, engine steps{counts} |
| `{ensemble}` | the same without Python between the steps: what streams is decoded response by response |
| `{engine}` | token ids in and out, on the engine itself |

Inputs: `text_input`, `max_tokens`, and as you like `system`, `stop_words` (a list), `chat` (false: no chat template), `stream`.
Medusa accepts greedily, so there is no temperature. Tokens a step are `completion_tokens / engine_steps` of a streamed answer:
about 1 means that the heads are not used.

Written by medusa-export; what of it ran and what did not is in its docs/tensorrt-llm.md. `medusa-triton verify DIRECTORY`
checks it again.
"""


def deployment_files(facts: EngineFacts, serving: TrtllmServing) -> dict[str, str]:
    """File name -> text, for the top of the repository."""
    tp, container = facts.tp, facts.release.container
    one = "One GPU, one process."
    many = f"{tp} GPUs: an MPI job of {tp} processes, of which the first serves and the others hold their part of the engine."
    start = ONE_RANK if tp == 1 else MANY_RANKS.format(last=tp - 1, engine=ENGINE).rstrip()
    shared = {"container": container, "mount": MOUNT, "tp": tp, "shm": 2 * tp}
    return {
        "launch.sh": LAUNCH.format(**shared, ranks=one if tp == 1 else many, start=start),
        "compose.yaml": COMPOSE.format(**shared),
        "kubernetes.yaml": KUBERNETES.format(**shared),
        "README.md": README.format(
            **shared, release=facts.release.name, s="" if tp == 1 else "s", draft=facts.tree.max_draft_len,
            gpus="all" if tp == 1 else f"'\"device={','.join(map(str, range(tp)))}\"'", bls=BLS, ensemble=ENSEMBLE, engine=ENGINE,
            ranks="" if tp == 1 else f" {many}", counts=" and drafts" if facts.counts_drafts else "",
        ),
    }  # fmt: skip
