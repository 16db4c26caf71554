#!/usr/bin/env bash
# Llama 7B on 16 nodes of 8 GPUs: tp 2, pp 4, dp 16.
# Submit from the repository root: sbatch slurm/7b.sh [key.sub=value ...]; docs/clusters.md says more.
#SBATCH --job-name=megallama-7b
#SBATCH --nodes=16
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --exclusive
#SBATCH --mem=0
#SBATCH --time=7-00:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --output=%x-%j.log
#SBATCH --open-mode=append
# sbatch runs a copy of this file from a spool folder.
exec bash "${SLURM_SUBMIT_DIR:-$(dirname "$0")/..}/slurm/run.sh" configs/7b.yaml "$@"
