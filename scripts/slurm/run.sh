# Sourced by the sbatch scripts here with their arguments: runs the stage on all nodes of the job, and requeues the job
# after a crash. Environment variables:
#   PYTHON   interpreter (default: .venv/bin/python if it exists, else python)
#   RUNS     parent of the run folders (default: runs). A run is RUNS/JOB_NAME, so the same command resumes it.
#   CRASHES  number of crashes without a new checkpoint between them after which the job is FAILED (default: 3)
set -uo pipefail

fail() {
    echo "run.sh: $*" >&2
    exit 2
}

stage=${1-}
case $stage in
pretrain | linprobe | probe | finetune) shift ;;
*) fail "'$stage' is not a stage: sbatch --job-name=NAME SCRIPT pretrain|linprobe|finetune SETTINGS" ;;
esac
[[ $SLURM_JOB_NAME != *.sbatch ]] || fail "the run has no name: sbatch --job-name=NAME ..."
[[ " $*" != *" --run_dir"* && " $*" != *" --ckpt_path"* ]] ||
    fail "--run_dir and --ckpt_path follow from the job's name: use sbatch --job-name=NAME and the variable RUNS=FOLDER"
cd "$SLURM_SUBMIT_DIR" || exit 2
[ -x .venv/bin/python ] && python=.venv/bin/python || python=python
python=${PYTHON:-$python}
run=${RUNS:-runs}/$SLURM_JOB_NAME
# In a job array, the SLURM_JOB_ID of the last task is that of the whole array.
job=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
job=${job:-$SLURM_JOB_ID}

# On fewer devices than the config is written for, accumulate gradients to keep the global batch.
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

# Slurm sends SIGTERM to this shell, too. Without a trap it would end at once and take the job with it before the ranks
# have saved; with a trap it first waits for srun.
trap : TERM
log=/proc/$$/fd/2
echo "run.sh: $run, job $job, start $((${SLURM_RESTART_COUNT:-0} + 1)), $SLURM_NTASKS tasks on $SLURM_JOB_NODELIST"
before=$(stat -Lc %s "$log")
# --export=ALL: in case the job was submitted with another --export. --cpus-per-task: srun does not inherit it from
# sbatch. --wait=0: at the end, rank 0 may still be writing files or uploading to W&B after the others have exited.
srun --kill-on-bad-exit=1 --wait=0 --export=ALL --cpus-per-task="${SLURM_CPUS_PER_TASK:-1}" \
    "$python" -m mae.cli "$stage" "${settings[@]}"
code=$?
[ $code != 0 ] || exit 0 # done, or requeued by the run itself
# srun returns the highest exit code. When a task fails, the others are killed, with 143, so the code of the first one is
# read from the log. 2 is a user error, 130 is Ctrl-C (scancel --signal=INT).
for final in 2 130; do
    # Not grep -q: it stops reading at the first match, and pipefail would turn that into a failure.
    ! tail -c +$((before + 1)) "$log" | grep -E "^srun: error: .*: Exited with exit code $final\$" >/dev/null || exit $final
done
# Cancelled, at the time limit, or already requeued by Slurm: not a crash.
[[ $(scontrol show job -o "$job") == *" JobState=RUNNING "* ]] || exit $code

newest=$(readlink "$run/checkpoints/last.ckpt" || echo none)
mkdir -p "$run"
{ read -r count_job count_newest count <"$run/.crashes"; } 2>/dev/null
[ "${count_job-} ${count_newest-}" = "$job $newest" ] || count=0
count=$((count + 1))
echo "$job $newest $count" >"$run/.crashes"
if [ $count -ge "${CRASHES:-3}" ]; then
    echo "run.sh: exit code $code; crash $count since the newest checkpoint ($newest): giving up"
    exit $code
fi
echo "run.sh: exit code $code; crash $count since the newest checkpoint ($newest): requeueing"
scontrol requeue "$job"
exit $code
