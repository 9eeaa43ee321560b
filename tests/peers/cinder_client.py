"""python-cinderclient at Cinder's HTTP API without Keystone, driven by lines of JSON.

Arguments: the address of the API, such as http://127.0.0.1:8776/v3, and the ids of a user and a project. Each line on standard
input is a call of the client, [MANAGER, METHOD, ARGUMENTS], such as ["backups", "get", {"backup_id": ID}], or
[MANAGER, "settled", ID], which waits until something has a status that stays; each on standard output is the answer, {"ok": …} or
{"error": {"status", "message"}}.
"""

import json
import sys
import time

from cinderclient import client
from cinderclient.contrib import noauth
from keystoneauth1 import session

SETTLED = {"available", "error", "error_deleting", "error_restoring", "in-use"}
WAIT_SECONDS_MAX = 120


def plain(answer):
    if isinstance(answer, dict):
        return answer
    if isinstance(answer, list):
        return [plain(item) for item in answer]
    return answer.to_dict() if hasattr(answer, "to_dict") else None


def settled(manager, id):
    end = time.time() + WAIT_SECONDS_MAX
    while True:
        found = manager.get(id)
        if found.status in SETTLED or time.time() > end:
            return found
        time.sleep(0.2)


def main():
    endpoint, user, project = sys.argv[1:]
    auth = noauth.CinderNoAuthPlugin(user, project, endpoint=endpoint)
    cinder = client.Client("3.71", session=session.Session(auth=auth))
    for line in sys.stdin:
        name, method, arguments = json.loads(line)
        manager = getattr(cinder, name)
        try:
            found = settled(manager, arguments) if method == "settled" else getattr(manager, method)(**arguments)
            answer = {"ok": plain(found)}
        except Exception as error:  # whatever it is, the test wants to know
            answer = {"error": {"status": getattr(error, "code", None), "message": f"{type(error).__name__}: {error}"}}
        print(json.dumps(answer), flush=True)


main()
