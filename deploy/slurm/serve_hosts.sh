#!/bin/sh
# One model over two nodes of four GPUs, a process for each GPU; process 0 takes the requests:
#   sbatch deploy/slurm/serve_hosts.sh /models/keye
#SBATCH --job-name=keye-serve
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=4
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=4
#SBATCH --time=1-00:00:00
#SBATCH --signal=TERM@120
set -eu
exec srun keye-jax serve --checkpoint "$1" --sharding expert --grace 100
