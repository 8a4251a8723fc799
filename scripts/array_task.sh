# One task of a job array = one run of a grid. Sourced by the job scripts beside it, in the root of the checkout:
#   . scripts/array_task.sh NAME [GRID]        GRID instead of scripts/grids/NAME.yaml
# The task's exit status is the run's. Told to stop (time limit, preemption), the run saves and ends with 75; the task
# is then put back into the queue and goes on from there. docs/sweeps.md lists the variables.

signalled= again= child=
trap 'signalled=1 again=1; [ -z "$child" ] || kill -TERM "$child" 2>/dev/null' USR1 TERM

grid=scripts/grids/$1.yaml
case ${2:-} in
  "") ;;
  /*) grid=$2 ;;
  *) grid=$SLURM_SUBMIT_DIR/$2 ;;
esac
[ ! -f scripts/cluster.env ] || . scripts/cluster.env
python=${STT_PYTHON:-$([ -x .venv/bin/python ] && echo .venv/bin/python || echo python3)}
export OMP_NUM_THREADS=${OMP_NUM_THREADS:-${SLURM_CPUS_PER_TASK:-1}}

put_back() {
  if [ "${SLURM_RESTART_COUNT:-0}" -ge "${STT_MAX_REQUEUES:-20}" ]; then
    echo "error: stopped after $SLURM_RESTART_COUNT requeues; STT_MAX_REQUEUES allows more, sbatch again goes on" >&2
    return
  fi
  case $(squeue -h -j "$SLURM_JOB_ID" -o "%T %r") in
    "COMPLETING TimeLimit") ;;
    COMPLETING* | CANCELLED*) return ;; # scancel, or SLURM itself has put it back (preemption, scontrol requeue)
  esac
  scontrol requeue "${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID" # the plain job id would requeue the whole array
}

"$python" -m util.sweep "$grid" --run "${SLURM_ARRAY_TASK_ID:?start this with sbatch --array}" &
child=$!
[ -z "$signalled" ] || kill -TERM "$child" 2>/dev/null
while :; do
  again=
  wait "$child"
  code=$?
  [ -n "$again" ] || break # a signal ends `wait` early
done
case $code in
  75 | 138 | 143) code=75; put_back ;; # 138, 143: a signal met Python before its handlers were in place
esac
exit "$code"
