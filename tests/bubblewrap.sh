# shellcheck shell=bash
# Sourced by tests/run.sh: the sandbox of the code reward needs Debian's bubblewrap, and a suite that was skipped has not passed.

# Where CI=true, root and apt-get allow it, install what is missing. Never fails: without a network the tests go on.
install_bubblewrap() {
    if command -v bwrap >/dev/null || [[ "${CI:-}" != true ]] || ! command -v apt-get >/dev/null || [[ "$(id -u)" != 0 ]]; then
        return 0
    fi
    echo "== bubblewrap"
    local apt=(env DEBIAN_FRONTEND=noninteractive timeout 120 apt-get -qq -o DPkg::Lock::Timeout=60)
    if ! "${apt[@]}" install -y bubblewrap >/dev/null 2>&1; then
        "${apt[@]}" update >/dev/null 2>&1 || echo "apt-get update failed"
        "${apt[@]}" install -y bubblewrap >/dev/null 2>&1 || echo "apt-get install bubblewrap failed; the tests go on without it"
    fi
}

# The closing line, if the sandbox suite cannot have run.
report_sandbox() { # report_sandbox PYTHON
    if ! command -v bwrap >/dev/null; then
        echo "sandbox suite: NOT RUN, NOT PASSED (bubblewrap is missing: apt-get install bubblewrap)"
        return 0
    fi
    local faults
    faults="$("$1" -c 'from megatron_m1.rl.rewards.sandbox import probe_sandbox; print("; ".join(probe_sandbox()))' 2>&1)" || true
    if [[ -n "$faults" ]]; then
        echo "sandbox suite: NOT RUN, NOT PASSED ($faults)"
    fi
}
