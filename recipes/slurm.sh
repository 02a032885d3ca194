#!/bin/sh
# Train on nodes of several GPUs under Slurm, one torchrun agent a node. Five
# minutes before the time limit the run is saved, and the job requeued to
# resume it. docs/distributed.md says which folders the nodes have to share.
#     sbatch recipes/slurm.sh [KEY=VALUE ...]       # in the project's folder
#     sbatch --nodes=4 --gpus-per-node=8 recipes/slurm.sh [KEY=VALUE ...]
#SBATCH --job-name=emanet
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=4
#SBATCH --cpus-per-task=20
#SBATCH --time=24:00:00
#SBATCH --signal=B:USR1@300
#SBATCH --requeue
#SBATCH --open-mode=append
# A task is an agent: --cpus-per-task is NUM_WORKERS + 1 for each of its GPUs.
set -eu
cd "$(dirname "$0")/.." || :        # sbatch runs a copy, from its own folder
[ -f train.py ] || cd "$SLURM_SUBMIT_DIR"
[ -f train.py ] || {
    echo 'slurm.sh: submit it in the folder of train.py' >&2
    exit 2
}
: "${SLURM_JOB_ID:?run this script by sbatch}"
: "${SLURM_GPUS_ON_NODE:?the job has no GPUs; see --gpus-per-node}"
. ./setup.sh

# torchrun exits with 1 whatever its processes exit with, also with 75 (stopped
# on request). The signal tells a stop from a failure; that latest.pth has
# changed tells it from a run that hangs and would be requeued without end.
models=$(python -c '
import settings, sys
try:
    settings.override_all(sys.argv[1:])
except settings.SettingError as error:
    sys.exit(f"slurm.sh: {error}")
print(settings.MODEL_DIR)' "$@")
checksum() {
    cksum "$models/latest.pth" 2> /dev/null || :
}
before=$(checksum)

# The signal goes to the agents: srun answers SIGTERM by killing them. They give
# their processes 240 s to save instead of 30 (torch 2.12 or later).
export TORCH_ELASTIC_SHUTDOWN_TIMEOUT=240
cause='' again=yes
trap '[ -n "$cause" ] || scancel --signal=TERM "$SLURM_JOB_ID" || :
    cause=USR1 again=yes' USR1      # the time limit is near
trap 'cause=TERM again=yes' TERM    # scancel, which signals the agents too

node=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
srun --ntasks-per-node=1 --cpus-per-task="$SLURM_CPUS_PER_TASK" \
    --kill-on-bad-exit=0 --wait=240 \
    torchrun --nnodes="$SLURM_JOB_NUM_NODES" \
    --nproc-per-node="$SLURM_GPUS_ON_NODE" --max-restarts=0 \
    --rdzv-backend=c10d --rdzv-id="$SLURM_JOB_ID" \
    --rdzv-endpoint="$node:$((20000 + SLURM_JOB_ID % 10000))" \
    train.py "$@" &
while [ -n "$again" ]; do           # a trap ends wait, but not srun
    again='' status=0
    wait "$!" || status=$?
done

[ "$status" -ne 0 ] || exit 0
if [ "$cause" != USR1 ]; then
    echo "slurm.sh: srun exited with $status; not requeued" >&2
elif [ "$(checksum)" = "$before" ]; then
    echo "slurm.sh: stopped by USR1, but $models/latest.pth has not changed" \
        "since the start; not requeued" >&2
else
    echo "slurm.sh: stopped by USR1; $models/latest.pth is saved; requeueing"
    scontrol requeue "$SLURM_JOB_ID"
    status=75
fi
exit "$status"
