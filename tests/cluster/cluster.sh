# Where the test cluster lives, and how its processes are started, found and stopped. Sourced by build, up, down and image; bash.
set -euo pipefail
here=$(cd "$(dirname "${BASH_SOURCE[0]}")" && pwd)
repository=$(cd "$here/../.." && pwd)
cache=${OSCTL_CACHE:-${XDG_CACHE_HOME:-$HOME/.cache}/osctl}
K=$(realpath -m "$cache/cluster")
# bin: servers, kubectl, helm · manifests: YAML out of the servers' own modules · conf: generated settings, keys, kubeconfigs
# run: pids, sockets · log · etcd, kubelet, containerd, s3: state, gone after `WIPE=1 down`
B=$K/bin C=$K/conf R=$K/run
servers="kubelet kwok coredns versitygw kube-proxy kube-scheduler kube-controller-manager kube-apiserver etcd containerd" # in the order of stopping
operators="training-operator jobset trainer kueue kuberay" # Deployments, each in the one namespace that operator_at says
ADDRESS=10.89.0.1 # of the machine as its pods see it; on a bridge of its own (kub0), so that nothing listens to the outside
S3_PORT=9000
export KUBECONFIG=$C/admin.kubeconfig PATH=$B:$PATH
umask 022

me=$(basename "$0") began=$(date +%s%N)
die() { echo "tests/cluster/$me: $*" >&2; exit 1; }
began=$(date +%s%N)
say() { # one line per phase, with the seconds it took
  local now; now=$(date +%s%N)
  printf 'tests/cluster/%s: %6.1f s  %s\n' "$me" "$(((now - began) / 100000000))e-1" "$*" >&2; began=$now; }

lock() { # [NAME]: one script at a time; `image`, which takes minutes, is not in the way of the others. The servers do not inherit the lock (see start)
  mkdir -p "$K"; exec 9>"$K/.lock${1:+-$1}"
  flock -n 9 || { echo "tests/cluster/$me: waits for another run of ${1:-build, up or down}" >&2; flock 9; }
  began=$(date +%s%N); }

ctr_() { ctr -a "$R/containerd.sock" -n k8s.io "$@"; }

pid_of() { # NAME: prints the process id of a running server; a pid that another program has by now does not count
  local p; p=$(cat "$R/$1.pid" 2>/dev/null) && [ -n "$p" ] || return 1
  case $(readlink "/proc/$p/exe" 2>/dev/null) in */"$1"|*/"$1"-v*|*/"$1 (deleted)") echo "$p" ;; *) return 1 ;; esac; }

operator_at() { # NAME: prints namespace and Deployment
  case $1 in
    training-operator) echo kubeflow training-operator ;;
    jobset) echo jobset-system jobset-controller-manager ;;
    trainer) echo kubeflow-system kubeflow-trainer-controller-manager ;;
    kueue) echo kueue-system kueue-controller-manager ;;
    kuberay) echo kuberay-system kuberay-operator ;;
    *) return 1 ;;
  esac; }

runs_as() { # NAME COMMAND...: it runs, and with these arguments
  local p; p=$(pid_of "$1") && shift && [ "$(tr '\0' ' ' <"/proc/$p/cmdline")" = "$* " ]; }

start() { # NAME COMMAND...: unless it runs
  local name=$1; shift
  pid_of "$name" >/dev/null && return
  [ -f "$K/log/$name.log" ] && mv "$K/log/$name.log" "$K/log/$name.before.log"
  setsid "$@" >"$K/log/$name.log" 2>&1 </dev/null 9>&- & echo $! >"$R/$name.pid"; }

stop() { # NAME: asks, waits 10 s, kills
  local p i; p=$(pid_of "$1") || { rm -f "$R/$1.pid"; return 0; }
  kill "$p" 2>/dev/null || true
  for ((i = 0; i < 100; i++)); do kill -0 "$p" 2>/dev/null || break; sleep 0.1; done
  kill -9 "$p" 2>/dev/null || true
  rm -f "$R/$1.pid"; }

wait_for() { # WHAT SECONDS SERVER COMMAND...: until the command succeeds; the server's last words where it does not
  local what=$1 seconds=$2 server=$3 end; shift 3; end=$((SECONDS + seconds))
  until "$@" >/dev/null 2>&1; do
    [ $SECONDS -lt $end ] || { tail -n 5 "$K/log/$server.log" >&2 2>/dev/null || true; die "$what: not within $seconds s; see $K/log/$server.log"; }
    sleep 0.2
  done; }
