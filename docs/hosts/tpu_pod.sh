#!/usr/bin/env bash
# Train on a TPU pod slice, 16 chips of v5e on 4 hosts. Run it where gcloud is set up.
# Run it again after an interruption: it finds the slice and its files, and training continues.
set -euo pipefail

NAME=mclr
ZONE=us-west4-a
REPOSITORY=${REPOSITORY:?Expected the address of the repository, as git clone takes it.}
SHARE=10.0.0.2:/share # a Filestore instance in the network of the slice

on_all_hosts() {
  gcloud compute tpus tpu-vm ssh "$NAME" --zone="$ZONE" --worker=all --command="$1"
}

if ! gcloud compute tpus tpu-vm describe "$NAME" --zone="$ZONE" > /dev/null 2>&1; then
  gcloud compute tpus tpu-vm create "$NAME" --zone="$ZONE" \
    --accelerator-type=v5litepod-16 --version=v2-alpha-tpuv5-lite
fi

on_all_hosts "
  set -e
  mountpoint -q /share || {
    sudo apt-get install -qy nfs-common && sudo mkdir -p /share && sudo mount $SHARE /share
  }
  [ -d mclr_jax ] || git clone -q $REPOSITORY mclr_jax
  cd mclr_jax
  [ -d .venv ] || {
    curl -LsSf https://astral.sh/uv/install.sh | sh
    ~/.local/bin/uv venv -q --python=3.12
    ~/.local/bin/uv pip install -q -e . 'jax[tpu]'
  }"

on_all_hosts "
  cd mclr_jax
  .venv/bin/python -m launch.train --config=configs/cifar10.py --workdir=/share/runs/cifar10 \
    --config.data.path=/share/tensorflow_datasets --config.parallel=data \
    --config.require_accelerator --coordinator=auto"
