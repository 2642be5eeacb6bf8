# The end of every sbatch script here, which sources it with its arguments: the stage on all nodes of the job, and back
# into the queue after a crash. Environment:
#   PYTHON   the interpreter                 (.venv/bin/python where there is one, else python)
#   RUNS     the folder of run folders       (runs); a run is RUNS/JOB_NAME, so the same command again goes on with it
#   CRASHES  in a row, with no new checkpoint between them, after which the job is FAILED     (3)
set -uo pipefail

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

stage=${1-}
case $stage in
pretrain | linprobe | probe | finetune) shift ;;
*) fail "'$stage' is no stage: sbatch --job-name=NAME SCRIPT pretrain|linprobe|finetune SETTINGS" ;;
esac
[[ $SLURM_JOB_NAME != *.sbatch ]] || fail "the run has no name: sbatch --job-name=NAME ..."
[[ " $*" != *" --run_dir"* && " $*" != *" --ckpt_path"* ]] ||
    fail "--run_dir and --ckpt_path follow from the job's name: sbatch --job-name=NAME, RUNS=FOLDER in the environment"
cd "$SLURM_SUBMIT_DIR" || exit 2
[ -x .venv/bin/python ] && python=.venv/bin/python || python=python
python=${PYTHON:-$python}
run=${RUNS:-runs}/$SLURM_JOB_NAME
# In an array the last task's SLURM_JOB_ID is that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# On fewer devices than the config is made for, gradients are accumulated, so that a step has as many images.
settings=("$@" --run_dir "$run" --ckpt_path last)
settings+=(--trainer.num_nodes "$SLURM_NNODES" --trainer.devices "$SLURM_NTASKS_PER_NODE")
if [[ " $*" =~ \ --config[=\ ]([^ ]+) && " $*" != *" --trainer.accumulate_grad_batches"* ]]; then
    config=${BASH_REMATCH[1]}
    for name in "configs/${config%.yaml}.yaml" "configs/${stage/#probe/linprobe}/${config%.yaml}.yaml"; do # a packaged config's name
        [ -f "$config" ] || [ ! -f "$name" ] || config=$name
    done
    devices=$(awk '/^  (devices|num_nodes|accumulate_grad_batches):/ {n++; p = (p ? p : 1) * $2} END {print n == 3 ? p : 0}' \
        "$config") || fail "--config $config cannot be read"
    if [ "$devices" -gt 0 ]; then
        [ $((devices % SLURM_NTASKS)) = 0 ] || fail "$config is for $devices devices, which $SLURM_NTASKS tasks cannot" \
            "share evenly: sbatch --nodes=$((devices / SLURM_NTASKS_PER_NODE)), or --trainer.accumulate_grad_batches"
        settings+=(--trainer.accumulate_grad_batches $((devices / SLURM_NTASKS)))
    fi
fi

# Slurm sends SIGTERM to this shell, too. Without a trap it would end at once, and the job with it, before the ranks have
# saved; with one it waits for srun first.
trap : TERM
log=/proc/$$/fd/2
echo "run.sh: $run, job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST"
before=$(stat -Lc %s "$log")
# --export=ALL: for jobs that were submitted with another --export. --cpus-per-task: srun does not take it from sbatch.
# --wait=0: at the end rank 0 still writes, and may send to W&B, when the others are gone.
srun --kill-on-bad-exit=1 --wait=0 --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    "$python" -m mae.cli "$stage" "${settings[@]}"
code=$?
[ $code != 0 ] || exit 0 # done, or in the queue again
# srun ends with the highest code, and the first task that fails gets the others killed, with 143: what the first one
# said stands in the log. 2 is the user's mistake, 130 Ctrl-C (scancel --signal=INT).
for final in 2 130; do
    # Not grep -q, which would stop reading, and under pipefail that counts as not found.
    ! tail -c +$((before + 1)) "$log" | grep -E "^srun: error: .*: Exited with exit code $final\$" >/dev/null || exit $final
done
# Cancelled, at the time limit, or in the queue again by Slurm itself: no crash.
[[ $(scontrol show job -o "$job") == *" JobState=RUNNING "* ]] || exit $code

newest=$(readlink "$run/checkpoints/last.ckpt" || echo none)
mkdir -p "$run"
{ read -r count_job count_newest count <"$run/.crashes"; } 2>/dev/null
[ "${count_job-} ${count_newest-}" = "$job $newest" ] || count=0
count=$((count + 1))
echo "$job $newest $count" >"$run/.crashes"
if [ $count -ge "${CRASHES:-3}" ]; then
    echo "run.sh: exit code $code; crash $count since the newest checkpoint ($newest): given up"
    exit $code
fi
echo "run.sh: exit code $code; crash $count since the newest checkpoint ($newest): back into the queue"
scontrol requeue "$job"
exit $code
