"""Attaches volumes to this host by os-brick, as Cinder's own backup service does; brick.rs beside it runs it.

It reads one request, a line of JSON, from standard input, and writes one answer, a line of JSON, to standard output. Standard input
stays open for as long as somebody waits for the answer.
"""
import json
import logging
import os
import shlex
import signal
import sys
import threading

# What libraries print must not be taken for the answer.
ANSWERS = os.fdopen(os.dup(1), "w")
os.dup2(2, 1)
# Modules come from where Python is installed, and not from the folder that this happens to run in.
sys.path = [folder for folder in sys.path if folder]


class OneLine(logging.Formatter):
    """Without tracebacks, which are of use to os-brick's authors alone."""

    def formatException(self, raised):
        return f"{raised[0].__name__}: {raised[1]}"

    def format(self, record):
        return " ".join(super().format(record).split())


def read_request():
    line = b""
    while not line.endswith(b"\n"):
        piece = os.read(0, 1 << 16)
        if not piece:
            sys.exit("nobody asked for anything")
        line += piece
    return json.loads(line)


def end_with_the_worker():
    while os.read(0, 1):
        pass
    # What was begun must not go on beside what the next worker begins.
    os.killpg(os.getpgrp(), signal.SIGKILL)


def chown(owner, path, root_helper):
    from oslo_concurrency import processutils

    processutils.execute("chown", str(owner), path, run_as_root=True, root_helper=root_helper)


def properties(brick, request):
    return brick.get_connector_properties(
        request["root_helper"], request["my_ip"], request["multipath"], request["enforce_multipath"])


def connector(brick, request):
    connection = request["connection"]
    return brick.InitiatorConnector.factory(
        connection["driver_volume_type"], request["root_helper"], use_multipath=request["multipath"],
        device_scan_attempts=request["scan_attempts"], conn=connection, expect_raw_disk=True)


def connect(brick, request):
    found, data = connector(brick, request), request["connection"]["data"]
    device = found.connect_volume(data)
    try:
        path = device["path"]
        path = path.decode() if isinstance(path, bytes) else path
        owner = None
        if request["take"] and os.geteuid() != 0 and os.stat(path).st_uid != os.getuid():
            owner = os.stat(path).st_uid
            chown(os.getuid(), path, request["root_helper"])
    except BaseException:
        found.disconnect_volume(data, device, force=True, ignore_errors=True)
        raise
    return {"path": path, "device": device, "owner": owner}


def disconnect(brick, request):
    attached = request["attached"]
    if attached and attached["owner"] is not None and os.path.exists(attached["path"]):
        try:
            chown(attached["owner"], attached["path"], request["root_helper"])
        except Exception as error:
            logging.warning("%s is not given back to its owner: %s", attached["path"], error)
    connector(brick, request).disconnect_volume(
        request["connection"]["data"], attached and attached["device"], force=True, ignore_errors=attached is None)


def answer_to(request):
    try:
        import os_brick
    except ModuleNotFoundError as error:
        if error.name == "os_brick":
            return {"missing": True}
        raise
    from os_brick import privileged
    from os_brick.initiator import connector as brick
    from oslo_config import cfg
    from oslo_privsep import priv_context

    files = [argument for file in request["conf_files"] for argument in ("--config-file", file)]
    cfg.CONF(files, project="cinder", prog="cinder-backup", default_config_files=[], default_config_dirs=[])
    os_brick.setup(cfg.CONF)
    if os.geteuid() == 0:
        # Commands need no daemon then that runs them as root.
        for context in vars(privileged).values():
            if isinstance(context, priv_context.PrivContext):
                context.set_client_mode(False)
    else:
        priv_context.init(root_helper=shlex.split(request["root_helper"]))
    asked = {"properties": properties, "connect": connect, "disconnect": disconnect}
    return {"done": asked[request["do"]](brick, request)}


def plain(thing):
    return thing.decode() if isinstance(thing, bytes) else str(thing)


def main():
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(OneLine("%(levelname)s %(name)s: %(message)s"))
    logging.basicConfig(level=logging.WARNING, handlers=[handler])
    request = read_request()
    threading.Thread(target=end_with_the_worker, daemon=True).start()
    try:
        answer = answer_to(request)
    except Exception as error:
        answer = {"exception": type(error).__name__, "message": str(error)}
    ANSWERS.write(json.dumps(answer, default=plain) + "\n")
    ANSWERS.flush()
    # Without waiting for threads that libraries have begun.
    os._exit(0)


main()
