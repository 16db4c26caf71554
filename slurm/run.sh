#!/usr/bin/env bash
# One start of a training run inside a Slurm job: run.sh CONFIG [key.sub=value ...], called by the sbatch files beside it.
# It looks at the nodes, trains with one torchrun on each, and hands the job back to Slurm as often as there is more to
# do. docs/clusters.md tells the whole life of a job.
set -euo pipefail

refuse() {
  echo "megallama: $*" >&2
  exit 2
}

signalled= # by Slurm, ahead of the time limit: save, and come back
cancelled= # by scancel, preemption, requeue or the time limit itself
trap 'signalled=yes' USR1
trap 'cancelled=yes' TERM

[ $# -ge 1 ] || refuse "run.sh needs a CONFIG; submit one of the files beside it: sbatch slurm/7b.sh"
config=$1
shift
case $config in
  -*) config=./$config ;; # no option of those who get it
esac
[ -n "${SLURM_JOB_ID:-}" ] || refuse "not inside a Slurm job; submit it: sbatch slurm/7b.sh"
[ -z "${SLURM_ARRAY_JOB_ID:-}" ] || refuse "a job array would train one run many times; submit without --array, and" \
  "once more with --dependency=singleton for each job that is to follow"
per_node=${MEGALLAMA_NPROC_PER_NODE:-${SLURM_GPUS_ON_NODE:-}}
[ -n "$per_node" ] || refuse "the nodes have no GPUs; ask for some (--gpus-per-node=8), or set MEGALLAMA_NPROC_PER_NODE"
cd "$(dirname "$0")/.."
. slurm/environment.sh
if [ -z "${CONTAINER:-}" ] && ! python -c 'import megallama' 2>/dev/null; then
  refuse "$(command -v python || echo "no python") does not know megallama; make $PWD/.venv (make .venv/installed)," \
    "activate an environment that has it before sbatch, or set CONTAINER"
fi

nodes=${SLURM_JOB_NUM_NODES:-${SLURM_NNODES:-1}}
names=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | paste -sd,)
# The address that Slurm itself uses: a node's name need not resolve on the other nodes.
address=$(scontrol show node "${names%%,*}" | grep -o 'NodeAddr=[^ ]*' | cut -d= -f2)
# Two jobs that share a node must not share a port, and a port that is taken must not be met again.
port=$((10000 + (SLURM_JOB_ID + 7919 * ${SLURM_RESTART_COUNT:-0}) % 20000))

on_first=("${in_container[@]}")
if [ ${#in_step[@]} -gt 1 ]; then # Pyxis
  on_first=(srun --nodes=1 --ntasks=1 "${in_step[@]}")
fi
job() { "${on_first[@]}" python -m megallama.cluster.job "$@"; }

# A mistake ends here with exit code 2, before any node is used.
run_dir=$(job begin --nodes "$nodes" --ranks-per-node "$per_node" "$config" "$@")
if [ -z "$run_dir" ]; then
  exit 0
fi
mkdir -p "$run_dir/logs"
log=$run_dir/logs/$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}
log_of_srun=${log//%/%%} # which makes other words of %j and its like

# A step with one task on each node, cut short by no signal. One that came is passed on as the file STOP, and again while
# the step lives: ranks that have not begun yet take an older file for their predecessors'.
on_nodes() {
  srun --ntasks-per-node=1 "${in_step[@]}" "$@" &
  local step=$! ended=
  while [ -z "$ended" ]; do
    if [ -n "$signalled" ] && kill -0 "$step" 2>/dev/null; then
      touch "$run_dir/STOP" || true # the disk may be full, and training must not end of that
      sleep 2 &
      wait $! || true
    else
      ended=0
      wait "$step" || ended=$?
      if [ "$ended" -gt 128 ] && kill -0 "$step" 2>/dev/null; then
        ended= # a signal ended the waiting, not the step
      fi
    fi
  done
  return "$ended"
}

# End this start and have Slurm begin another, on other nodes than those that are named.
requeue() {
  if [ -n "$cancelled" ] && ! scontrol show job "$SLURM_JOB_ID" | grep -q 'JobState=TIMEOUT'; then
    exit 143 # Slurm, or who asked it, has said what follows
  fi
  trap '' TERM # Slurm ends this script at once, and there is more to say
  scontrol requeue "$SLURM_JOB_ID" || exit 75
  if [ $# -gt 0 ]; then
    excluded=$(scontrol show job "$SLURM_JOB_ID" | grep -o 'ExcNodeList=[^ ]*' | cut -d= -f2 | sed 's/(null)//')
    excluded=$(IFS=,; echo "${excluded:+$excluded,}$*")
    scontrol update jobid="$SLURM_JOB_ID" excnodelist="$excluded"
    echo "from now on without $excluded; mended, they come back by: scontrol update jobid=$SLURM_JOB_ID excnodelist="
  fi
  exit 75
}

looked=0
if [ "${MEGALLAMA_PREFLIGHT:-yes}" != no ]; then
  date > "$log-token"
  # Nodes end at different times, and one that fails must not silence the others.
  # shellcheck disable=SC2016
  # srun writes the file itself, line by line: a node that does not see the run directory could not open one there.
  on_nodes --wait=0 --kill-on-bad-exit=0 --label --output="$log_of_srun-preflight.log" "${in_container[@]}" \
    bash -c 'trap "" USR1; exec "$@"' preflight timeout -k 30 "${MEGALLAMA_PREFLIGHT_SECONDS:-900}" \
    python -m megallama.cluster.preflight --address "$address" --port "$port" --ranks-per-node "$per_node" \
    --token "$log-token" --nodes "$names" "$config" "$@" || true
  bad=$(job nodes --token "$log-token" --expected "$names" "$log-preflight.log") || looked=$?
  if [ "$looked" -eq 2 ] && [ -z "$cancelled" ]; then
    exit 2
  fi
  if [ -n "$bad" ]; then
    # shellcheck disable=SC2086
    requeue $bad
  fi
fi

code=$looked
if [ -z "$signalled$cancelled" ] && [ "$looked" -eq 0 ]; then
  echo "$nodes nodes of $per_node ranks; rendezvous $address:$port; output in $log-rankN.log"
  # torchrun would die of USR1, which is for its ranks. SLURM_NODEID is each node's own, so rank 0 is on the first.
  # shellcheck disable=SC2016,SC2086
  MEGALLAMA_LOG=$log on_nodes --wait=60 --kill-on-bad-exit=1 --output="$log_of_srun-node%n.log" --open-mode=append \
    "${in_container[@]}" bash -c 'trap "" USR1; exec torchrun --node-rank="$SLURM_NODEID" "$@"' torchrun \
    --nnodes="$nodes" --nproc-per-node="$per_node" --master-addr="$address" --master-port="$port" \
    ${MEGALLAMA_TORCHRUN:-} --no-python \
    bash -c 'exec python launch/pretrain.py "$@" >>"$MEGALLAMA_LOG-rank$RANK.log" 2>&1' rank \
    --config "$config" "$@" || code=$?
  grep -hs '^megallama: ' "$log"-*.log | sort -u | head -n 5 >&2 || true
elif [ -n "$signalled" ]; then
  requeue
fi
# Where even that cannot be told, another start will see; `begin` ends what goes on like this.
read -r next code < <(job after --code "$code" ${signalled:+--signalled} "$run_dir") || next=requeue
if [ "$next" = requeue ]; then
  requeue
fi
exit "$code"
