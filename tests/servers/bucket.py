"""A local bucket called "bucket": python bucket.py PORT [refuses]

gcp-storage-emulator, with what TensorStore needs of Cloud Storage and it leaves out: the generation of what is read,
conditions on it, and the two ends of a range of names. One that refuses answers 403 to whatever writes.
"""

import json
import sys
import threading
from collections.abc import Callable
from http import HTTPStatus
from typing import Any

from gcp_storage_emulator import server
from gcp_storage_emulator.handlers import objects

_NOTHING = "0"
"""The generation of what is not there."""


def _generation(storage: Any, bucket: str, name: str) -> str:
    try:
        return storage.get_file_obj(bucket, name)["generation"]
    except Exception:  # whatever says that it is not there
        return _NOTHING


def _with_generations(handler: Callable[..., None]) -> Callable[..., None]:
    def handle(request: Any, response: Any, storage: Any, **rest: Any) -> None:
        bucket, name = request.params["bucket_name"], request.params.get("object_id")
        name = name or (request.query.get("name") or [None])[0]
        if name is not None:
            there = _generation(storage, bucket, name)
            if request.query.get("ifGenerationMatch", [there])[0] != there:
                response.status = HTTPStatus.PRECONDITION_FAILED
                return
            if there in request.query.get("ifGenerationNotMatch", []):
                response.status = HTTPStatus.NOT_MODIFIED
                return
        handler(request, response, storage, **rest)
        if name is not None and (now := _generation(storage, bucket, name)) != _NOTHING:
            response["x-goog-generation"] = now

    return handle


def _in_range(request: Any, response: Any, storage: Any, **rest: Any) -> None:
    objects.ls(request, response, storage, **rest)
    first, end = (request.query.get(name, [""])[0] for name in ("startOffset", "endOffset"))
    if response.status == HTTPStatus.OK and (first or end):
        found = json.loads(response._content)
        found["items"] = [one for one in found["items"] if one["name"] >= first and not (end and one["name"] >= end)]
        response.json(found)


def _forbidden(request: Any, response: Any, storage: Any, **rest: Any) -> None:
    _ = request.data  # read, or the next request would begin with it
    response.status = HTTPStatus.FORBIDDEN
    response.json({"error": {"code": 403, "message": "the account does not have storage.objects.create access"}})


def main(port: int, refuses: bool) -> None:
    """Serves until it is killed."""
    changed = {objects.ls: _in_range}
    changed |= {handler: _with_generations(handler) for handler in (objects.get, objects.download, objects.delete)}
    changed[objects.insert] = _forbidden if refuses else _with_generations(objects.insert)
    server.HANDLERS = tuple(
        (pattern, {method: changed.get(handler, handler) for method, handler in methods.items()})
        for pattern, methods in server.HANDLERS
    )
    running = server.create_server("127.0.0.1", port, in_memory=True, default_bucket="bucket")
    running.start()
    threading.Event().wait()


if __name__ == "__main__":
    main(int(sys.argv[1]), "refuses" in sys.argv[2:])
