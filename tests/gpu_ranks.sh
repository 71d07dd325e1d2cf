#!/usr/bin/env bash
# Plans whose experts, or layers, are spread over ranks, on the GPUs of this host: results, times, and what happens when a rank is no more.
# Needs two GPUs (RANKS=4: four), NCCL, NVRTC, Open MPI and python3, and a binary with MPI: cargo build --release --features mpi.
#   [RANKS=2] [SPREAD="expert pipeline both"] tests/gpu_ranks.sh [results] [times] [failures] [weights]
# With PER_GPU=2 two ranks run on each GPU, so RANKS may be twice as many as there are GPUs, for results (and weights) alone.
# weights, which is only run if named, loads CHECKPOINT=DIR, or one of LFM2-8B-A1B's shape that it makes, for which it needs torch, transformers
# and 17 GB of disk.
set -uo pipefail
cd "$(dirname "$0")/.."
LFM2C=$(realpath "${LFM2C:-target/release/lfm2c}")
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
PLANS=$PWD/plans
CHECKPOINT=${CHECKPOINT:+$(realpath "$CHECKPOINT")}
RANKS=${RANKS:-2}
PER_GPU=${PER_GPU:-1}
RUN=(mpirun --allow-run-as-root --bind-to none -n "$RANKS")
# What SPREAD names: experts, layers, and, on four GPUs or more, the layers in two stages with the experts over the ranks of each.
SPREAD=${SPREAD:-expert pipeline$( ((RANKS >= 4)) && echo " both")}
PARTS=("${@:-results times failures}")
if ((PER_GPU > 1)); then
    case " ${PARTS[*]} " in *" results "*" weights "* | *" weights "*" results "*) PARTS=(results weights) ;; *" weights "*) PARTS=(weights) ;; *) PARTS=(results) ;; esac
    # NCCL lets two ranks have one GPU if it takes them for ranks of different hosts, which reach each other by sockets.
    export NCCL_SOCKET_IFNAME=lo
    # shellcheck disable=SC2016
    RUN+=(bash -c 'NCCL_HOSTID=$OMPI_COMM_WORLD_RANK exec "$2" "$3" --ranks-per-gpu "$1" "${@:4}"' rank "$PER_GPU")
fi
failed=0

# NCCL of a Python package, wherever its Python is.
nccl=$(python3 -c 'import nvidia.nccl; print(list(nvidia.nccl.__path__)[0] + "/lib")' 2>/dev/null) &&
    export LD_LIBRARY_PATH="$nccl${LD_LIBRARY_PATH:+:$LD_LIBRARY_PATH}"
# A host without a network has no other way to make connections.
export NCCL_NVLS_ENABLE=0
cd "$WORK" || exit 1
nvidia-smi -L

wants() { [[ " ${PARTS[*]} " == *" $1 "* ]]; }
seconds() { python3 -c "print(f'{$(date +%s.%N) - $1:.1f}')"; }
# Runs with what it says kept: shown where it fails.
quietly() {
    local begun; begun=$(date +%s.%N)
    if ! "$@" >out.txt 2>err.txt; then
        echo "FAILED: $*"; grep '^lfm2c' err.txt || tail -5 err.txt; failed=1; return 1
    fi
    [[ -z ${TOLD:-} ]] || echo "  $TOLD: $(seconds "$begun") s"
}
# Lines with the same tokens in two files of results.
same() {
    python3 - "$1" "$2" <<'PY'
import json, sys
a, b = ([json.loads(line)["tokens"] for line in open(name)] for name in sys.argv[1:])
print(f"{sum(x == y for x, y in zip(a, b))} of {len(a)} lines with the same tokens" if len(a) == len(b) else f"{len(a)} and {len(b)} lines")
PY
}
lines() {
    python3 - "$@" <<'PY'
import json, sys
count, new = int(sys.argv[1]), int(sys.argv[2])
for i in range(count):
    tokens = [5 + (at * 31 + i) % 400 for at in range(1 + i * 7 % 60)]
    print(json.dumps({"tokens": tokens, "max_new_tokens": new or [0, 1, 3, 12, 25][i % 5], "ignore_eos": True}))
PY
}
# How ranks may exchange; sends between two go by NCCL alone.
roads() { case $1 in expert) echo peer nccl ;; both) echo auto nccl ;; *) echo nccl ;; esac; }
over() { if [[ $1 == both ]]; then echo expert=$((RANKS / 2)),pipeline=2; else echo "$1=$RANKS"; fi; }
cases() { for signal in KILL STOP; do for exchange in $(roads "$1"); do echo $signal/$exchange; done; done; }
synthetic() { quietly "$LFM2C" compile "$PLANS/synthetic.ron" --target sm_90a "$@"; }

if wants results; then
    echo "== results: plans/synthetic.ron, 60 lines"
    lines 60 0 >in.jsonl
    for spread in $SPREAD; do for dtype in f32 bf16; do
        TOLD="compiling, $dtype" synthetic --dtype $dtype -o one.plan
        synthetic --dtype $dtype --ranks "$(over "$spread")" -o two.plan
        rm -f ./*.out one.jsonl two.jsonl cpu.jsonl again.jsonl
        quietly "$LFM2C" run one.plan --input in.jsonl --output one.jsonl
        quietly "$LFM2C" run two.plan --device cpu --input in.jsonl --output cpu.jsonl
        TOLD="$(over "$spread"), $dtype" quietly "${RUN[@]}" "$LFM2C" run two.plan --require-graphs --input in.jsonl --output two.jsonl
        quietly "${RUN[@]}" "$LFM2C" run two.plan --chunk 23 --input in.jsonl --output again.jsonl
        for exchange in $(roads "$spread"); do
            rm -f "$exchange.jsonl"
            TOLD="by $exchange, $dtype" quietly "${RUN[@]}" "$LFM2C" run two.plan --require-graphs --exchange "$exchange" --input in.jsonl --output "$exchange.jsonl"
            echo "  $dtype, by $exchange beside by default:    $(same "$exchange.jsonl" two.jsonl)"
        done
        echo "  $dtype, $RANKS ranks beside one GPU:          $(same two.jsonl one.jsonl)"
        echo "  $dtype, $RANKS ranks beside as many on CPU:  $(same two.jsonl cpu.jsonl)"
        echo "  $dtype, again, prompts in parts of 23: $(same two.jsonl again.jsonl)"
        [[ $spread == expert ]] || continue
        rm -f hot.jsonl counts.json
        quietly "$LFM2C" run one.plan --device cpu --input in.jsonl --output /dev/null --count-experts counts.json
        synthetic --dtype $dtype --ranks "expert=$RANKS" --expert-counts counts.json --expert-replicas 2 -o hot.plan && grep 'rows of the busiest' out.txt err.txt | sed 's/^[^:]*:/ /'
        quietly "${RUN[@]}" "$LFM2C" run hot.plan --require-graphs --input in.jsonl --output hot.jsonl
        echo "  $dtype, hot experts on several GPUs beside one: $(same hot.jsonl one.jsonl)"
    done; done
    rm -f share.jsonl
    quietly "${RUN[@]}" "$LFM2C" run one.plan --weights share --input in.jsonl --output share.jsonl && grep '^weights' err.txt | sed 's/^/  /'
    echo "  bf16, one rank's weights copied by all:  $(same share.jsonl one.jsonl)"
    for off in NCCL_P2P_DISABLE=1 "NCCL_P2P_DISABLE=1 NCCL_SHM_DISABLE=1"; do
        rm -f other.jsonl
        # shellcheck disable=SC2086
        quietly env $off "${RUN[@]}" "$LFM2C" run two.plan --exchange nccl --input in.jsonl --output other.jsonl
        echo "  bf16, $off: $(same two.jsonl other.jsonl)"
    done
    if ((PER_GPU == 1)); then
        rm -f own.jsonl
        # shellcheck disable=SC2016
        own=("${RUN[@]}" bash -c 'CUDA_VISIBLE_DEVICES=$OMPI_COMM_WORLD_LOCAL_RANK exec "$@"' rank)
        quietly "${own[@]}" "$LFM2C" run two.plan --input in.jsonl --output own.jsonl
        echo "  bf16, each rank sees its GPU alone: $(same two.jsonl own.jsonl)"
    fi
    quietly "${RUN[@]}" "$LFM2C" bench two.plan --requests 200 && cat out.txt
fi

if wants times; then
    echo "== times: LFM2-8B-A1B, synthetic weights, 64 sequences a GPU"
    sizes=(--synthetic 1 --target sm_90a --prefill 512 --decode 64 --max-sequences 64 --max-context 1024 --kv-tokens 65536)
    for ranks in 1 $RANKS; do
        TOLD="compiling for $ranks" quietly "$LFM2C" compile "$PLANS/lfm2-8b-a1b.ron" "${sizes[@]}" --ranks expert=$ranks -o $ranks.plan
    done
    quietly "$LFM2C" bench 1.plan --decode 64 --prefill 512 && cat out.txt
    if [[ " $SPREAD " == *" pipeline "* ]]; then
        echo "  layers spread over $RANKS"
        TOLD="compiling" quietly "$LFM2C" compile "$PLANS/lfm2-8b-a1b.ron" "${sizes[@]}" --ranks pipeline=$RANKS -o layers.plan && sed -n '/^rank/,/^$/p' out.txt
        quietly "${RUN[@]}" "$LFM2C" bench layers.plan --decode 64 --prefill 512 && cat out.txt
    fi
    if [[ " $SPREAD " == *" both "* ]]; then
        TOLD="compiling" quietly "$LFM2C" compile "$PLANS/lfm2-8b-a1b.ron" "${sizes[@]}" --ranks "$(over both)" -o both.plan && sed -n '/^rank/,/^$/p' out.txt
        for exchange in $(roads both); do
            echo "  $(over both), by $exchange"
            quietly "${RUN[@]}" "$LFM2C" bench both.plan --exchange "$exchange" --decode 64 --prefill 512 && cat out.txt
        done
    fi
    if [[ " $SPREAD " == *" expert "* ]]; then
        for exchange in $(roads expert); do
            echo "  experts, by $exchange"
            TOLD="all of it" quietly "${RUN[@]}" "$LFM2C" bench $RANKS.plan --exchange "$exchange" --decode 64 --prefill 512 && grep -E 'exchange|^(bucket|decode|prefill| )' out.txt
        done
        for set in NCCL_GRAPH_MIXING_SUPPORT=0 NCCL_GRAPH_REGISTER=0 NCCL_MAX_CTAS=4 NCCL_PROTO=LL; do
            echo "  experts, by NCCL with $set"
            TOLD="all of it" quietly env $set "${RUN[@]}" "$LFM2C" bench $RANKS.plan --exchange nccl --decode 64 && grep -E '^(bucket|decode| )' out.txt
        done
    fi
fi

if wants failures; then
    echo "== failures: mpirun itself stopped, so that it ends nobody"
    [[ -f long.jsonl ]] || lines 60000 200 >long.jsonl
    for spread in $SPREAD; do synthetic --dtype f32 --ranks "$(over "$spread")" -o two.plan; for case in $(cases "$spread"); do
        IFS=/ read -r signal exchange <<<"$case"
        rm -f long.out
        "${RUN[@]}" "$LFM2C" run two.plan --exchange "$exchange" --input long.jsonl --output long.out >out.txt 2>err.txt &
        launcher=$!
        # Until results come.
        for _ in $(seq 150); do [[ -s long.out ]] && break; sleep 0.2; done
        mapfile -t ranks < <(pgrep -P $launcher)
        echo "  $(over "$spread"), by $exchange: $(wc -l <long.out) results, then SIG$signal to rank 1 (pid ${ranks[1]:-none})"
        kill -STOP $launcher
        begun=$(date +%s.%N)
        kill -$signal "${ranks[1]}"
        for _ in $(seq 200); do kill -0 "${ranks[0]}" 2>/dev/null && [[ $(ps -o stat= -p "${ranks[0]}") != Z* ]] || break; sleep 0.1; done
        echo "  rank 0 has ended after $(seconds "$begun") s (at most 10)"
        kill -KILL "${ranks[@]}" 2>/dev/null
        kill -CONT $launcher
        wait $launcher 2>/dev/null
        echo "  mpirun: exit code $?; on the GPUs still: $(nvidia-smi --query-compute-apps=pid --format=csv,noheader | wc -l) processes"
        # What ranks say goes through mpirun.
        sed -n 's/^lfm2c: rank/  told: rank/p' err.txt
    done; done
fi
if wants weights; then
    if [[ -z $CHECKPOINT ]]; then
        CHECKPOINT=$WORK/8b
        PYTHONPATH=$PLANS/../tests/oracle python3 - "$CHECKPOINT" <<'PY' || exit 1
import sys
from pathlib import Path
from compare_8b import FULL, make_checkpoint
from make_goldens import moe
print(make_checkpoint(Path(sys.argv[1]), moe("ccacccacccacccacccaccacc", **FULL), 0, "cuda", bias_spread=0.0))
PY
    fi
    echo "== weights: $CHECKPOINT, $RANKS ranks with all weights each"
    sizes=(--model "$CHECKPOINT" --target sm_90a --dtype bf16 --prefill 512 --decode 64 --max-sequences 64 --max-context 1024 --kv-tokens 65536)
    # Three runs of a plan each way, by turns, with the files in memory.
    weigh() {
        cat "$CHECKPOINT"/*.safetensors >/dev/null
        rm -f "$1".*.jsonl
        for run in 1 2 3; do for how in read share; do
            quietly "${RUN[@]}" "$LFM2C" run "$1" --model "$CHECKPOINT" --weights $how --input weights.jsonl --output "$1.$how.$run.jsonl" || continue
            grep -h '^weights' err.txt | sed "s/^/  $how: /"
            echo "  $how, run $run: $(grep -oh 'ready in [0-9.]* s' err.txt), $(same "$1.$how.$run.jsonl" "$1.read.1.jsonl")"
        done; done
    }
    lines 60 8 >weights.jsonl
    TOLD=compiling quietly "$LFM2C" compile "${sizes[@]}" -o whole.plan && weigh whole.plan
    TOLD="compiling, packed" quietly "$LFM2C" compile "${sizes[@]}" --pack -o packed.plan && weigh packed.plan
    if ((RANKS >= 4)); then
        echo "  experts over two ranks, $((RANKS / 2)) groups"
        TOLD=compiling quietly "$LFM2C" compile "${sizes[@]}" --ranks expert=2 -o groups.plan && weigh groups.plan
    fi
    echo "  rank 0 killed while it reads and the others wait, mpirun itself stopped"
    rm -f long.out
    "${RUN[@]}" "$LFM2C" run whole.plan --model "$CHECKPOINT" --weights share --input weights.jsonl --output long.out >out.txt 2>err.txt &
    launcher=$!
    ranks=()
    for _ in $(seq 3000); do
        mapfile -t ranks < <(pgrep -P $launcher)
        # It has touched a GB of the files.
        held=$(awk '/RssFile|RssShmem/ { sum += $2 } END { print sum }' "/proc/${ranks[0]:-none}/status" 2>/dev/null)
        ((${held:-0} > 1000000)) && break
        kill -0 $launcher || break
        sleep 0.02
    done
    if kill -STOP $launcher && kill -KILL "${ranks[0]:-none}"; then
        begun=$(date +%s.%N)
        for _ in $(seq 200); do kill -0 "${ranks[1]}" 2>/dev/null && [[ $(ps -o stat= -p "${ranks[1]}") != Z* ]] || break; sleep 0.1; done
        echo "  rank 1 has ended after $(seconds "$begun") s (at most 10), $( [[ -s long.out ]] && echo "with results" || echo "before any result")"
        kill -KILL "${ranks[@]}" 2>/dev/null
    else
        echo "FAILED: rank 0 was not seen to read"; failed=1
    fi
    kill -CONT $launcher 2>/dev/null
    wait $launcher 2>/dev/null
    sed -n 's/^lfm2c: rank/  told: rank/p' err.txt
fi
exit $failed
