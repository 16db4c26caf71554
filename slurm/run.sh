#!/usr/bin/env bash
# One training run inside a Slurm job: run.sh CONFIG [key.sub=value ...], called by the sbatch files beside it.
# One torchrun per node, started by srun; each starts MEGALLAMA_NPROC_PER_NODE ranks, by default one per GPU.
set -euo pipefail

config=${1:?run.sh needs a CONFIG}
shift
: "${SLURM_JOB_ID:?not inside a Slurm job; start it with sbatch}"
nodes=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}
per_node=${MEGALLAMA_NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:?the node has no GPUs; set MEGALLAMA_NPROC_PER_NODE}}

cd "$(dirname "$0")/.."
if [ -d .venv/bin ]; then
  export PATH="$PWD/.venv/bin:$PATH"
fi

# A mistake in the configuration ends here, before any node is used, with exit code 2.
resolved=$(megallama config "$config" "$@" --gpus $((nodes * per_node)) --json)
logs=$(python -c 'import json, sys; print(json.load(sys.stdin)["config"]["run"]["dir"])' <<<"$resolved")/logs
mkdir -p "$logs"

# The address that Slurm itself uses: a node's name need not resolve on the other nodes.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
address=$(scontrol show node "$first" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
port=$((10000 + SLURM_JOB_ID % 20000))  # two jobs that share a node must not share a port
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

log="$logs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}-node"
echo "$nodes nodes of $per_node ranks; rendezvous $address:$port; output in ${log}N.log"
code=0
# --cpu-bind=none: a node's one task would be bound to one core. SLURM_NODEID is each node's own, so rank 0 is on node 0.
# shellcheck disable=SC2016
srun --ntasks-per-node=1 --cpu-bind=none --kill-on-bad-exit=1 --wait=60 --output="${log}%n.log" --open-mode=append \
  bash -c 'exec torchrun --node-rank="$SLURM_NODEID" "$@"' torchrun \
  --nnodes="$nodes" --nproc-per-node="$per_node" --master-addr="$address" --master-port="$port" \
  launch/pretrain.py --config "$config" "$@" || code=$?
if [ "$code" -ne 0 ]; then
  echo "the run failed with exit code $code; its last words are in ${log}N.log" >&2
fi
exit "$code"
