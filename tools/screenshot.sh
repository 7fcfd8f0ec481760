#!/usr/bin/env bash
# SPDX-License-Identifier: Apache-2.0
# A picture of a report for the README, with headless Chromium (Debian: chromium).
#
#   tools/screenshot.sh demo-output/report.html docs/images/report.png [light|dark] [height]
set -euo pipefail
page=$(realpath "${1:?a report.html}")
image=${2:?a .png to write}
theme=${3:-light}
height=${4:-1240}
chromium=$(command -v chromium || command -v chromium-browser || command -v google-chrome) ||
  { echo "screenshot: chromium is missing: apt-get install chromium" >&2; exit 1; }
"$chromium" --headless --no-sandbox --disable-gpu --hide-scrollbars \
  --window-size="1280,$height" --screenshot="$image" "file://$page?theme=$theme" 2>/dev/null
echo "$image: $(stat -c %s "$image") bytes"
