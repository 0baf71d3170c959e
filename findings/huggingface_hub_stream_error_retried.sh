#!/usr/bin/env bash
# A body that breaks off inside `with http_stream_backoff(...)` of huggingface_hub 2 reaches the caller as a RuntimeError, after one more request.
#
# Versions:  huggingface_hub 2.4.0 with httpx2 2.16.2, and 1.0.0 with httpx 0.28.1; Python 3.11.
# Behaviour: the context manager yields the response inside the `try` that retries. In 2.4.0 the errors that are retried include
#            `RemoteProtocolError`: raised in the block of the caller, it is caught there as if the request had failed, and the request is
#            sent again. The second answer cannot be handed over, since a context manager yields once. In 1.0.0 that error is not among
#            those, and the caller gets it.
# Seen:      2.4.0: RuntimeError: generator didn't stop after throw(), after 2 requests
#            1.0.0: RemoteProtocolError, after 1 request
# Fails if one of these is another.
set -euo pipefail
folder=$(mktemp -d)
trap 'rm -rf "$folder"' EXIT
cat > "$folder/look.py" <<'PY'
import http.server
import logging
import threading

import huggingface_hub
from huggingface_hub.utils import http_stream_backoff

logging.disable()
requests = []


class HalfAnswer(http.server.BaseHTTPRequestHandler):
    def do_GET(self):
        requests.append(self.path)
        self.send_response(200)
        self.send_header("Content-Length", "100")
        self.end_headers()
        self.wfile.write(b"x" * 50)

    def log_message(self, *words):
        pass


server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), HalfAnswer)
threading.Thread(target=server.serve_forever, daemon=True).start()
try:
    with http_stream_backoff("GET", f"http://127.0.0.1:{server.server_port}/file", base_wait_time=0.1) as response:
        for _ in response.iter_bytes():
            pass
    seen = "no error"
except Exception as error:
    seen = type(error).__name__ + (f": {error}" if isinstance(error, RuntimeError) else "")
version = huggingface_hub.__version__
print(f"{version}: {seen}, after {len(requests)} request{'s' * (len(requests) > 1)}")
expected = {"2.4.0": ("RuntimeError: generator didn't stop after throw()", 2), "1.0.0": ("RemoteProtocolError", 1)}
assert (seen, len(requests)) == expected[version]
PY
for pair in "2.4.0 httpx2==2.16.2" "1.0.0 httpx==0.28.1"; do
    read -r version transport <<< "$pair"
    python3 -m pip install --quiet --disable-pip-version-check --target "$folder/site" huggingface_hub==$version $transport
    PYTHONPATH="$folder/site" python3 "$folder/look.py"
    rm -r "$folder/site"
done
