"""Raw requests to a server."""

import urllib.error
import urllib.request

import tritonclient.grpc
import tritonclient.http

ANY = {"http_port": 0, "grpc_port": 0, "metrics_port": 0}


PROTOCOLS = ("grpc", "http")


def raw(server, protocol):
    module = {"grpc": tritonclient.grpc, "http": tritonclient.http}[protocol]
    address = getattr(server, f"{protocol}_url").partition("://")[2]
    return module, module.InferenceServerClient(address)


def tiny_repository(root):
    """Write a repository with one model that never answers. The server starts in a second."""
    (root / "idle" / "1").mkdir(parents=True)
    (root / "idle" / "config.pbtxt").write_text(
        'backend: "python"\ninput [{ name: "I" data_type: TYPE_FP32 dims: [1] }]\n'
        'output [{ name: "O" data_type: TYPE_FP32 dims: [1] }]\n'
    )
    (root / "idle" / "1" / "model.py").write_text(
        "class TritonPythonModel:\n    def execute(self, requests):\n        return []\n"
    )
    return root


def ask_http(server, method, path, headers):
    """Return status and body."""
    body = b"{}" if method == "POST" else None
    request = urllib.request.Request(
        f"{server.http_url}/v2/{path}".rstrip("/"), method=method, headers=headers, data=body
    )
    try:
        with urllib.request.urlopen(request) as answer:
            return answer.status, answer.read()
    except urllib.error.HTTPError as error:
        with error:
            return error.code, error.read()
