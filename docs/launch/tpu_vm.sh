#!/bin/bash
# The same command on every host of a TPU slice; JAX finds the hosts by the slice's metadata.
#   TPU=my-v5e-16 ZONE=europe-west4-b bash docs/launch/tpu_vm.sh /mnt/shared/runs/path_760m /mnt/shared/fineweb_edu_tokens
# The hosts need the repository in ~/path-jax with its .venv (pip install -e '.[tpu]') and one file system that all of
# them have mounted, such as Filestore, for the working directory and the data.
set -eu
WORKDIR=$1
DATA=$2

gcloud compute tpus tpu-vm ssh "$TPU" --zone="$ZONE" --worker=all --command="
cd path-jax && .venv/bin/python train.py --coordinator=auto \
    --config=configs/lm_path.py:size=760m,mixer=path_fox --workdir=$WORKDIR \
    --config.data.path=$DATA --config.mesh.fsdp=-1"
