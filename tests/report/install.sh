#!/usr/bin/env bash
# A headless Chromium and what it needs, from Debian's packages, unpacked into the folder $1; the system is left as it is.
# Where there are no such packages nothing is unpacked, and the tests that need it are skipped.
set -euo pipefail
mkdir -p "$1/packages"
cd "$1"
if ! command -v apt-get > /dev/null; then echo "no apt-get, so no Chromium"; exit 0; fi
if [ "$(id -u)" -eq 0 ]; then apt-get update -qq; fi
if ! apt-cache show chromium-headless-shell > /dev/null 2>&1; then echo "no package chromium-headless-shell"; exit 0; fi
wanted=$(apt-get install --simulate -qq --no-install-recommends chromium-headless-shell fonts-dejavu-core | awk '/^Inst/ {print $2}')
# shellcheck disable=SC2086
(cd packages && apt-get download -qq -o APT::Sandbox::User=root $wanted)
for file in packages/*.deb; do
  [ ! -e "$file" ] || dpkg -x "$file" .
done
rm -rf packages
