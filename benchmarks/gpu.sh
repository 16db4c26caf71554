#!/usr/bin/env bash
# At most eight minutes on one GPU, most telling first: does training run, how fast is it, and of what is its time made.
#
#   benchmarks/gpu.sh OUT [--rehearse] [PART ...]
#
# OUT/summary.txt has a line for each part, OUT/session.tgz all that they wrote. --rehearse runs them on a CPU, small.
# PART names the parts to run; without one, all. Exit code 1 if one failed, ran out of time or was skipped.
#
# WHEELS   a folder from benchmarks/wheels.sh, laid over the packages of python3; unset, `python` is taken as it is
# BUDGET   seconds for everything (470); a part whose turn comes later is skipped
# shellcheck disable=SC2086,SC2317  # words of configs are split; functions are called by name
set -euo pipefail

[[ $# -ge 1 && $1 != -* ]] || { sed -n '2,10s/^# \{0,1\}//p' "$0" >&2; exit 2; }
ROOT=$(cd "$(dirname "$0")/.." && pwd)
mkdir -p "$1"
OUT=$(cd "$1" && pwd)
shift
REHEARSE=''
if [[ ${1:-} == --rehearse ]]; then REHEARSE=yes; shift; fi
CHOSEN=" $* " UNKNOWN=" $* "
BUDGET=${BUDGET:-470}
[[ -z ${WHEELS:-} ]] || WHEELS=$(cd "$WHEELS" && pwd)
WORK=$(mktemp -d)
trap 'rm -rf "$WORK"' EXIT
cd "$WORK"
export ROOT WORK WHEELS REHEARSE PYTHONUNBUFFERED=1 TORCHINDUCTOR_CACHE_DIR=$WORK/inductor TRITON_CACHE_DIR=$WORK/triton
[[ -z ${WHEELS:-} ]] || export PATH="$WORK/venv/bin:$PATH"  # made by the first part

# Words for configs. On a CPU one model stands for all sizes.
export ON=train.device=cuda BATCH_1b=train.global_batch_size=8 BATCH_110m=train.global_batch_size=16 WORKERS=4
CONFIGS=(1b 110m)
if [[ -n $REHEARSE ]]; then
  ON="train.device=cpu model.num_hidden_layers=1 model.hidden_size=64 model.intermediate_size=192"
  ON+=" model.num_attention_heads=4 model.num_key_value_heads=2 model.vocab_size=512 data.sequence_length=64"
  ON+=" train.micro_batch_size=2"
  BATCH_1b=train.global_batch_size=2 WORKERS=0 CONFIGS=(1b)
  export OMP_NUM_THREADS=1 TORCHINDUCTOR_COMPILE_THREADS=1
fi
export CONFIGS_WORDS="${CONFIGS[*]}"

# --- what parts run ---------------------------------------------------------------------------------------------------

environment() { # packages, data for what trains, and what the machine is
  if [[ -n ${WHEELS:-} ]]; then overlay; fi
  python -m megallama data build stdlib --output corpus --tokenizer bytes
  python - <<'PYTHON'
import importlib.metadata, os, platform, shutil, torch
names = ("torch", "deepspeed", "transformers")
print(", ".join([f"python {platform.python_version()}", *(f"{n} {importlib.metadata.version(n)}" for n in names)]))
device = "cpu" if os.environ["REHEARSE"] else torch.cuda.get_device_name()
print(f"{device}, {os.cpu_count()} cores, {shutil.disk_usage('.').free / 2**30:.0f} GiB of disk free")
PYTHON
  [[ -n $REHEARSE ]] || nvidia-smi --query-gpu=driver_version,memory.total,power.limit --format=csv,noheader
}

overlay() { # an environment over that of python3: a search path in a variable would not reach what tests start
  local under base site
  under=$(command -v python3)
  base=$("$under" -c 'import site; print(site.getsitepackages()[0])')
  "$under" -m venv --without-pip venv
  site=$(venv/bin/python -c 'import site; print(site.getsitepackages()[0])')
  "$under" -m pip install --quiet --no-index --no-deps --no-compile --no-cache-dir --target "$site" "$WHEELS"/*.whl >&2
  rm -rf "$site/megallama"  # its metadata stay; its code is that of this tree
  printf '%s\n' "$ROOT" "$base" >"$site/over.pth"
}

pretrain() { # RUN CONFIG WORD...
  local run=$1 config=$2
  shift 2
  python "$ROOT/launch/pretrain.py" --config "$ROOT/configs/$config.yaml" "run.dir=$run" data.path=corpus \
    data.tokenizer=bytes "$@" >&2
}

zero() { # side by side: what is shown is that they run
  local stage each waits=() failed=0
  for stage in 1 2 3; do
    pretrain "zero-$stage" debug "zero.stage=$stage" train.dtype=bf16 "${ON%% *}" train.steps=6 checkpoint.every=3 &
    waits+=($!)
  done
  for each in "${waits[@]}"; do wait "$each" || failed=1; done
  ((failed == 0))
  python "$ROOT/benchmarks/gpu_runs.py" trained zero-1 zero-2 zero-3
}

kernels() { # PART
  local config
  for config in $CONFIGS_WORDS; do python "$ROOT/benchmarks/gpu_kernels.py" "$1" "$ROOT/configs/$config.yaml" $ON; done
}

step() { # CONFIG CONTENDER
  local batch=BATCH_$1
  python "$ROOT/benchmarks/gpu_step.py" "$ROOT/configs/$1.yaml" "$2" --json "step-$1-$2.json" $ON "${!batch}"
}

long_run() { # two saves; the same words go on with it
  pretrain run-1b 1b $ON "$BATCH_1b" train.steps=22 checkpoint.every=11 schedule.warmup_steps=2 evaluation.every=0 \
    evaluation.samples=8
}

pretrain_1b() { # and the constant that it gives, which the resumed run is compared with
  long_run
  python "$ROOT/benchmarks/gpu_runs.py" forecast run-1b
  HOME=$WORK python -m megallama plan --calibrate run-1b | tee calibration.txt | grep ^efficiency | tr -s ' '
}

resume_1b() {
  python -m megallama checkpoint rollback run-1b 11 >&2
  HOME=$WORK long_run
  python "$ROOT/benchmarks/gpu_runs.py" resumed run-1b
}

gpu_tests() { # the test that takes all memory runs alone
  cd "$ROOT"
  local run=(python -m pytest -q -m gpu -p no:cacheprovider tests/test_cuda.py)
  "${run[@]}" -k 'not fit' --numprocesses "$WORKERS" >"$WORK/tests-1.txt" || { cat "$WORK/tests-1.txt" >&2; return 1; }
  "${run[@]}" -k fit >"$WORK/tests-2.txt" || { cat "$WORK/tests-2.txt" >&2; return 1; }
  tail -qn 1 "$WORK/tests-1.txt" "$WORK/tests-2.txt"
}
export -f environment overlay pretrain zero kernels step long_run pretrain_1b resume_1b gpu_tests

# --- the parts --------------------------------------------------------------------------------------------------------

parts() {
  local config contender
  part environment 90 environment
  part zero 60 zero
  part ceilings 40 'kernels ceilings'
  part attention 30 'kernels attention'
  for config in "${CONFIGS[@]}"; do
    for contender in engine bare transformers; do part "step-$config-$contender" 45 "step $config $contender"; done
    part "step-$config-engine-compile" 90 "step $config engine-compile"
  done
  part pretrain-1b 110 pretrain_1b
  part resume-1b 80 resume_1b
  part loss-head 30 'kernels head'
  part gpu-tests 100 gpu_tests
  for config in "${CONFIGS[@]}"; do
    for contender in bare-compile transformers-compile; do
      part "step-$config-$contender" 90 "step $config $contender"
    done
  done
}

part() { UNKNOWN=${UNKNOWN/ $1 / }; }
parts
if [[ -n ${UNKNOWN// /} ]]; then echo "no part is called${UNKNOWN% }" >&2; exit 2; fi

FAILED=0
part() { # NAME SECONDS COMMAND: within its own time, so that what goes wrong costs nothing else
  local name=$1 limit=$2 left=$((BUDGET - SECONDS)) began=$SECONDS state=ok code=0
  if [[ $CHOSEN != '  ' && $CHOSEN != *" $name "* && $name != environment ]]; then return; fi
  if [[ -n $REHEARSE ]]; then limit=$((2 * limit)); fi  # a CPU may have other work
  if ((left < limit)); then limit=$left; fi
  if ((limit < 1)); then
    state=skipped
  else
    { timeout --signal=KILL "$limit" bash -euo pipefail -c "$3" >"$name.txt" 2>"$name.log" </dev/null || code=$?; } \
      2>/dev/null  # where bash would say that it was killed
    if ((code)); then state=failed; fi
    if ((code && SECONDS - began >= limit)); then state='timed out'; fi
  fi
  if [[ $state != ok ]]; then FAILED=1; fi
  if [[ $state == failed ]]; then grep -v '^[[:space:]]*$' "$name.log" | tail -1 | cut -c1-300 >>"$name.txt" || true; fi
  printf '%-9s  %-28s %4d s  %s\n' "$state" "$name" $((SECONDS - began)) "$(sed 's/[[:space:]]*$//' "$name.txt" \
    2>>/dev/null | paste -sd'|' | sed 's/|/; /g')" | tee -a "$OUT/summary.txt"
}

: >"$OUT/summary.txt"
parts
cp "$OUT/summary.txt" .
tar -czf "$OUT/session.tgz" --exclude={venv,inductor,triton,checkpoints,'corpus.*'} .
exit "$FAILED"
