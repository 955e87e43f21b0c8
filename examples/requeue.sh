# shellcheck shell=bash
# How a job comes back by itself. The batch scripts of this folder source this file, and so do those that
# `megatron-peft experiment --emit-slurm` writes. A script defines two functions,
#
#   progress         prints a word that changes when the job gets on, for instance the newest checkpoint's iteration
#   ask_to_stop PID  asks the step to save and end; PID is its process here. It may be called again and again
#
# and calls `run_and_requeue FOLDER COMMAND [ARG ...]`. The command is the job's step; the job is queued again
#
# - after USR1: SLURM sends it before the time limit (--signal=B:USR1@300) and, with PreemptParameters=send_user_signal,
#   to a job that is preempted; also if the time is up before the step has ended;
# - after a step that failed, most often because a node was lost; if it is the node of this script, SLURM itself queues
#   the job again (--requeue).
#
# It does not after exit code 2 (a wrong flag or file is wrong next time too), nor when the job was cancelled, nor where
# MAX_REQUEUES (default 3) starts in a row got no further. These are counted at the start, in a small file in FOLDER, so
# that those count which SLURM itself has caused.

MAX_REQUEUES=${MAX_REQUEUES:-3}
ASK_AGAIN_SECONDS=${ASK_AGAIN_SECONDS:-20} # a rank that is only just starting may not have heard

# Before anything else: without a trap the signal ends this script, and with it the job.
signalled=false
step=
trap 'signalled=true; ask_again_and_again' USR1
# SLURM ends the job, and the step too: when time is up before the step has ended, there are seconds left to come back.
trap 'case $(state_of_job) in *TimeLimit) end_or_requeue 143 ;; esac' TERM

job=$SLURM_JOB_ID
if [[ -n ${SLURM_ARRAY_JOB_ID:-} ]]; then job=${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID; fi

run_and_requeue() {
    local folder=$1 code=0
    shift
    count_start "$folder"
    if ! "$signalled"; then
        "$@" &
        step=$!
        if "$signalled"; then ask_again_and_again; fi # it came while there was no step yet
        # A trapped signal interrupts `wait`: wait until the step itself has ended, then ask for its status.
        while kill -0 "$step" 2>/dev/null; do
            wait "$step" || true
        done
        wait "$step" || code=$?
    fi
    if ((code == 0)) && ! "$signalled"; then
        rm -f "$starts"
        exit 0
    fi
    end_or_requeue "$code"
}

count_start() {
    local count where
    mkdir -p "$1"
    starts=$1/.starts.$SLURM_JOB_ID
    begun_at=$(progress || true)
    without_progress=0
    if ((${SLURM_RESTART_COUNT:-0} > 0)) && read -r count where 2>/dev/null <"$starts"; then
        if [[ $where == "$begun_at" ]]; then without_progress=$((count + 1)); fi
    fi
    echo "$without_progress $begun_at" >"$starts"
    if ((without_progress > MAX_REQUEUES)); then give_up 1; fi
}

# The step may not exist yet for SLURM, and a rank that is starting ignores the signal: ask until the step has ended.
ask_again_and_again() {
    # Not a bare return, which would end the script: in a trap it takes the status of the interrupted `wait`.
    if [[ -z $step || -n ${asking:-} ]]; then return 0; fi
    echo "USR1 (time is nearly up, or the job is preempted): asking the step to save and end"
    while kill -0 "$step" 2>/dev/null; do
        ask_to_stop "$step"
        sleep "$ASK_AGAIN_SECONDS"
    done &
    asking=$!
}

# State and reason. A job that is cancelled is COMPLETING without a reason.
state_of_job() {
    squeue --noheader --jobs "$job" --states all --format '%T %r' 2>/dev/null || true
}

end_or_requeue() {
    local code=$1 state
    state=$(state_of_job)
    case $state in
        RUNNING* | *TimeLimit | '') ;;
        *)
            echo "SLURM has ended this start ($state): whether the job comes back is up to SLURM"
            exit "$code"
            ;;
    esac
    if ((code == 2)); then
        echo "exit code 2, something that the next start would not find otherwise: the job is not queued again"
        exit "$code"
    fi
    if ((without_progress >= MAX_REQUEUES)) && [[ $(progress) == "$begun_at" ]]; then give_up "$code"; fi
    echo "the step ended with exit code $code: the job is queued again, from $(progress)"
    scontrol requeue "$job"
    exit "$code"
}

give_up() {
    echo "$without_progress requeues in a row have not got beyond $begun_at (MAX_REQUEUES=$MAX_REQUEUES): the job ends"
    rm -f "$starts"
    exit "$(($1 ? $1 : 1))"
}
