#!/usr/bin/env bash
# Build and push the images of `--backend gke`, and print the settings that name them by digest.
#   bash examples/gke/build.sh us-central1-docker.pkg.dev/PROJECT/nothing-dpo/nothing-dpo
set -euo pipefail
image=${1:?usage: bash examples/gke/build.sh IMAGE}
cd "$(dirname "$0")/../.."
python=python:3.11-slim-trixie
digest=$(docker buildx imagetools inspect "$python" --format '{{.Manifest.Digest}}')
for lock in train light; do
  docker build --platform linux/amd64 -f examples/gke/Dockerfile --build-arg "BASE=$python@$digest" \
    --build-arg "LOCK=$lock" -t "$image:$lock" .
  docker push "$image:$lock"
  pushed=$(docker buildx imagetools inspect "$image:$lock" --format '{{.Manifest.Digest}}')
  case $lock in train) key=image ;; light) key=stage_image ;; esac
  echo "$key = \"$image@$pushed\""
done
