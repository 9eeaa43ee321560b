"""OpenStack's own messaging, oslo.messaging, driven by lines of JSON: a client and a server of remote calls.

Arguments: a transport URL, control_exchange, and options of [oslo_messaging_rabbit], each OPTION=VALUE. Each line on standard
input is a command, each on standard output its answer, {"ok": …} or {"error": {"class", "module", "text"}}.
"""

import json
import logging
import queue
import sys
import tempfile
import time

from cinder import exception
from oslo_config import cfg
import oslo_messaging as messaging

logging.basicConfig(level=logging.CRITICAL)


class Plain:
    """Leaves arguments and contexts as they are."""

    def serialize_entity(self, context, entity):
        return entity

    def deserialize_entity(self, context, entity):
        return entity

    def serialize_context(self, context):
        return context

    def deserialize_context(self, context):
        return context


class Endpoint:
    target = messaging.Target(version="1.3")

    def __init__(self, told):
        self.told = told

    def echo(self, context, value):
        return {"value": value, "project_id": context.get("project_id")}

    def nothing(self, context):
        pass

    def refuse(self, context, reason):
        raise exception.InvalidBackup(reason=reason)

    def slow(self, context, seconds):
        time.sleep(seconds)
        return "at last"

    def tell(self, context, value):
        self.told.put(value)


class Listener:
    def __init__(self, told):
        self.told = told

    def put(self, priority, context, publisher_id, event_type, payload, metadata):
        self.told.put({"priority": priority, "context": context, "publisher_id": publisher_id,
                       "event_type": event_type, "payload": payload, "metadata": metadata})

    def info(self, *told):
        self.put("info", *told)

    def error(self, *told):
        self.put("error", *told)


def main():
    url, exchange, *options = sys.argv[1:]
    conf = cfg.CONF
    with tempfile.NamedTemporaryFile("w", suffix=".conf") as file:
        # The manager of queues counts in a file, which it locks.
        locks = ["[oslo_concurrency]", f"lock_path = {tempfile.gettempdir()}"]
        file.write("\n".join(["[DEFAULT]", f"control_exchange = {exchange}", *locks, "[oslo_messaging_rabbit]", *options]))
        file.flush()
        conf(["--config-file", file.name])
    trusted = ["cinder.exception", "oslo_messaging.rpc.dispatcher"]
    transport = messaging.get_rpc_transport(conf, url, allowed_remote_exmods=trusted)
    told = queue.Queue()
    servers = []

    def client(command):
        target = messaging.Target(exchange=exchange, topic=command["topic"], server=command.get("server"),
                                  fanout=command.get("fanout"), version="2.0")
        return messaging.get_rpc_client(
            transport, target, timeout=command.get("timeout", 60),
            call_monitor_timeout=command.get("call_monitor_timeout"), serializer=Plain())

    def run(command):
        match command["do"]:
            case "call":
                prepared = client(command).prepare(version=command["version"])
                return prepared.call(command["context"], command["method"], **command["args"])
            case "cast":
                prepared = client(command).prepare(version=command["version"])
                return prepared.cast(command["context"], command["method"], **command["args"])
            case "serve":
                target = messaging.Target(exchange=exchange, topic=command["topic"], server=command["server"])
                server = messaging.get_rpc_server(transport, target, [Endpoint(told)], executor="threading",
                                                  serializer=Plain())
                server.start()
                servers.append(server)
            case "listen":
                notified = messaging.get_notification_transport(conf, url)
                listener = messaging.get_notification_listener(
                    notified, [messaging.Target(exchange=exchange, topic=command["topic"])], [Listener(told)],
                    executor="threading", serializer=Plain())
                listener.start()
                servers.append(listener)
            case "told":
                return told.get(timeout=60)

    for line in sys.stdin:
        try:
            answer = {"ok": run(json.loads(line))}
        except Exception as error:  # whatever it is, the test wants to know
            kind = type(error)
            answer = {"error": {"class": kind.__name__, "module": kind.__module__, "text": str(error)}}
        print(json.dumps(answer), flush=True)
    for server in servers:
        server.stop()


main()
