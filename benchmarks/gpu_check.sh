#!/usr/bin/env bash
# Verifies this package on a machine with a GPU, once, in less than nine minutes:
#
#     bash benchmarks/gpu_check.sh OUT [--only PART,PART] [--device cuda|cpu] [--tiny]
#
# Parts, the most valuable first; each has a limit of its own, and one that fails or runs out of time does not end the
# others. All of it works without a network, if what `pip install ".[test,bench]"` brings is installed or on PYTHONPATH.
#
#   build      the kernels for the GPU that is there       summary.txt
#   machine    copies, attention, matrix products          machine.csv
#   tests      the ops' tests that need a GPU              tests.txt
#   step       XL/16 with all terms, PixelDiT-XL, 64 images   step.csv
#   kernels    ops at the shapes of both XL, bf16          kernels.csv
#   pixel_block   a pixel block of PixelDiT-XL             pixel_block.csv
#   sanitizer  compute-sanitizer on tests of the ops       sanitizer.txt
#   profile    where the time of one step goes             profile.txt
#
# With --device cpu the package is used as it is installed, and nothing is built or sanitized; --tiny shortens all else.
# Tables and plots of a CSV: python -m benchmarks --suite NAME --out OUT --draw-only
set -uo pipefail

usage() {
  echo "usage: bash benchmarks/gpu_check.sh OUT [--only PART,PART] [--device cuda|cpu] [--tiny]" >&2
  exit 2
}

PARTS="build machine tests step kernels pixel_block sanitizer profile"
out="" only="" device=cuda tiny=false
while [ $# -gt 0 ]; do
  case $1 in
    --only) only=${2//,/ } && shift || usage ;;
    --device) device=$2 && shift || usage ;;
    --tiny) tiny=true ;;
    -*) usage ;;
    *) [ -z "$out" ] || usage && out=$1 ;;
  esac
  shift
done
[ -n "$out" ] && [[ $device =~ ^(cpu|cuda)$ ]] || usage
for part in $only; do
  [[ " $PARTS " == *" $part "* ]] || { echo "--only takes ${PARTS// /, }; got $part" >&2; exit 2; }
done
mkdir -p "$out" || exit 2
out=$(cd "$out" && pwd)
cd "$(dirname "${BASH_SOURCE[0]}")/.." || exit 1

export PYTHONUNBUFFERED=1 GOMP_SPINCOUNT=1000 PIP_DISABLE_PIP_VERSION_CHECK=1
python=${PYTHON:-python3}
scratch=$(mktemp -d)
trap 'rm -rf "$scratch"' EXIT
site=$PWD/build/gpu_check # kept: a rerun of one part uses the build of the last one
[ "$device" = cpu ] || export PYTHONPATH=$site${PYTHONPATH:+:$PYTHONPATH}
summary=$out/summary.txt
failed=false

say() { printf '%s\n' "$*" | tee -a "$summary"; }

# part NAME SECONDS COMMAND: runs the command line, unless --only leaves it out or a tool that it needs is not there.
part() {
  local name=$1 limit=$2 begin=$SECONDS code
  [ -z "$only" ] || [[ " $only " == *" $name "* ]] || return 0
  timeout --kill-after=5 "$limit" bash -euo pipefail -c "$3" > "$scratch/$name.log" 2>&1
  code=$?
  if [ $code -eq 0 ]; then
    say "$name: passed in $((SECONDS - begin)) s"
  elif [ $code -eq 124 ] || [ $code -eq 137 ]; then
    failed=true
    say "$name: ran out of its $limit s; what it had measured is kept"
  else
    failed=true
    say "$name: FAILED after $((SECONDS - begin)) s; the end of what it printed:"
    tail -n 25 "$scratch/$name.log" | tee -a "$summary"
  fi
}

: > "$summary"
say "$(date -u +%FT%TZ) commit $(git describe --always --dirty 2> /dev/null || echo unknown)"
"$python" - 2>&1 <<'EOF' | tee -a "$summary"
import importlib.util
import platform
import torch
print(f"Python {platform.python_version()}, torch {torch.__version__}, CUDA {torch.version.cuda}")
if torch.cuda.is_available():
    properties = torch.cuda.get_device_properties(0)
    print(f"{properties.name}, sm_{properties.major}{properties.minor}, {properties.total_memory / 2**30:.0f} GiB")
needed = "scikit_build_core pybind11 triton numpy timm lpips safetensors tyro docstring_parser yaml tqdm "
needed += "tensorboard sklearn scipy matplotlib PIL datasets pyarrow simplejpeg pytest pytest_timeout xdist filelock "
missing = [name for name in (needed + "liger_kernel").split() if importlib.util.find_spec(name) is None]
print("not installed: " + ", ".join(missing) if missing else "all that is needed is installed")
EOF
command -v nvidia-smi > /dev/null && nvidia-smi --query-gpu=driver_version,clocks.sm,clocks.mem --format=csv,noheader | tee -a "$summary"

bench="$python -m benchmarks --device $device --csv-only --out '$out'"
show="$python -c 'import pixelgen_kernels as k; print(k.__file__, k.build_info())'"
build="$show"
if [ "$device" = cuda ]; then
  build="PIXELGEN_CUDA=ON PIXELGEN_CUDA_ARCHS=native $python -m pip install --quiet --no-build-isolation --no-deps \
    --no-compile --upgrade --target '$site' . && cd / && $show"
fi
ops="tests/ops -m 'gpu and not slow' -n 8"
first="tests/ops/test_philox.py -m gpu -n 0"
machine="--max-seconds 25"
step="--only all_terms,pixeldit --repeats 20"
kernels="--shapes XL/16,PixelDiT-XL --dtypes bf16 --max-seconds 25"
pixels=""
profile=""
if [ "$device" = cpu ]; then
  ops="tests/ops -m 'not slow' -n auto"
  first="tests/ops/test_philox.py -n 0"
fi
if $tiny; then
  ops="tests/ops/test_swiglu.py -n 0"
  machine="--only copy,attention --batch 1 --max-seconds 10"
  step="--only all_terms --providers ours --batch 1 --repeats 3"
  kernels="--only swiglu --shapes L/16 --dtypes fp32 --repeats 3"
  pixels="--providers ours --batch 1 --repeats 3"
  profile="--batch 1"
fi
ours=ours
[ "$device" = cpu ] || ours=ours,liger

part build 110 "$build"
part machine 40 "$bench --suite machine $machine"
# the bits of Philox first: every draw of a training step hangs on them
part tests 90 "failed=0
  $python -m pytest -q $first 2>&1 | tee '$out/tests.txt' || failed=1
  $python -m pytest -q $ops 2>&1 | tee -a '$out/tests.txt' || failed=1
  exit \$failed"
part step 140 "$bench --suite step $step"
# twice: with torch.compile it takes several times as long, and may run out of time
part kernels 70 "$bench --suite kernels $kernels --providers $ours; $tiny || $bench --suite kernels $kernels"
part pixel_block 20 "$bench --suite pixel_block $pixels"
if [ "$device" = cuda ]; then
  if command -v compute-sanitizer > /dev/null; then
    part sanitizer 40 "PYTORCH_NO_CUDA_MEMORY_CACHING=1 compute-sanitizer --error-exitcode 9 $python -m pytest -q -n 0 \
      -m gpu tests/ops/test_ops.py -k 'test_accuracy and odd' 2>&1 | tee '$out/sanitizer.txt'"
  else
    say "sanitizer: left out, compute-sanitizer is not on PATH"
  fi
fi
part profile 30 "$python -m benchmarks.profile_step --device $device $profile --out '$out/profile.txt'"
$failed && exit 1
exit 0
