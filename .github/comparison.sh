#!/usr/bin/env bash
# All runs of the README's comparison for one head and seed, one after another, into runs/HEAD-SEED/, or for a folder
# of photos in COCO's layout into runs/PHOTOS-HEAD-SEED/, with the small recipe. With START, what --weights takes, it is
# the recipe for photos, into runs/PHOTOS-START-HEAD-SEED/; FLAGS are then train.py's.
#     .github/comparison.sh fcos 0 [PHOTOS [START [FLAGS]]]
# Stopped and started again, it goes on where it was. Teacher and student train equally long (ITERS iterations, a
# variable of the environment, or those of the small recipe); whatever trains in one go trains as long as both together.
# Another variable, BOTH, holds flags for teachers and students alike.
set -euo pipefail
head=$1 seed=$2 name=$1 flags=()
[ "$head" = retinanet ] && iters=${ITERS:-2000} || iters=${ITERS:-1200}
if [ $# -ge 3 ]; then
    name=$(basename "$3")-$head flags=(--data "$3" --recipe small)
fi
if [ $# -ge 4 ]; then
    name=$(basename "$3")-$(basename "$4" .pth)-$head flags=(--data "$3" --recipe photos --weights "$4" "${@:5}")
fi
runs=runs/$name-$seed
mkdir -p "$runs"

run() {  # the folder's name, the script, its flags
    local folder=$1 script=$2
    shift 2
    [ -e "$runs/$folder/finished" ] && return
    [ "$script" = train.py ] && set -- ${flags[@]+"${flags[@]}"} "$@"  # a student inherits them, and not the start
    python "$script" --out "$runs/$folder" --resume --head "$head" --seed "$seed" --iters "$iters" \
        ${BOTH:-} "$@" >> "$runs/$folder.txt" 2>&1
    touch "$runs/$folder/finished"
}

teacher="--teacher $runs/teacher/last.pt"
pkd="--kd-loss pkd --kd 3"
both=$((2 * iters))
run teacher train.py
run student-pkd distill.py $teacher $pkd
run student-alone distill.py $teacher --kd 0
run student distill.py $teacher
run conventional train.py --no-align --iters $both
run low-alone train.py --res low --iters $both
[ $# -ge 3 ] && exit
run student-narrow distill.py $teacher --head-channels 32 $pkd
run student-slim distill.py $teacher --head-convs 1 $pkd
run student-cold distill.py $teacher --weights none
run student-cold-alone distill.py $teacher --weights none --kd 0
if [ "$head-$seed" = fcos-0 ]; then  # a student of half its teacher's width
    run teacher-wide train.py --width 0.5
    run student-half distill.py --teacher "$runs/teacher-wide/last.pt" --width 0.25 $pkd
    run student-half-alone distill.py --teacher "$runs/teacher-wide/last.pt" --width 0.25 --kd 0
fi
