#!/bin/bash
# One rank, as the launcher of its node starts it (launch_node.sh): with the GPUs that the job was given on this node.
[ -z "${GIVEN_GPUS+set}" ] || export CUDA_VISIBLE_DEVICES="$GIVEN_GPUS"
exec python -u "$@"
