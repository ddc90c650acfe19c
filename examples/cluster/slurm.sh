#!/usr/bin/env bash
# Two machines of 8 GPUs train one run under Slurm: docs/cluster.md says what each part is for, and that nobody has yet run
# this on a real cluster. Submit it from the checkout, in an environment that has flashlab:
#
#   sbatch examples/cluster/slurm.sh --config examples/btc_forecast/default.yaml --data.path data/bars --run runs/bars
#
#SBATCH --job-name=flashlab
#SBATCH --nodes=2
#SBATCH --ntasks-per-node=1
#SBATCH --gpus-per-node=8
#SBATCH --cpus-per-task=32
#SBATCH --time=04:00:00
#SBATCH --signal=TERM@120
#SBATCH --requeue
#SBATCH --open-mode=append
set -euo pipefail

# One task a machine, a torchrun, which starts a process for each GPU and starts them again when one fails. If torchrun
# itself fails, a machine does, or the time is up (all get SIGTERM 120 s before), the job is queued again and resumes.
first=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n 1)
export TORCH_DISABLE_SHARE_RDZV_TCP_STORE=1
srun --kill-on-bad-exit=1 torchrun \
  --nnodes "$SLURM_NNODES" --nproc-per-node "$SLURM_GPUS_ON_NODE" --max-restarts 10 \
  --rdzv-id "$SLURM_JOB_ID-${SLURM_RESTART_COUNT:-0}" --rdzv-backend c10d \
  --rdzv-endpoint "$first:$((20000 + SLURM_JOB_ID % 10000))" --rdzv-conf join_timeout=3600 \
  -m -- flashlab train "$@" --resume && exit

# A mistake in the options fails each time: it must not come back for ever.
if ((${SLURM_RESTART_COUNT:-0} < 20)); then
  scontrol requeue "$SLURM_JOB_ID"
fi
exit 1
