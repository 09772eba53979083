#@SETUP
set -uo pipefail
#@OUTPUT
#@POLICY
# The number of an array's last task stands for all of them.
self=${SLURM_ARRAY_JOB_ID:+${SLURM_ARRAY_JOB_ID}_$SLURM_ARRAY_TASK_ID}
self=${self:-$SLURM_JOB_ID}
log=$(readlink "/proc/$$/fd/1") # of a file that the submitting machine made a folder for
case $log in
    */log-*) ;;
    *) log=$(scontrol show job "$self" | sed -n 's/^ *StdOut=//p') ;;
esac
if [ -z "$log" ]; then echo "latentmill: the folder of this job is not known" >&2; exit 4; fi
beside=${log%/*} task=${SLURM_ARRAY_TASK_ID:-0}
child='' cluster='' begun='' fewer='' drained='' cancelled='' signalled='' missed=''

# TERM: the time is nearly up, or others need the nodes. INT: latentmill cancel. The driver ends with what is nearly done.
# Once more: the time is up, and SIGKILL comes in KillWait seconds. Slurm tells the driver itself, for which SIGTERM after SIGUSR1 is
# the end of what may be finished; a third signal would have it keep nothing.
notice() {
    if [ -z "$drained" ]; then send USR1; fi
    drained=yes signalled=yes
}
send() { # to the child; what comes between its start and its number is for whoever notes that
    if [ "$child" ]; then kill "-$1" "$child"; else missed=$1; fi
}
trap notice TERM USR1
trap 'send TERM; cancelled=yes signalled=yes' INT

# Ray's sockets lie in it, and a socket's path has room for 107 signs.
place=${TMPDIR:-/tmp}
if [ "${#place}" -gt 24 ]; then place=/tmp; fi
job=$(mktemp -d "$place/lm-XXXXXX") || exit 3

run() { # returns the command's exit code; a trap ends a wait before its time
    local code again
    if [ "$drained$cancelled" ]; then return 130; fi
    signalled=''
    "$@" &
    child=$!
    if [ "$missed" ]; then kill "-$missed" "$child"; fi
    wait "$child"
    code=$?
    while [ "$signalled" ]; do
        signalled=''
        wait "$child"
        again=$?
        [ "$again" = 127 ] || code=$again
    done
    child=''
    return "$code"
}

slurm() { # what scontrol says, which may be too busy to answer at once
    local turn said
    for turn in 1 2 3 4 5 6; do
        if said=$(scontrol "$@" 2>&1); then
            echo "$said"
            return 0
        fi
        [ "$turn" = 6 ] || sleep 5
    done
    echo "$said"
    return 1
}

finish() { # with this exit code, or in the queue again
    local code=$1 late said='' state='' failures=0
    if [ "$code" = 2 ] && [ "$fewer" ]; then code=4; fi # it may fit on all of them
    if [ "$cluster" ]; then
        kill -USR1 "$cluster" 2>/dev/null # srun hands it on to Ray's nodes, which clean up; of SIGTERM it makes SIGKILL
        { sleep 20 && kill -TERM "$cluster"; } 2>/dev/null &
        late=$!
        wait "$cluster" 2>/dev/null
        kill "$late" 2>/dev/null
    fi
    rm -rf "$job"
    if [ "$code" = 0 ] && [ "$output" ] && ! [ -e "$output/_SUCCESS" ]; then # nothing else says that all is there
        echo "latentmill: there is no $output/_SUCCESS" >&2
        code=1
    fi
    if [ "$requeue" ] && [ -z "$cancelled" ] && [ "$code" != 0 ]; then
        said=$(slurm --oneliner show job "$self") || echo "latentmill: scontrol does not answer: $said" >&2
        state=$(sed -n 's/.* JobState=\([A-Z_]*\).*/\1/p' <<<"$said")
    fi
    if [ "$requeue" ] && [ -z "$cancelled" ] && [ "$code" != 0 ] && [ "$state" = RUNNING ]; then
        if [ "$drained" ] && [ "$begun" ]; then
            rm -f "$beside/failures-$task"
        elif [ "$drained" ] || [[ " $again_after " == *" $code "* ]]; then
            echo "$code" >>"$beside/failures-$task"
            failures=$(wc -l <"$beside/failures-$task")
        else
            failures=$((retries + 1))
        fi
        if [ "$failures" -le "$retries" ]; then
            if said=$(slurm requeue "$self"); then
                echo "latentmill: ended with $code; in the queue again" >&2
                sleep 60
            else
                echo "latentmill: ended with $code, and is not in the queue again: $said" >&2
            fi
        fi
    fi
    echo "$code" >"$beside/exit_code-$task"
    exit "$code"
}

#@JOB
#@RAY
begun=yes
#@COMMAND
finish $?
