#!/bin/sh
# One server with the model over the four GPUs of a node: sbatch deploy/slurm/serve.sh /models/keye
# It listens on the node itself. From elsewhere: ssh -L 8000:localhost:8000 NODE
#SBATCH --job-name=keye-serve
#SBATCH --nodes=1
#SBATCH --ntasks=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=16
#SBATCH --time=1-00:00:00
# The server has two minutes to finish its answers before the time is up.
#SBATCH --signal=TERM@120
set -eu
exec srun keye-jax serve --checkpoint "$1" --sharding expert --grace 100
