# shellcheck shell=bash disable=SC2034
# What every process of a job finds in its environment, in one place; read by run.sh. What is set already stays.

# The checkout's own environment, where there is one.
if [ -d .venv/bin ]; then
  export PATH="$PWD/.venv/bin:$PATH"
fi

# Where sbatch was told to pass on only some variables, srun would pass on no more than those, and none of these.
export SLURM_EXPORT_ENV=ALL

# CPU threads of a rank. More than one helps on a CPU alone: ranks * threads should not exceed the cores of a node.
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-1}

# NCCL says what it refuses; INFO tells which network it chose, which is the first thing to look at when it is slow.
export NCCL_DEBUG=${NCCL_DEBUG:-WARN}

# The network. NCCL finds InfiniBand by itself; over Ethernet name the interface that the nodes share:
#   export NCCL_SOCKET_IFNAME=eth0   (or NCCL_IB_DISABLE=1 where InfiniBand is there but must not be used)
# gloo, which saves use, takes the interface that leads to the first node, unless GLOO_SOCKET_IFNAME says which.

# Between a SIGTERM and torchrun's SIGKILL: Slurm's own KillWait is what should end ranks that save.
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=${TORCH_ELASTIC_SHUTDOWN_TIMEOUT:-600}

# CPU binding: srun would bind a node's only task, torchrun, to one core; its ranks share all of them instead. On nodes
# of several sockets, MEGALLAMA_TORCHRUN=--numa-binding=node binds each rank to the cores near its GPU.
in_step=(--cpu-bind=none) # options of srun

# A container, by CONTAINER=: an Apptainer image (a .sif file or a folder), or else whatever Pyxis takes. The folder
# that the job was submitted from is visible inside under its own path; CONTAINER_MOUNTS=/data,/scratch adds others.
in_container=() # a command before the command
if [ -n "${CONTAINER:-}" ]; then
  mounts=$PWD${CONTAINER_MOUNTS:+,$CONTAINER_MOUNTS}
  if [[ $CONTAINER == *.sif || -d $CONTAINER ]]; then
    in_container=(apptainer exec --nv --bind "$mounts" --pwd "$PWD" "$CONTAINER")
  else
    pairs=$(sed -E 's#([^,]+)#\1:\1#g' <<<"$mounts")
    in_step+=(--container-image="$CONTAINER" --container-mounts="$pairs" --container-workdir="$PWD")
  fi
fi
