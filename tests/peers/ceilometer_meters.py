"""What Ceilometer's own definitions make of notifications.

Each line on standard input is a notification, as listeners of oslo.messaging are told it; each on standard output its samples and
its event, in JSON.
"""

import json
import sys

from ceilometer import service
from ceilometer.event import converter
from ceilometer.meter import notifications
from stevedore import extension

# Some library says something there when it is loaded.
answers, sys.stdout = sys.stdout, sys.stderr
conf = service.prepare_service(argv=["ceilometer"], config_files=[])
meters = notifications.ProcessMeterNotifications(conf, None)
events = converter.setup_events(conf, extension.ExtensionManager("ceilometer.event.trait_plugin"))
for line in sys.stdin:
    told = json.loads(line)
    told["ctxt"] = told["context"]
    samples = [sample.as_dict() for sample in meters.build_sample(told)]
    event = events.to_event(told["priority"], told)
    print(json.dumps({"samples": samples, "event": event and event.serialize()}, default=str), file=answers, flush=True)
