#!/usr/bin/env bash
# All runs of the README's comparison for one head and seed, one after another, into runs/HEAD-SEED/.
#     .github/comparison.sh fcos 0
# Stopped and started again, it goes on where it was. Teacher and student train 2 000 iterations each; whatever trains
# in one go trains 4 000.
set -euo pipefail
head=$1 seed=$2
runs=runs/$head-$seed
mkdir -p "$runs"

run() {  # the folder's name, the script, its flags
    local name=$1 script=$2
    shift 2
    [ -e "$runs/$name/finished" ] && return
    python "$script" --out "$runs/$name" --resume --head "$head" --seed "$seed" "$@" >> "$runs/$name.txt" 2>&1
    touch "$runs/$name/finished"
}

teacher="--teacher $runs/teacher/last.pt"
pkd="--kd-loss pkd --kd 3"
run teacher train.py
run student-pkd distill.py $teacher $pkd
run student-alone distill.py $teacher --kd 0
run student distill.py $teacher
run conventional train.py --no-align --iters 4000
run low-alone train.py --res low --iters 4000
run student-slim distill.py $teacher --head-convs 1 $pkd
run student-cold distill.py $teacher --weights none
run student-cold-alone distill.py $teacher --weights none --kd 0
if [ "$head-$seed" = fcos-0 ]; then  # a student of half its teacher's width
    run teacher-wide train.py --width 0.5
    run student-half distill.py --teacher "$runs/teacher-wide/last.pt" --width 0.25 $pkd
    run student-half-alone distill.py --teacher "$runs/teacher-wide/last.pt" --width 0.25 --kd 0
fi
