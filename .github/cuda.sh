#!/usr/bin/env bash
# Everything that one CUDA device can tell, in less than 20 minutes, into cuda-report.txt, to be pasted into an issue:
# what machine this is, the tests that need a device, speed and memory beside torchvision's, the README's first
# commands, and, where a folder in COCO's layout is given, two minutes of COCO's recipe on it.
#     .github/cuda.sh [DATA]
# What fails or takes too long is told, and the rest goes on.
set -uo pipefail
repo=$(cd "$(dirname "$0")/.." && pwd)
runs=runs/cuda
failed=0

run() {  # seconds it may take, the command. SIGTERM, after which a training run saves what it has, is no failure of one
    local limit=$1 began=$SECONDS code=0
    shift
    printf '\n$ %s\n' "${*//$repo\//}"
    timeout --foreground --kill-after=60 "$limit" "$@" || code=$?
    echo "exit code $code after $((SECONDS - began)) s"
    [ "$code" = 0 ] || [ "$code-${2##*/}" = 124-train.py ] || [ "$code-${2##*/}" = 124-distill.py ] || ((++failed))
}

machine() {
    date -u
    git -C "$repo" log -1 --format='commit %h'
    nvidia-smi || echo "no nvidia-smi"
    python -c 'import platform, torch, torchvision as vision
print("python", platform.python_version(), "torch", torch.__version__, "torchvision", vision.__version__)
print("CUDA", torch.version.cuda, "cuDNN", torch.backends.cudnn.version(), "devices", torch.cuda.device_count())'
    echo "$(nproc) cores:$(grep -m 1 'model name' /proc/cpuinfo | cut -d : -f 2)"
    df -h /dev/shm | tail -n 1
}

parts() {  # in how many a batch of 16 is computed on this card
    python -c 'import torch
memory = torch.cuda.get_device_properties(0).total_memory / 2**30
parts = 1 if memory > 39 else 2 if memory > 22 else 4 if memory > 11 else 8
print(parts if torch.cuda.is_bf16_supported(including_emulation=False) else 2 * parts)'
}

everything() {
    machine
    run 240 python -m pytest -q -rs -p no:cacheprovider "$repo/tests/test_cuda.py" "$repo/tests/test_device_hygiene.py"
    run 360 python "$repo/.github/benchmark/benchmark.py" --device cuda
    run 210 python "$repo/train.py" --res multi --device cuda --out "$runs/teacher"
    run 150 python "$repo/distill.py" --teacher "$runs/teacher/last.pt" --device cuda --out "$runs/student"
    run 60 python "$repo/evaluate.py" --ckpt "$runs/student/last.pt" --device cuda --draw
    if [ $# = 1 ]; then  # the recipe is for hours: the limit stops it
        local accumulate
        accumulate=$(parts)
        run 120 python "$repo/train.py" --data "$1" --recipe coco --device cuda --weights none --workers 8 \
            --log-every 5 --accumulate "${accumulate:-1}" --out "$runs/coco"
    fi
    printf '\n%s failed, %s s in all\n' "$failed" "$SECONDS"
    [ "$failed" = 0 ]
}

everything "$@" 2>&1 | tee cuda-report.txt
code=$?
echo "written to cuda-report.txt"
exit "$code"
