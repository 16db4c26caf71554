#!/usr/bin/env bash
# Slurm's daemons and commands, and shellcheck, from Debian's packages, unpacked into the folder $1; the system is left as it is.
# What is installed already is not unpacked, and is used as it is.
set -euo pipefail
mkdir -p "$1/packages"
cd "$1"
if [ "$(id -u)" -eq 0 ]; then apt-get update -qq; fi
wanted=$(apt-get install --simulate -qq --no-install-recommends slurmctld slurmd slurm-client shellcheck | awk '/^Inst/ {print $2}')
# shellcheck disable=SC2086
(cd packages && apt-get download -qq -o APT::Sandbox::User=root $wanted)
for file in packages/*.deb; do
  [ ! -e "$file" ] || dpkg -x "$file" .
done
# The daemons take their configuration by the name they are called by, which is not that of Debian's files.
for daemon in slurmctld slurmd slurmstepd; do
  [ ! -e "usr/sbin/$daemon-wlm" ] || ln -sf "$daemon-wlm" "usr/sbin/$daemon"
done
