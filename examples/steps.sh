# Sourced by the demos: steps that are skipped where their result is there.
#
#   DEMO=directory of the results

mkdir -p "$DEMO/logs"
STARTED=$SECONDS

# Run a step unless the file it makes is there: step TITLE FILE COMMAND...
step() {
  local title=$1 marker=$2 log
  shift 2
  log="$DEMO/logs/$(tr ' ' '-' <<<"${title%%:*}").log"
  echo
  echo "== $title"
  if compgen -G "$marker" >/dev/null; then
    echo "   done before, reused: $(compgen -G "$marker" | head -1)"
    return
  fi
  echo "   \$ $*"
  "$@" 2>&1 | tee "$log" | sed -u 's/^/   /' || true
  # NeMo-Run exits with 0 after a failed job, so what counts is whether the step's result is there.
  if ! compgen -G "$marker" >/dev/null; then
    grep -E "Error" "$log" | tail -5 || tail -20 "$log"
    echo "   failed: expected $marker; the whole output is in $log" >&2
    exit 1
  fi
}
