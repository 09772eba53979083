# Ray of this driver's own, on its nodes: ports that are free, a token and folders of its own, so that jobs may share a node.
read -r address client_port token < <(python3 -P - <<'END_OF_PYTHON'
import os, secrets, socket
with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as way:
    try:
        way.connect(("192.0.2.1", 9))  # nothing is sent: it says which of this machine's addresses leads out
        here = way.getsockname()[0]
    except OSError:  # no way leads out, as of many clusters' nodes
        name = os.environ.get("SLURMD_NODENAME") or socket.gethostname()
        try:
            found = [at[4][0] for at in socket.getaddrinfo(name, None, socket.AF_INET)]
        except OSError:
            found = []
        here = next((at for at in found if not at.startswith("127.")), "127.0.0.1")
with socket.socket() as one, socket.socket() as another:
    one.bind((here, 0))
    another.bind((here, 0))
    print(f"{here}:{one.getsockname()[1]} {another.getsockname()[1]} {secrets.token_hex(32)}")
END_OF_PYTHON
)
export RAY_AUTH_MODE=token RAY_AUTH_TOKEN=$token RAY_TMPDIR=$job address client_port
cat >"$job/node.sh" <<'END_OF_NODE'
told='' ray=''
trap 'told=yes; if [ "$ray" ]; then kill -TERM "$ray"; fi' TERM USR1
ended="latentmill: Ray has ended on node $SLURM_PROCID, $SLURMD_NODENAME"
mkdir -p "${RAY_TMPDIR%/*}"
own=$(mktemp -d "${RAY_TMPDIR%/*}/lm-XXXXXX") || { echo "$ended"; exit 3; } # of each node: nodes may share what is in TMPDIR
asks=(--num-cpus="${SLURM_CPUS_PER_TASK:-$SLURM_CPUS_ON_NODE}" --num-gpus="${SLURM_GPUS_ON_NODE:-0}" --temp-dir="$own/ray"
    --min-worker-port=0 --max-worker-port=0 --dashboard-agent-listen-port=0 --disable-usage-stats --block)
if [ "${SLURM_MEM_PER_NODE:-0}" != 0 ]; then
    asks+=(--memory=$((SLURM_MEM_PER_NODE * 1048576 * 7 / 10)) --object-store-memory=$((SLURM_MEM_PER_NODE * 1048576 * 3 / 10)))
fi
if [ "$SLURM_PROCID" = 0 ]; then
    asks+=(--head --node-ip-address="${address%:*}" --port="${address##*:}"
        --include-dashboard=false --ray-client-server-port="$client_port")
else
    asks+=(--address="$address")
    until [ "$told" ] || (exec 3<>"/dev/tcp/${address%:*}/${address##*:}") 2>/dev/null; do sleep 1; done
fi
if [ -z "$told" ]; then
    # Of the Python that runs the job, whatever else is called ray. It is told to end when nobody is left whom a drained node would help.
    RAY_GRACEFUL_SHUTDOWN_DRAIN_TIMEOUT_S=0 RAY_TMPDIR=$own python3 -P -m ray.scripts.scripts start "${asks[@]}" &
    ray=$!
    wait "$ray"
    wait "$ray"
fi
rm -rf "$own" 2>/dev/null || { sleep 1; rm -rf "$own"; } # what still ends may write
if [ -z "$told" ]; then echo "$ended"; fi
END_OF_NODE
cat >"$job/wait.py" <<'END_OF_PYTHON'
import os, re, socket, sys, time
address, nodes, end = sys.argv[1], int(sys.argv[2]), time.monotonic() + 300
host, _, port = address.rpartition(":")
def ended():
    with open(sys.argv[4], errors="replace") as log:
        return dict(re.findall(r"^latentmill: Ray has ended on node (\d+), (.*)$", log.read(), re.M))
def wait():
    if not os.path.exists(f"/proc/{sys.argv[3]}") or "0" in ended():
        sys.exit("latentmill: Ray has not come up on the first node")
    if time.monotonic() > end:
        sys.exit(f"latentmill: Ray has not come up on {nodes} nodes within 5 minutes")
    time.sleep(0.5)
while True:
    try:
        socket.create_connection((host, int(port)), 5).close()
        break
    except OSError:
        wait()
import ray
ray.init(address=address, log_to_driver=False, logging_level="ERROR")
while sum(node["Alive"] for node in ray.nodes()) < nodes - len(ended()):
    wait()
if bad := ended():
    print(f"latentmill: begins with {nodes - len(bad)} of {nodes} nodes: Ray has ended on {', '.join(bad.values())}", file=sys.stderr)
    sys.exit(5)
END_OF_PYTHON
: >"$job/ray.log" # which is looked into, whenever srun begins
srun --export=ALL --nodes="$SLURM_JOB_NUM_NODES" --ntasks="$SLURM_JOB_NUM_NODES" --ntasks-per-node=1 \
    ${SLURM_CPUS_PER_TASK:+--cpus-per-task="$SLURM_CPUS_PER_TASK"} --no-kill --kill-on-bad-exit=0 \
    bash -c "$(<"$job/node.sh")" >"$job/ray.log" 2>&1 &
cluster=$!
run python3 "$job/wait.py" "$address" "$SLURM_JOB_NUM_NODES" "$cluster" "$job/ray.log"
case $? in
    0) ;;
    5) fewer=yes ;;
    *)
        tail -n 20 "$job/ray.log" >&2
        if [ "$drained$cancelled" ]; then finish 130; fi
        finish 4
        ;;
esac
