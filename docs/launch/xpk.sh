#!/bin/bash
# A GKE cluster made by xpk; the image holds the repository in its working directory with the extra [tpu].
#   CLUSTER=my-cluster IMAGE=europe-docker.pkg.dev/me/path-jax bash docs/launch/xpk.sh /mnt/shared/runs/a /mnt/shared/tokens
set -eu
WORKDIR=$1
DATA=$2

xpk workload create --cluster="$CLUSTER" --workload=path-fox --tpu-type=v5litepod-16 --num-slices=1 \
    --docker-image="$IMAGE" --max-restarts=10 \
    --command="python train.py --stopped_status=75 --config=configs/lm_path.py:size=760m,mixer=path_fox --workdir=$WORKDIR \
        --config.data.path=$DATA --config.mesh.fsdp=-1"
