#!/usr/bin/env bash
# Everything that can be measured on this machine's accelerator: docs/accelerator.md.
#
#   benchmarks/accelerator.sh VENV [--minutes=40 ...]     # installs into a virtual environment first
#   benchmarks/accelerator.sh --here [--minutes=40 ...]   # installs nothing, takes `python`
#
# $ACCELERATOR says what to install for where it is not seen: cuda, tpu or cpu. $PYTHON makes the
# environment (default: python3; 3.11 to 3.13).
set -euo pipefail
cd "$(dirname "$0")/.."

usage() { sed -n '4,5s/^# *//p' "$0" >&2; exit 2; }
[ $# -gt 0 ] || usage
place=$1
shift
if [ "$place" = --here ]; then
  exec python -m benchmarks.accelerator "$@"
fi
case $place in -*) usage ;; esac

seen() {
  if command -v nvidia-smi > /dev/null && nvidia-smi -L 2> /dev/null | grep GPU > /dev/null; then
    echo cuda
  elif compgen -G '/dev/accel[0-9]*' > /dev/null || compgen -G '/dev/vfio/[0-9]*' > /dev/null; then
    echo tpu
  else
    echo cpu
  fi
}
kind=${ACCELERATOR:-$(seen)}
case $kind in
  cuda | tpu | cpu) ;;
  *) echo "ACCELERATOR=$kind: expected cuda, tpu or cpu" >&2; exit 2 ;;
esac
echo "installing for: $kind, into $place" >&2
[ -x "$place/bin/python" ] || "${PYTHON:-python3}" -m venv "$place"
pip=("$place/bin/python" -m pip install --quiet)

# Without a GPU, PyTorch's build for CPUs: the usual one has gigabytes of CUDA. What it needs comes
# with the package, from the usual place.
torch_for_cpu() {
  local version
  version=$(sed -n 's/^ *torch == *//p' setup.cfg)
  "${pip[@]}" --no-deps "torch==$version" --index-url https://download.pytorch.org/whl/cpu ||
    echo "no PyTorch for CPUs alone there: the usual one" >&2
}
case $kind in
  cuda)
    # Both bring CUDA; where pip finds no versions that suit both, JAX is measured alone.
    "${pip[@]}" -e ".[cuda,convert]" || {
      echo "PyTorch and JAX do not go together here: PyTorch for the CPU, JAX is measured alone" >&2
      "${pip[@]}" -e ".[cuda]"
      torch_for_cpu
      "${pip[@]}" -e ".[cuda,convert]"
    }
    ;;
  tpu | cpu)
    torch_for_cpu
    extras=convert
    [ "$kind" = cpu ] || extras="$kind,convert"
    "${pip[@]}" -e ".[$extras]"
    ;;
esac
exec "$place/bin/python" -m benchmarks.accelerator "$@"
