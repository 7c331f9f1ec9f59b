#!/usr/bin/env bash
# All runs of the comparison for one head and seed, one after another: of the drawn shapes into runs/shapes-HEAD-SEED/,
# or of a folder of photos in COCO's layout into runs/PHOTOS-HEAD-SEED/, by the recipe that the scripts choose.
#     .github/comparison.sh fcos 0 [PHOTOS [FLAGS]]
# FLAGS are train.py's; students inherit what follows from them. Stopped and started again, it goes on where it was.
# Teacher and student train as long as the recipe says, whatever trains in one go as long as both together.
set -euo pipefail
head=$1 seed=$2 name=shapes flags=()
[ $# -ge 3 ] && name=$(basename "$3") flags=(--data "$3" "${@:4}")
runs=runs/$name-$head-$seed
mkdir -p "$runs"

run() {  # the folder's name, the script, its flags
    local folder=$1 script=$2
    shift 2
    [ -e "$runs/$folder/finished" ] && return
    [ "$script" = train.py ] && set -- --head "$head" ${flags[@]+"${flags[@]}"} "$@"  # a student inherits them
    python "$script" --out "$runs/$folder" --resume --seed "$seed" "$@" >> "$runs/$folder.txt" 2>&1
    touch "$runs/$folder/finished"
}

teacher=(--teacher "$runs/teacher/last.pt") pkd=(--kd-loss pkd --kd 3)
run teacher train.py
both=$((2 * $(tail -n 1 "$runs/teacher/log.jsonl" | sed 's/.*"done": \([0-9]*\).*/\1/')))
run student distill.py "${teacher[@]}"
run student-alone distill.py "${teacher[@]}" --kd 0
run conventional train.py --no-align --iters $both
run low-alone train.py --res low --iters $both
run student-pkd distill.py "${teacher[@]}" "${pkd[@]}"
[ $# -ge 3 ] && exit
run conventional-half train.py --no-align
[ "$head" = fcos ] && run student-long distill.py "${teacher[@]}" --iters 4800
for iters in 2400 4800; do  # the same student under a teacher that trained longer
    [ "$head" = fcos ] || break
    run teacher-$iters train.py --iters $iters
    run student-$iters distill.py --teacher "$runs/teacher-$iters/last.pt"
    run student-alone-$iters distill.py --teacher "$runs/teacher-$iters/last.pt" --kd 0
done
run student-narrow distill.py "${teacher[@]}" --head-channels 32 "${pkd[@]}"
run student-slim distill.py "${teacher[@]}" --head-convs 1 "${pkd[@]}"
run student-cold distill.py "${teacher[@]}" --weights none
run student-cold-alone distill.py "${teacher[@]}" --weights none --kd 0
if [ "$head-$seed" = fcos-0 ]; then  # a student of half its teacher's width
    run teacher-wide train.py --width 0.5
    run student-half distill.py --teacher "$runs/teacher-wide/last.pt" --width 0.25 "${pkd[@]}"
    run student-half-alone distill.py --teacher "$runs/teacher-wide/last.pt" --width 0.25 --kd 0
fi
